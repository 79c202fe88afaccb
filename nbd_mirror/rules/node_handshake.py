# SPDX-License-Identifier: BSD-3-Clause
"""
What two nodes do when they meet: one pure function, `decide`.

The connecting node computes it and sends the result. The other node computes it again,
from its own side; if the results differ, neither acts. The same function decides after
a connect, a start, a `resume` and a replaced disk, so no path bypasses it.

It has three steps. `relate` compares the generations. A table by that relation says
which node is the source and what is copied. The vetoes come last: it may be impossible
to carry out the decision, and then the result is the reason and the command that helps.

Two rules hold for every row:

- No row clears a bit. A resync always copies the union of both dirty maps, of both
  sides' doubts and of the regions that either disk misses. A flag may choose the
  direction; it never makes a region clean. "In sync" needs all these sets to be empty.
- `decide(a, b)` mirrors `decide(b, a)`. Each row is written from one side and is tried
  both ways round.

Terms: the *doubts* of a node towards another are the regions which may differ between
them, where neither copy is known to be newer: those that were under way when a node or
a session ended, and those that were copied from a third node since.
"""

from __future__ import annotations

from dataclasses import replace

from nbd_mirror.rules.generation import NO_DATA
from nbd_mirror.rules.node_identity import strangers
from nbd_mirror.rules.node_side import (
    Action,
    Crash,
    Extent,
    Plan,
    Relation,
    Role,
    Side,
    relate,
)

__all__ = ["decide", "healable", "inherited", "marked", "resolve"]


def decide(mine: Side, other: Side) -> Plan:
    """
    Say what *mine* and *other* do, or why they do nothing.

        row  the two sides             result
        ---  ------------------------  ---------------------------------------------
        1    another volume or size    stop
             a node was replaced, and  stop, until an operator announces it; unless
             not announced             neither has data
        2    one has no data           it is the target, of everything
             neither has data          new, if both disks are proven zero; else stop
        3    same generation, nothing  in sync; of two primaries the later one stays
             marked, both consistent
        4    same, one inconsistent    it is the target
        5,6  same, doubts              the source is the only primary, else the node
                                       whose host stayed up, else the last primary
        7    same, one map not empty   the source is the only primary, else the map's
                                       owner
        8    same, both maps           split brain
        9,10 one is the other's base   the base is the target
        11   one is an ancestor        the ancestor is the target, by checksums
        12   a common base             split brain; what differs is marked
        13   a common ancestor         split brain; what differs is not marked
        14   nothing in common         stop

    Then the vetoes; the first that applies is the result:

        one is primary, and the other knows that a   split brain, until that third
        third node was promoted later                node is met
        the source's image is inconsistent           stop
        by checksums, and the source's disk          stop
        misses regions
        the target is primary, and the source is     split brain
        not, or lacks a write that the target has
    """
    if mine.volume != other.volume or mine.size != other.size:
        return _other_volume(mine, other)
    replaced = strangers(mine.node, mine.identities, other.node, other.identities)
    if replaced and (mine.generation, other.generation) != (NO_DATA, NO_DATA):
        return _unannounced(mine, other, replaced[0])
    plan = _by_generation(mine, other)
    if plan.action is Action.STOP and not plan.split:
        return plan  # an operator cannot choose a side here: it stays the result
    return _other_leader(mine, other) or _other_leader(other, mine) or plan


def resolve(keep: Side, other: Side) -> Plan:
    """
    Say what happens if an operator decides that *keep* counts.

    It overrules a split brain, and a primary that would have to be a target, but no
    other stop. Clients lose the writes that only the other node has; the caller saves
    them first. The kept node begins a generation of its own, so that a third node with
    the losing node's generation is not taken for newer.
    """
    plan = decide(keep, other)
    if not plan.split:
        return plan
    exact = relate(keep, other) in _EXACT
    loser = replace(other, role=Role.SECONDARY)
    resolved = _resync(
        f"{plan.row}, resolved",
        keep,
        loser,
        Extent.MARKED if exact else Extent.DIFFERENT,
    )
    if resolved.action is Action.STOP:
        return resolved
    return replace(
        resolved,
        epoch=max(keep.epoch, other.epoch) + 1,
        demotes=other.role is Role.PRIMARY,
        begins=True,
    )


def marked(source: set[int], target: set[int]) -> set[int]:
    """
    Give the regions that a resync of the extent `MARKED` copies.

    Args:
        source, target: what each side names towards the other: its dirty map, its
            doubts, what its disk misses. Regions that only the target changed are
            copied too: the source has their older content, which counts.
    """
    return source | target


