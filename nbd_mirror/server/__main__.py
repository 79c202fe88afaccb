# SPDX-License-Identifier: BSD-3-Clause
"""The direct door's process: `python -m nbd_mirror.server CONFIG`."""

from __future__ import annotations

import sys

from ..base.interrupt import end_by_signal

if __name__ == "__main__":
    # Until the server takes its signals: a start may be cut short at any instant.
    end_by_signal()
    from .direct import main

    main(sys.argv[1])
