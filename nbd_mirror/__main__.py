# SPDX-License-Identifier: BSD-3-Clause
"""`python -m nbd_mirror`: the command line, as `nbd-mirror` is."""

from __future__ import annotations

from typing import NoReturn

from .base.interrupt import end_at_once

__all__ = ["main"]


def main() -> NoReturn:
    """Run the command line; Ctrl-C ends it also while modules are imported."""
    end_at_once()
    from .commands.cli import main as run

    run()


if __name__ == "__main__":
    main()
