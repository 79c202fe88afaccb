# SPDX-License-Identifier: BSD-3-Clause
"""
The load of the failover's demonstration: a database that commits without a pause.

Usage: demo_load.py DATABASE TOLD. It appends a byte to the file TOLD after each commit
that the database has answered. TOLD is on another disk, so it survives the loss of the
database's.
"""

from __future__ import annotations

import contextlib
import sqlite3
import sys
from pathlib import Path


def main() -> None:
    """Commit until killed, or until the disk fails."""
    database, told = sys.argv[1:]
    with (
        contextlib.closing(sqlite3.connect(database)) as db,
        Path(told).open("ab", buffering=0) as answered,
    ):
        db.execute("PRAGMA synchronous = EXTRA")
        db.execute("CREATE TABLE IF NOT EXISTS told (text)")
        db.commit()
        while True:
            db.execute("INSERT INTO told VALUES (hex(randomblob(200)))")
            db.commit()
            answered.write(b".")


if __name__ == "__main__":
    main()
