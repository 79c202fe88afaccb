# SPDX-License-Identifier: BSD-3-Clause
"""
Compile single modules of csrc/ for the unit tests, with their asserts on.

The package's own extension exports only the public C API.  A test against a
plain model wants the bitmap or the ring by itself, so this makes a CFFI
extension of just the modules asked for.  It is kept under a name that holds a
hash of all that went into it: a changed source gives a new one, and an
unchanged one costs an import.

To test another module, add it to MODULES: its source, what it calls, and the
declarations the test uses.  `...` in a struct leaves fields out.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from cffi import FFI

__all__ = ["MODULES", "CModule", "load"]

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CFLAGS = ["-std=gnu11", "-O1", "-g", "-UNDEBUG", "-Wall", "-Wextra", "-Werror"]


@dataclass(frozen=True)
class CModule:
    """
    One C module.

    Args:
        cdef: what tests use of it, as its header declares it.
        needs: names of the modules it calls or whose structs it declares with.
    """

    cdef: str
    needs: tuple[str, ...] = ()


MODULES: dict[str, CModule] = {
    "error": CModule("const char *last_error (void);"),
    "crc32c": CModule(
        "uint32_t crc32c (uint32_t crc, const void *data, size_t length);"
    ),
    "clock": CModule(""),
    "fault": CModule("void fault_init (void);", needs=("clock", "error")),
    "file": CModule("", needs=("error", "fault")),
    "log_header": CModule("", needs=("error", "crc32c", "fault", "file")),
    "lineage": CModule(
        """
        struct nbdm_peer {
          char name[64];
          uint64_t bases[4];
          uint32_t shared;
          ...;
        };
        struct nbdm_node {
          uint64_t generation;
          uint64_t history[32];
          uint32_t nr_peers;
          struct nbdm_peer peers[8];
          ...;
        };
        struct nbdm_peer *lineage_peer (struct nbdm_node *node, const char *name);
        bool lineage_counted (const struct nbdm_peer *peer);
        bool lineage_is_fresh (const struct nbdm_node *node, uint64_t generation);
        void lineage_begin (struct nbdm_node *node, uint64_t fresh,
                            const bool *missing);
        """
    ),
    "bitmap": CModule(
        """
        struct bitmap {
          uint64_t nr_bits;
          uint64_t nr_set;
          uint32_t *page_set;
          uint64_t nr_pages;
          ...;
        };
        uint64_t bitmap_bytes (uint64_t nr_bits);
        int bitmap_init (struct bitmap *map, void *words, uint64_t nr_bits);
        void bitmap_count (struct bitmap *map, uint64_t page,
                           const void *content);
        void bitmap_clear_padding (struct bitmap *map);
        void bitmap_free (struct bitmap *map);
        bool bitmap_test (const struct bitmap *map, uint64_t bit);
        uint64_t bitmap_set (struct bitmap *map, uint64_t first,
                             uint64_t count);
        uint64_t bitmap_clear (struct bitmap *map, uint64_t first,
                               uint64_t count);
        void bitmap_clear_all (struct bitmap *map);
        uint64_t bitmap_merge (struct bitmap *into, const struct bitmap *from);
        uint64_t bitmap_next_set (const struct bitmap *map, uint64_t from,
                                  uint64_t end);
        uint64_t bitmap_next_clear (const struct bitmap *map, uint64_t from,
                                    uint64_t end);
        """,
        needs=("error",),
    ),
    "rangelock": CModule(
        """
        struct range {
          uint64_t offset, length;
          uint32_t blockers;
          struct range *next;
          ...;
        };
        struct rangelock {
          struct range *first;
          uint32_t nr_wide;
          uint32_t counts[...];
          ...;
        };
        bool rangelock_add (struct rangelock *rl, struct range *range);
        bool rangelock_try (struct rangelock *rl, struct range *range);
        void rangelock_remove (struct rangelock *rl, struct range *range);
        """
    ),
    # With the maps alone of struct dirty_map: no file is behind them here.
    "classify": CModule(
        """
        struct dirty_map {
          struct bitmap map[5];
          struct bitmap copied;
          ...;
        };
        struct piece {
          uint64_t offset, length;
        };
        bool classify_goes_remote (const struct dirty_map *dm, uint64_t region,
                                   bool always);
        bool classify_next (const struct dirty_map *dm, uint32_t region_size,
                            uint64_t from, uint64_t end, uint64_t max,
                            bool always, struct piece *piece);
        """,
        needs=("bitmap",),
    ),
    "inflight": CModule(
        """
        struct inflight {
          uint32_t nr_open;
          uint64_t sequence;
          ...;
        };
        struct slot_view {
          uint64_t sequence, offset, length;
          uint8_t kind, flags;
        };
        enum slot_kind { SLOT_WRITE = 1, SLOT_TRIM = 2, SLOT_ZERO = 3 };
        int inflight_create (int dirfd, const uint8_t *uuid, uint64_t session,
                             uint32_t nr_slots);
        int inflight_open (struct inflight *log, int dirfd,
                           const uint8_t *uuid, uint64_t session,
                           uint32_t nr_slots, bool *clean);
        int inflight_begin (struct inflight *log, uint64_t session);
        int inflight_finish (struct inflight *log);
        void inflight_close (struct inflight *log);
        int inflight_reserve (struct inflight *log, uint64_t offset,
                              uint64_t length, enum slot_kind kind,
                              uint8_t flags);
        void inflight_issued (struct inflight *log, int slot, uint32_t legs);
        void inflight_done (struct inflight *log, int slot, uint32_t legs);
        void inflight_retire (struct inflight *log, int slot);
        int inflight_replay (struct inflight *log, uint64_t size,
                             void (*visit) (void *opaque,
                                            const struct slot_view *),
                             void *opaque);
        """,
        needs=("log_header",),
    ),
    "activity_file": CModule("", needs=("log_header", "clock")),
    "activity": CModule(
        """
        struct activity {
          uint64_t persists;
          ...;
        };
        struct disk_activity_sector {
          uint64_t sequence;
          uint32_t index, crc;
          uint64_t extent[62];
        };
        struct activity_batch {
          struct disk_activity_sector *sectors;
          uint32_t *index;
          uint32_t count;
        };
        int activity_create (int dirfd, const uint8_t *uuid, uint64_t session,
                             uint32_t nr_entries, uint32_t extent_size);
        int activity_open (struct activity *act, int dirfd,
                           const uint8_t *uuid, uint64_t session,
                           uint32_t nr_entries, uint32_t extent_size,
                           uint64_t nr_extents, bool *clean);
        int activity_begin (struct activity *act, uint64_t session);
        int activity_finish (struct activity *act);
        void activity_close (struct activity *act);
        int activity_hold (struct activity *act, uint64_t first,
                           uint64_t last);
        bool activity_durable (const struct activity *act, uint64_t first,
                               uint64_t last);
        void activity_release (struct activity *act, uint64_t first,
                               uint64_t last, uint64_t now_ns);
        int activity_stage (struct activity *act,
                            struct activity_batch *batch);
        int activity_write (struct activity *act,
                            const struct activity_batch *batch);
        void activity_written (struct activity *act,
                               struct activity_batch *batch);
        void activity_discard (struct activity_batch *batch);
        uint32_t activity_pick (struct activity *act, uint32_t max,
                                uint64_t before_ns);
        uint32_t activity_drop (struct activity *act);
        uint32_t activity_count (const struct activity *act);
        uint32_t activity_list (const struct activity *act, uint64_t *extents,
                                uint32_t max);
        """,
        needs=("activity_file",),
    ),
}


def _in_order(names: tuple[str, ...]) -> list[str]:
    """Return *names* and all they need, each behind what it needs."""
    order: list[str] = []
    for name in names:
        for part in (*_in_order(MODULES[name].needs), name):
            if part not in order:
                order.append(part)
    return order


def _cache_dir() -> Path:
    """Return a folder that outlives the run: pytest's cache, or a temporary one."""
    folder = ROOT / ".pytest_cache" / "d" / "cmodules"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir()) / f"nbd-mirror-cmodules-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise PermissionError(f"{folder} is another user's") from None
    return folder


