# SPDX-License-Identifier: BSD-3-Clause
"""
A volume's status: `nbd-mirror status --json` prints it, and all commands read it.

The models define the keys and their order, and the manual's tables have their
descriptions. report.py builds a status from facts, with a server and without one; a
command gets it over the control socket, where `answers.read` checks it. A key with a
default is one that a server of an earlier version may not send.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from .answers import Answer, Flag, Number, Text, Unit, Whole

__all__ = [
    "Disk",
    "Local",
    "NodeStatus",
    "OtherNode",
    "Persists",
    "Promotable",
    "Remote",
    "Resync",
    "Status",
]

Bytes = Annotated[Whole, Unit("bytes")]
Count = Annotated[Whole, Unit("count")]
Id = Annotated[Whole, Unit("number")]
Seconds = Annotated[Number, Unit("seconds")]
Rate = Annotated[Whole, Unit("bytes per second")]
Time = Annotated[Text, Unit("ISO 8601")]


class Resync(Answer):
    """How far the copying to a disk is."""

    done_bytes: Bytes = Field(description="copied since this resync began")
    total_bytes: Bytes = Field(description="`done_bytes`, and what is left now")
    bytes_per_s: Rate = Field(description="at present; 0: nothing moves")
    eta_s: Seconds | None = Field(
        description="time left at this rate; null: nothing moves"
    )
    growing: Flag = Field(False, description="clients make more dirty than is copied")


class Persists(Answer):
    """How often logs were made durable."""

    activity: Count = Field(description="of the activity log")
    superblock: Count = Field(description="of the superblock")
    dirty: Count = Field(description="of the dirty maps")


class Local(Answer):
    """The local disk."""

    path: Text = Field(description="where it is")
    state: Text = Field(description="`ok`, `silent`, `failed` or `resyncing`")
    reason: Text = Field("", description="why it is in this state; may be empty")
    hint: Text = Field("", description="which command helps; may be empty")
    dirty_bytes: Bytes = Field(0, description="what it misses, in whole regions")
    silent_s: Seconds = Field(
        0.0, description="how long its oldest request has had no answer"
    )
    errors: Count = Field(0, description="failed requests since the start")
    repaired_regions: Count = Field(
        0, description="unreadable regions, rewritten since the start"
    )
    copied_bytes: Bytes = Field(
        0, description="copied back since the start, with those regions"
    )
    resync: Resync | None = Field(None, description="null: nothing is to be copied")
    last_error: Text = Field(
        "", description="while it is `ok`: its last error, or empty"
    )
    since: Time = Field("", description="when its state last changed; empty: never")

    @property
    def name(self) -> str:
        """What commands call it."""
        return "local"


class Remote(Answer):
    """A remote."""

    name: Text = Field(description="its name in commands")
    uri: Text = Field(description="where it is")
    state: Text = Field(description="see STATES")
    reason: Text = Field(description="why it is in this state; may be empty")
    hint: Text = Field(description="which command helps; may be empty")
    connected: Flag = Field(description="connected and in use")
    dirty_bytes: Bytes = Field(description="what it misses, in whole regions")
    late_bytes: Bytes = Field(description="of these, held back for late writes")
    unflushed_bytes: Bytes = Field(description="answered and not flushed yet")
    flush_bound_bytes: Bytes | None = Field(
        None,
        description="the limit of unflushed bytes: measured, so that a flush fits the "
        "deadline; null without a server",
    )
    assumed: Flag = Field(description="in sync on an operator's word, not proven")
    paused: Flag = Field(description="by an operator")
    resync: Resync | None = Field(description="null: nothing is to be copied")
    last_error: Text = Field(description="the last error, or empty")
    since: Time = Field(description="when the state was entered")


Disk = Local | Remote


class OtherNode(Answer):
    """Another node of the volume, as this one sees it."""

    name: Text = Field(description="its name in the configuration")
    address: Text = Field(description="where this node reaches it")
    connected: Flag = Field(description="it answers, or a session with it is up")
    role: Text = Field(description="`primary` or `secondary`; empty: not known")
    in_sync: Flag = Field(description="both nodes hold the same data")
    since: Time = Field("", description="when it was met last; empty: never")
    why: Text = Field("", description="why it is not in sync; may be empty")


class Promotable(Answer):
    """Whether this node may be promoted now."""

    answer: Text = Field(description="`yes`, `force` or `no`")
    reason: Text = Field("", description="why")
    command: Text = Field("", description="which command promotes it; empty: none")
    lost: Text = Field("", description="what a forced promotion may lose; may be empty")


class NodeStatus(Answer):
    """The node that answers, of a volume of nodes."""

    name: Text = Field(description="its name in the configuration")
    role: Text = Field(description="`primary` or `secondary`")
    epoch: Id = Field(description="of the latest promotion that it knows; 0: none")
    leader: Text = Field(description="the node promoted then; empty: none")
    generation: Text = Field(description="of its data, in hex; empty: no data yet")
    state: Text = Field(
        description="`in_sync`, `behind`, `inconsistent`, `no_data`, `waiting` or "
        "`alone`"
    )
    why: Text = Field("", description="why it is in this state; may be empty")
    hint: Text = Field("", description="which command helps; may be empty")
    hook: Text = Field(
        "", description="which hook failed since the server began; may be empty"
    )
    peers: tuple[OtherNode, ...] = Field(description="the other nodes")
    promotable: Promotable = Field(description="whether it may be promoted now")


class Status(Answer):
    """A volume."""

    volume: Text = Field(description="its name")
    uuid: Text = Field(description="given by `create`")
    size: Bytes = Field(description="of the volume")
    state: Text = Field(description="see STATES; that of its worst disk")
    reason: Text = Field(description="why it is in this state; may be empty")
    hint: Text = Field(description="which command helps; may be empty")
    local: Local = Field(description="the local disk")
    door: Text | None = Field(description="`direct` or `python`; null without a server")
    pid: Id | None = Field(description="of the server; null without one")
    clients: Count = Field(description="connections of clients")
    max_clients: Count | None = Field(
        None,
        description="the limit of the direct door: `max_clients`, or less if the limit "
        "of open files is lower; null without it",
    )
    inflight: Count = Field(description="requests under way")
    active_extents: Count = Field(description="extents in the activity log")
    persists: Persists | None = Field(
        None,
        description="how often logs were made durable since the start; under a steady "
        "load none of them grows",
    )
    policy: Text = Field(
        description="the policy in force; without a server, that of the configuration"
    )
    fenced_reads: Text = Field("serve", description="as `policy`")
    region_size: Bytes = Field(description="of a region of the dirty maps")
    generation: Id = Field(description="of 64 bits")
    log_lines_lost: Count | None = Field(
        None,
        description="lines of the log lost since the start, because writing failed or "
        "was too slow",
    )
    log_lines_left_out: Count | None = Field(
        None,
        description="lines about clients left out because there were too many",
    )
    clean_stop: Flag | None = Field(
        None,
        description="whether the last server stopped cleanly; left out while one runs",
    )
    node: NodeStatus | None = Field(
        None, description="this node and the others; left out without nodes"
    )
    remotes: tuple[Remote, ...] = Field(
        description="the remotes; on a primary also the other nodes, which come first; "
        "on a secondary none"
    )

    @property
    def secondary(self) -> bool:
        """Whether this is a secondary, which copies to nobody."""
        return self.node is not None and self.node.role == "secondary"

    @property
    def disks(self) -> tuple[Disk, ...]:
        """The local disk, then the remotes."""
        return (self.local, *self.remotes)

    def dump(self) -> dict[str, Any]:
        """Return it as JSON carries it."""
        left_out = ("clean_stop", "node")
        return self.model_dump(
            exclude={key for key in left_out if getattr(self, key) is None}
        )