def healable(missed: set[int], dirty: set[int], target_missed: set[int]) -> set[int]:
    """
    Give the regions that a source takes from its target, as its own disk misses them.

    No node has the right content of the other missed regions: the target's content is
    older than an answered write, or was written after the histories parted. They stay
    missed, reads of them fail, and the operator is told.

    Args:
        missed, target_missed: what each side's disk misses.
        dirty: both sides' dirty maps.
    """
    return missed - dirty - target_missed


def inherited(copied: set[int], dirty: set[int], doubts: set[int]) -> set[int]:
    """
    Give the regions that a target enters into its doubts towards a third node.

    It stores them before the first copy. Copying changes the target, and the third node
    does not learn that. The regions that the source doubts towards the third node are
    from then on doubts of the target too.

    Args:
        copied: the regions that the resync copies.
        dirty, doubts: the source's, towards the third node.
    """
    return copied | dirty | doubts


# Row and extent of the copy to the node that is behind.
_TARGET_ROWS = {
    Relation.EMPTY: ("2 no data", Extent.DIFFERENT),
    Relation.BEHIND: ("9 base", Extent.MARKED),
    Relation.OLDER: ("11 ancestor", Extent.DIFFERENT),
}
_SOURCE_ROWS = {
    Relation.FILLED: _TARGET_ROWS[Relation.EMPTY],
    Relation.AHEAD: _TARGET_ROWS[Relation.BEHIND],
    Relation.NEWER: _TARGET_ROWS[Relation.OLDER],
}
# Relations in which only the marked regions differ.
_EXACT = frozenset({Relation.SAME, Relation.BEHIND, Relation.AHEAD, Relation.FORKED})


def _other_volume(mine: Side, other: Side) -> Plan:
    first, second = sorted((mine, other), key=lambda side: side.node)
    if first.volume != second.volume:
        reason = (
            f"{first.node} serves volume {first.volume}, {second.node} serves volume"
            f" {second.volume}; nothing was changed"
        )
        return Plan(Action.STOP, "1 other volume", reason=reason)
    reason = (
        f"the disk has {first.size} bytes on {first.node} and {second.size} bytes on"
        f" {second.node}; nothing was changed"
    )
    return Plan(Action.STOP, "1 other size", reason=reason)


def _unannounced(mine: Side, other: Side, name: str) -> Plan:
    """Stop for a node that has another id than before."""
    by_name = sorted((mine, other), key=lambda side: side.node)
    one, two = (side.node for side in by_name)
    reason = f"{one} and {two} know different nodes by the name {name}"
    if name in (one, two):
        reason = f"{name} is not the node that {two if name == one else one} knows"
    return Plan(
        Action.STOP,
        "1 another node",
        reason=f"{reason}: it lost its state or was replaced; nothing was changed",
        hint=f"nbd-mirror replace CONFIG {name} announces a new host; what only the"
        " earlier one held is given up",
    )


def _by_generation(mine: Side, other: Side) -> Plan:
    """Decide by the table's rows from 2 on."""
    relation = relate(mine, other)
    if relation is Relation.BOTH_EMPTY:
        return _both_empty(mine, other)
    if relation is Relation.SAME:
        return _same(mine, other)
    if relation in _TARGET_ROWS:
        row, extent = _TARGET_ROWS[relation]
        return _resync(row, other, mine, extent)
    if relation in _SOURCE_ROWS:
        row, extent = _SOURCE_ROWS[relation]
        return _resync(row, mine, other, extent)
    return _apart(relation, mine, other)


def _other_leader(first: Side, second: Side) -> Plan | None:
    """Stop if a third node was promoted after *first*, which serves clients."""
    serves = first.role is Role.PRIMARY and second.leader != second.node
    if serves and second.term > first.term:
        reason = (
            f"{first.node} is primary, and {second.node} knows that {second.leader} was"
            " promoted after it"
        )
        return _split("1 later primary", reason)
    return None


def _both_empty(mine: Side, other: Side) -> Plan:
    if mine.zero and other.zero:
        return Plan(Action.NEW, "2 both zero")
    return Plan(
        Action.STOP,
        "2 both empty",
        reason="no operator has said yet which node's data counts",
        hint="promote the node that holds the data",
    )


def _same(mine: Side, other: Side) -> Plan:
    """Decide between two nodes of one generation: rows 3 to 8."""
    if mine.inconsistent and other.inconsistent:
        reason = "resyncs to both nodes were cut off: neither image is of one instant"
        return Plan(Action.STOP, "4 both inconsistent", reason=reason)
    if mine.inconsistent or other.inconsistent:
        return _from(not mine.inconsistent, "4 inconsistent", mine, other)
    if mine.dirty and other.dirty:
        return _split("8 both maps", "both nodes have writes of the same generation")
    if _marked(mine) + _marked(other) == 0:
        if mine.role is Role.PRIMARY and other.role is Role.PRIMARY:
            return _from(_preferred(mine, other), "3 two primaries", mine, other)
        return _in_sync(mine, other)
    row = "7 map" if mine.dirty or other.dirty else "5 doubts"
    return _from(_preferred(mine, other), row, mine, other)


