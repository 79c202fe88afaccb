# SPDX-License-Identifier: BSD-3-Clause
"""
How an operator's choice ends a split brain: on the losing node, and on the kept one.

    save      the losing node writes the keep file, durably
    choose    the kept node stores a later term and a generation of its own
    give up   the losing node stores that it goes back to a base of the kept one

The order is the point of it: nothing is given up before the keep file is durable, and
nothing is overwritten before the last store. rules/resolution.py says why each store is
sound, and why the nodes may be killed between any two.

A primary saves with its door closed, so its disk does not change in the meantime. A
promotion ends the process, and so the work with it.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from ..base.errors import (
    BusyError,
    ConfigError,
    MirrorError,
    NotRunningError,
    RoleError,
    SpaceError,
)
from ..rules.node_side import Extent, Plan, Role, Side
from ..rules.resolution import GivenUp, chosen, given_up, why_not_resolved
from ..rules.state import LocalState
from ..volume import node_wire as wire
from ..volume.config import VolumeConfig
from ..volume.keep_file import (
    FOLDER,
    KeepHeader,
    KeepReader,
    KeepWriter,
    remove_leftovers,
)
from ..volume.model import NodeMap
from ..volume.node_record import NodeRecord
from .keep_source import KeepSource
from .node_calls import RefusedError
from .node_local import LocalNode, follows, term_of, union
from .node_others import Others

__all__ = ["NodeResolve", "ResolveDoor", "handle_resolve"]

SLACK = 64 << 20  # bytes that the keep file leaves free


@dataclass(frozen=True, slots=True)
class ResolveDoor:
    """
    What the work needs of the server.

    *close* turns new clients away with a text; *open* takes them again; *leave* ends
    this process's service as primary.
    """

    close: Callable[[str], object]
    open: Callable[[], object]
    leave: Callable[[], object]


@dataclass(slots=True)
class _Job:
    """The work under way, or ended; the thread of the work alone changes it."""

    id: str
    keep: str
    dry_run: bool
    record: NodeRecord  # the work is about this generation and term
    state: str = "preparing"
    plan: Plan | None = None
    base: str = ""
    source: KeepSource | None = None
    done: int = 0  # regions
    error: MirrorError | None = None


class NodeResolve:
    """
    Resolves split brains of this node.

    Args:
        clock: gives seconds since 1970. fresh: random numbers for generations.
    """

    def __init__(
        self,
        config: VolumeConfig,
        local: LocalNode,
        others: Others,
        door: ResolveDoor,
        log: Callable[[str, str], object],
        *,
        clock: Callable[[], float] = time.time,
        fresh: Callable[[], int] = lambda: secrets.randbits(64) or 1,
    ) -> None:
        self._config = config
        self._local = local
        self._others = others
        self._door = door
        self._log = log
        self._clock = clock
        self._fresh = fresh
        self._lock = threading.Lock()  # guards which job there is
        self._job: _Job | None = None
        self._thread: threading.Thread | None = None

    # --- what an operator asks ---

    def resolve(
        self, keep: str, *, dry_run: bool = False, job: str = ""
    ) -> wire.JobWords:
        """
        Begin to resolve, or say how far it is.

        Args:
            keep: the node that counts.
            dry_run: say what would be done, and do nothing.
            job: what an earlier call named: only say how far that is.
        Raises:
            RoleError: the nodes are no split brain, or the losing one is in use.
            MirrorError: a node cannot be reached, or something could not be stored.
        """
        own = self._local.record().node
        if keep not in (own, *self._local.others):
            names = ", ".join(sorted((own, *self._local.others)))
            raise ConfigError(f"name a node of the volume to keep: {names}")
        if keep != own:
            return self.lose(keep, dry_run=dry_run, job=job)
        loser = self._losing()
        self._others.require(loser, wire.RESOLVE)
        return self._others.give_up(loser, dry_run=dry_run, job=job)

    def _losing(self) -> str:
        if len(self._local.others) == 1:
            return self._local.others[0]
        raise RoleError(
            "the volume has several other nodes",
            "nbd-mirror resolve CONFIG --keep NODE (on the node that is given up)",
        )

    # --- the losing node ---

    def lose(self, keep: str, *, dry_run: bool, job: str) -> wire.JobWords:
        """
        Give up what this node alone has, for *keep*; as `resolve`.

        A thread does the work, as a call of another node has to be answered soon.
        """
        with self._lock:
            if job:
                return self._progress(job)
            if self._thread is not None and self._thread.is_alive():
                assert self._job is not None
                if dry_run or self._job.keep != keep:
                    raise BusyError("this node is just being resolved")
                return self._words(self._job)
            now = datetime.fromtimestamp(self._clock(), UTC).strftime("%Y%m%d-%H%M%S")
            name = f"{now}-{secrets.token_hex(2)}"
            self._job = _Job(name, keep, dry_run, self._local.record())
            self._thread = threading.Thread(
                target=self._run, args=(self._job,), name="resolve", daemon=True
            )
            self._thread.start()
            return self._words(self._job)

    def _progress(self, name: str) -> wire.JobWords:
        """Say how far a job is; one of an earlier process too."""
        job = self._job
        if job is not None and job.id == name:
            if job.error is not None:
                raise job.error
            return self._words(job)
        path = self._config.state_dir / FOLDER / Path(name).name
        record = self._local.record()
        try:
            with KeepReader(path) as kept:
                header, keep_bytes = kept.header, kept.bytes
        except MirrorError:
            header, keep_bytes = None, 0
        if header is None or record.epoch < header.epoch:
            raise NotRunningError(
                "the server ended before it gave up anything: nothing was overwritten",
                "nbd-mirror resolve CONFIG --keep NODE",
            )
        state: wire.JobWords = {"state": "done", "id": name, "loser": header.node}
        # The last region may be shorter.
        size = min(header.regions * header.region_size, header.size)
        state |= {"keep": header.kept, "regions": header.regions, "bytes": size}
        return state | {"keep_bytes": keep_bytes}

    def _words(self, job: _Job) -> wire.JobWords:
        words: wire.JobWords = {
            "state": job.state,
            "id": job.id,
            "loser": job.record.node,
            "keep": job.keep,
            "done": job.done,
        }
        if job.source is not None and job.plan is not None:
            words |= {
                "row": job.plan.row,
                "regions": job.source.count,
                "bytes": job.source.bytes,
                "keep_bytes": job.source.keep_bytes,
            }
        return words

    # --- the thread of the work ---

    def _run(self, job: _Job) -> None:
        closed = False
        try:
            self._prepare(job)
            if job.dry_run:
                job.state = "dry_run"
                return
            self._check_room(job)
            closed = self._close_door(job)
            self._save(job)
            self._give_up(job)
            job.state = "done"
        except MirrorError as error:
            job.error = error
            self._log("error", f"resolve: nothing was given up: {error.message}")
            if closed and not self._local.leaving:
                self._door.open()
        except Exception as error:
            job.error = MirrorError(f"internal error in the server: {error!r}")
            raise

    def _prepare(self, job: _Job) -> None:
        """Find what is to be done; raises RoleError if nothing is."""
        self._others.require(job.keep, wire.RESOLVE)
        local = self._local
        job.plan, job.base = self._split(job.keep)
        self._check_disk()
        if local.primary and local.engine.status().clients:
            self._refuse_clients(job)
        marks, bits = local.marks(job.keep), None
        if job.plan.extent is Extent.MARKED:  # both maps are all that differs
            bits = union(self._others.fetch(job.keep, len(marks)), marks)
        status = local.engine.status()
        job.source = KeepSource(
            self._config.local, status.size, status.region_size, bits
        )

    def _split(self, keep: str) -> tuple[Plan, str]:
        """Return the plan, and the generation that both have in common."""
        mine, kept, _ = self._others.meet(keep)
        plan, why_not = why_not_resolved(kept, mine)
        if why_not:
            raise RoleError(
                f"nothing was changed: {why_not}", "nbd-mirror status CONFIG"
            )
        theirs = (*kept.bases, kept.generation, *kept.history)
        held = {mine.generation, *mine.bases, *mine.history}
        return plan, next((f"{one:016x}" for one in theirs if one in held), "")

    def _close_door(self, job: _Job) -> bool:
        """Let no new client of a primary in, and tell whether that was done."""
        if not self._local.primary:
            return False
        node = job.record.node
        self._door.close(f"{node} is given up for {job.keep}: connect there")
        if self._local.engine.status().clients:  # one that came just now
            self._door.open()
            self._refuse_clients(job)
        return True

    def _check_disk(self) -> None:
        local = self._local
        missed = any(any(local.bits(o, NodeMap.MISSED)) for o in local.others)
        if missed or local.engine.status().local.state is not LocalState.OK:
            raise RoleError(
                f"the disk of {local.record().node} has failed, or misses regions, so "
                "what it holds cannot be saved; nothing was changed",
                "nbd-mirror status CONFIG",
            )

    def _refuse_clients(self, job: _Job) -> None:
        node = job.record.node
        raise RoleError(
            f"clients use {node}, whose writes are to be given up for {job.keep}; "
            "nothing was changed",
            f"disconnect them, or nbd-mirror demote CONFIG --force (on {node})",
        )

    def _check_room(self, job: _Job) -> None:
        assert job.source is not None
        found = os.statvfs(self._config.state)
        free, need = found.f_bavail * found.f_frsize, job.source.keep_bytes + SLACK
        if free < need:
            raise SpaceError(
                f"the keep file needs {need} bytes in {self._config.state}, and {free} "
                "are free; nothing was changed",
                "make room on the file system of `state`, then try again",
            )

    def _save(self, job: _Job) -> None:
        local, record, source = self._local, job.record, job.source
        assert source is not None
        job.state = "saving"
        remove_leftovers(self._config.state_dir)
        local.engine.node_flush()
        local.reach("resolve_begun")
        with KeepWriter(self._config.state_dir, job.id, self._header(job)) as keeper:
            for region, data in source.read():
                if local.leaving:
                    raise NotRunningError("the server ends")
                keeper.add(region, data)
                job.done += 1
            local.reach("keep_written")
            size = keeper.finish()
        local.reach("keep_stored")
        text = f"{job.done} regions are saved in the keep file {job.id}, {size} bytes"
        self._log("warning", f"node {record.node}: {text}")

    def _header(self, job: _Job) -> KeepHeader:
        record, status = job.record, self._local.engine.status()
        assert job.source is not None
        assert job.plan is not None
        claim = record.claim
        return KeepHeader(
            volume=self._local.volume,
            uuid=status.uuid,
            node=record.node,
            kept=job.keep,
            generation=_hex(record),
            base=job.base,
            epoch=job.plan.epoch,
            time=int(self._clock()),
            size=status.size,
            region_size=status.region_size,
            regions=job.source.count,
            claim=f"{claim.epoch}.{claim.node}.{claim.session}" if claim else "",
            reason=job.plan.row[:200],
        )

    def _give_up(self, job: _Job) -> None:
        local = self._local
        plan, _ = self._split(job.keep)
        kept = self._others.choose(job.keep, local.side(job.keep), plan)
        local.reach("choice_answered")
        found = given_up(local.record().lineage, kept)
        if found is None:
            raise RoleError("the two nodes have no generation in common")
        self._doubt(job, found)
        local.reach("given_up_marked")
        with local.lock:
            if local.leaving or local.asks or local.session is not None:
                raise BusyError("the role of this node is just changing")
            local.change(lambda record: _stored(record, job.record, found, kept))
            local.reach("given_up_stored")
            was_primary = local.primary
        words = f"gave up what it alone held, for {job.keep}; see `keep list`"
        self._log("warning", f"node {job.record.node}: {words}")
        if was_primary:
            self._door.leave()

    def _doubt(self, job: _Job, found: GivenUp) -> None:
        """
        Enter what may differ into the doubts, before the store that relies on it.

        A third node of that generation has none of what this one answered alone.
        """
        local = self._local
        marks = local.marks(job.keep)
        if not found.exact:
            marks = b"\xff" * len(marks)
            local.engine.node_mark(local.disk_of(job.keep), NodeMap.DOUBTS, marks)
        for other in local.others:
            if other != job.keep:
                local.engine.node_mark(local.disk_of(other), NodeMap.DOUBTS, marks)

    # --- the kept node, and calls of other nodes ---

    def answer(
        self, sender: str, body: wire.Choose | wire.GiveUp, reply: wire.Answer
    ) -> wire.Answer:
        """
        Answer a call of another node.

        Raises:
            RefusedError: it may not be done. MirrorError: it cannot be done.
        """
        if isinstance(body, wire.GiveUp):
            words = self.lose(sender, dry_run=body.dry_run, job=body.job)
            return reply.model_copy(update={"job": words})
        self._choose(sender, body)
        side = wire.SideWords.of(self._local.side(sender))
        return reply.model_copy(update={"side": side})

    def _choose(self, sender: str, body: wire.Choose) -> None:
        local, side = self._local, body.side.side()
        if side.node != sender:
            raise RefusedError(f"{sender} shows itself as {side.node}")
        with local.lock:
            mine = local.side(sender)
            plan, why_not = why_not_resolved(mine, side)
            if why_not:
                raise RefusedError(why_not)
            if wire.plan_words(plan) != body.plan:
                raise RefusedError(f"{mine.node} and {sender} decide differently")
            if local.leaving or local.asks:
                raise RefusedError("the role of this node is just changing")
            local.change(lambda record: self._chosen(record, sender, plan.epoch))
            local.reach("chosen_stored")
        self._log("warning", f"node {mine.node}: an operator keeps it, not {sender}")

    def _chosen(self, record: NodeRecord, loser: str, epoch: int) -> NodeRecord:
        return replace(
            record,
            lineage=chosen(record.lineage, self._fresh(), loser),
            epoch=epoch,
            leader=record.node,
            handed="",
        )


def handle_resolve(resolve: NodeResolve, args: Mapping[str, object]) -> object:
    """Do what the control socket asks for; raises as `NodeResolve.resolve`."""
    keep, dry_run = args.get("keep"), args.get("dry_run", False)
    job = args.get("job", "")
    texts = isinstance(keep, str) and isinstance(job, str)
    if not texts or not isinstance(dry_run, bool):
        raise ConfigError("resolve: wrong arguments")
    return resolve.resolve(str(keep), dry_run=dry_run, job=str(job))


def _hex(record: NodeRecord) -> str:
    return f"{record.lineage.generation:016x}"


def _stored(
    record: NodeRecord, judged: NodeRecord, found: GivenUp, kept: Side
) -> NodeRecord:
    """Return the record of the losing node; raises if it was promoted since."""
    same = record.lineage == judged.lineage and term_of(record) == term_of(judged)
    if not same:
        raise BusyError("this node's data or role have changed in the meantime")
    following = follows(record, kept.term)
    return replace(following, lineage=found.lineage, role=Role.SECONDARY)
