# SPDX-License-Identifier: BSD-3-Clause
"""The soak's checks of whole disks: by the checker, and one against the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from .checker import Checker, Verdict
from .far import Far
from .load import ViolationError
from .register import BLOCK

__all__ = ["Judge", "complain"]

CHUNK = 1 << 20  # bytes


def complain(verdicts: list[Verdict]) -> None:
    """Raise ViolationError if there are any."""
    if verdicts:
        more = f"\n... and {len(verdicts) - 10} more" if len(verdicts) > 10 else ""
        raise ViolationError("\n".join(map(str, verdicts[:10])) + more)


class Judge:
    """
    Judges the disks of one episode.

    Args:
        local: the local disk.
        blocks: of each disk.
        checker: of the episode.
        counts: of the whole run; added to.
    """

    def __init__(
        self, local: Path, blocks: int, checker: Checker, counts: Counter[str]
    ) -> None:
        self._blocks = blocks
        self._local, self._checker, self._counts = local, checker, counts

    def disk(
        self, image: Path, judge: Callable[..., list[Verdict]], where: str
    ) -> None:
        """Judge a disk by one of the checker's judges."""
        with image.open("rb") as file:
            first = 0
            while content := file.read(CHUNK):
                complain(judge(first, content, where))
                first += len(content) // BLOCK
        if first != self._blocks:
            raise ViolationError(f"{where}: {first} blocks, not {self._blocks}")

    def compare(self, far: Far, when: str) -> None:
        """Raise ViolationError unless the images are equal."""
        self._counts["comparisons"] += 1
        with self._local.open("rb") as one, far.server.image.open("rb") as other:
            first = 0
            while left := one.read(CHUNK):
                right = other.read(len(left))
                if left != right:
                    self._differ(far, when, first, left, right)
                first += len(left) // BLOCK

    def _differ(
        self, far: Far, when: str, first: int, left: bytes, right: bytes
    ) -> None:
        blocks = [
            first + at // BLOCK
            for at in range(0, len(left), BLOCK)
            if left[at : at + BLOCK] != right[at : at + BLOCK]
        ]
        at = (blocks[0] - first) * BLOCK
        ours = self._checker.explain(blocks[0], left[at : at + BLOCK], "local")
        theirs = self._checker.explain(blocks[0], right[at : at + BLOCK], far.name)
        raise ViolationError(
            f"{far.name} differs from local {when} though it is in sync, in "
            f"{len(blocks)} blocks of the first MiB that does: {blocks[:20]}\n"
            f"{ours}\n{theirs}"
        )