def _in_sync(mine: Side, other: Side) -> Plan:
    """Copy nothing. A primary stays primary, even if a later one has ended."""
    for side, peer in ((mine, other), (other, mine)):
        if side.role is Role.PRIMARY and side.term < peer.term:
            epoch = peer.epoch + 1
            return Plan(Action.IN_SYNC, "3 in sync", source=side.node, epoch=epoch)
    return Plan(Action.IN_SYNC, "3 in sync")


def _preferred(mine: Side, other: Side) -> bool:
    """
    Tell whether *mine* is the source, at the first difference.

    Of two primaries the later one always is, because its clients have read its data.
    """
    if mine.role is Role.PRIMARY and other.role is Role.PRIMARY:
        return _later(mine, other)
    for first, second in (
        (mine.role is Role.PRIMARY, other.role is Role.PRIMARY),
        (mine.dirty > 0, other.dirty > 0),
        (mine.missed == 0, other.missed == 0),
        (not _lost_cache(mine), not _lost_cache(other)),
    ):
        if first != second:
            return first
    return _later(mine, other)


def _later(mine: Side, other: Side) -> bool:
    """Tell whether *mine* is the later primary; names break a tie."""
    if mine.term != other.term:
        latest = mine if mine.term > other.term else other
        if latest.leader in (mine.node, other.node):
            return latest.leader == mine.node
    elif mine.leader in (mine.node, other.node):
        return mine.leader == mine.node
    return mine.node < other.node


def _lost_cache(side: Side) -> bool:
    """
    Tell whether a side may lack answered writes, as its host went down.

    A server that was killed, or a session that broke off, costs no answered write: the
    other copy of what was under way is as good. So the last primary stays the source,
    and resumes at once.
    """
    return side.crash is Crash.HOST and side.doubts > 0


def _marked(side: Side) -> int:
    return side.dirty + side.doubts + side.missed


def _from(first: bool, row: str, mine: Side, other: Side) -> Plan:
    source, target = (mine, other) if first else (other, mine)
    return _resync(row, source, target, Extent.MARKED)


def _resync(row: str, source: Side, target: Side, extent: Extent) -> Plan:
    """Make the plan of a resync, unless a veto forbids it."""
    if source.generation == NO_DATA:
        reason = f"{source.node} holds no data that could count"
        return Plan(Action.STOP, f"{row}, empty source", reason=reason)
    if source.inconsistent:
        reason = (
            f"{source.node} has writes that {target.node} lacks, but a resync to"
            f" {source.node} was cut off: its image is of no instant"
        )
        return Plan(Action.STOP, f"{row}, inconsistent source", reason=reason)
    if source.missed and extent is Extent.DIFFERENT:
        reason = (
            f"{source.node}'s disk misses {source.missed} regions, and {target.node}'s"
            " copy of them may be older"
        )
        return Plan(Action.STOP, f"{row}, source misses data", reason=reason)
    if target.role is Role.PRIMARY and source.role is not Role.PRIMARY:
        reason = (
            f"{target.node} serves clients and lacks writes that {source.node} answered"
        )
        return _split(f"{row}, target serves", reason)
    if target.role is Role.PRIMARY and target.dirty:
        reason = f"{target.node} serves clients and has writes that {source.node} lacks"
        return _split(f"{row}, target wrote", reason)
    overruled = source.term < target.term or target.role is Role.PRIMARY
    return Plan(
        Action.RESYNC,
        row,
        source=source.node,
        target=target.node,
        extent=extent,
        epoch=max(source.epoch, target.epoch) + 1 if overruled else 0,
        demotes=target.role is Role.PRIMARY,
        heals_source=source.missed > 0,
        discards=target.dirty,
    )


def _apart(relation: Relation, mine: Side, other: Side) -> Plan:
    first, second = sorted((mine.node, other.node))
    if relation is Relation.FORKED:
        reason = f"{first} and {second} answered writes since they were equal"
        return _split("12 common base", reason)
    if relation is Relation.FORKED_LONG_AGO:
        reason = f"{first} and {second} answered writes since a common ancestor"
        return _split("13 common ancestor", reason)
    if relation is Relation.CONTRADICTION:
        reason = f"the records of {first} and {second} contradict each other"
        return Plan(Action.STOP, "contradiction", reason=reason)
    reason = f"{first} and {second} hold data that have nothing in common"
    return Plan(Action.STOP, "14 unrelated", reason=reason)


def _split(row: str, reason: str) -> Plan:
    return Plan(
        Action.STOP,
        row,
        split=True,
        reason=reason,
        hint="nbd-mirror resolve CONFIG --keep NODE saves what the other node alone"
        " has, and then overwrites it; --dry-run shows how much that is",
    )