def _compile(
    module: str, cdef: str, sources: list[Path], headers: list[Path], target: Path
) -> None:
    """Build the extension *module* and move it to *target* in one step."""
    ffi = FFI()
    ffi.cdef(cdef)
    ffi.set_source(
        module,
        "".join(f'#include "{header}"\n' for header in headers),
        sources=[str(source) for source in sources],
        include_dirs=[str(CSRC)],
        libraries=["isal"],
        # CFFI's own code leaves its arguments unused and takes no part in this.
        extra_compile_args=[*CFLAGS, "-Wno-unused-parameter"],
    )
    # Two test runs may build at once: each in a folder of its own, and the
    # rename lets the last one win with the same contents.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        Path(ffi.compile(tmpdir=folder)).replace(target)


def _import(module: str, path: Path) -> ModuleType:
    """Import *module* from the shared object at *path*."""
    spec = importlib.util.spec_from_file_location(module, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {path}")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@functools.cache
def load(*names: str) -> tuple[Any, Any]:
    """
    Return `(ffi, lib)` with the C modules *names* and all they need.

    Compiles at the first call after a change, which takes a few seconds.
    """
    order = _in_order(names)
    cdef = "\n".join(MODULES[name].cdef for name in order)
    sources = [next(CSRC.glob(f"*/{name}.c")) for name in order]
    # All of the layers that tests load from: declarations cost nothing.
    headers = [
        path.relative_to(CSRC)
        for layer in ("base", "logs")
        for path in sorted((CSRC / layer).glob("*.h"))
    ]
    digest = hashlib.sha256(repr((sys.version, CFLAGS, cdef, order)).encode())
    digest.update(Path(__file__).read_bytes())
    for path in (*sources, *sorted(CSRC.rglob("*.h"))):
        digest.update(path.read_bytes())
    module = f"_nbdm_test_{digest.hexdigest()[:16]}"
    target = _cache_dir() / f"{module}.so"
    if not target.exists():
        _compile(module, cdef, sources, headers, target)
    loaded: Any = _import(module, target)
    return loaded.ffi, loaded.lib
