# SPDX-License-Identifier: BSD-3-Clause
"""`python -m nbd_mirror`: the command line, like `nbd-mirror`."""

from __future__ import annotations

from .commands.cli import main

if __name__ == "__main__":
    main()
