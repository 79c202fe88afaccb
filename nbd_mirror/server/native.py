# SPDX-License-Identifier: BSD-3-Clause
"""
The Python half of the native door: the functions that csrc/doors/door.h declares.

No module imports this file. Its text is built into the nbdkit plugin, which runs it
once, in the interpreter that it embeds, at the first call of one of these functions.
PYTHONPATH, which `nbd-mirror serve` sets, leads to the rest of the package.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from _nbdm_native import ffi

# This must come before any import of ours: volume/core must drive the engine inside
# this plugin, not a second copy of it in _core's own shared object.
sys.modules["nbd_mirror._core"] = sys.modules["_nbdm_native"]

# The imports take time, and would show Ctrl-C as a traceback.
from nbd_mirror.base.interrupt import end_by_signal  # noqa: E402

end_by_signal()

if TYPE_CHECKING:
    from nbd_mirror.server.volume import Volume

_volume: Volume | None = None


@ffi.def_extern()  # type: ignore[untyped-decorator]
def nbdm_door_open(config: Any, shutdown: Any) -> Any:
    """Open the volume, or end the process with one clear line."""
    global _volume  # noqa: PLW0603  nbdkit has one volume a process
    from nbd_mirror.server.process import or_exit
    from nbd_mirror.server.volume import Volume

    path = ffi.string(config).decode(errors="surrogateescape")
    _volume = or_exit(lambda: Volume.open(path, "native", shutdown))
    return _volume.engine.handle


@ffi.def_extern()  # type: ignore[untyped-decorator]
def nbdm_door_start() -> None:
    """Start the threads."""
    from nbd_mirror.server.process import or_exit

    assert _volume is not None
    or_exit(_volume.serve)


@ffi.def_extern()  # type: ignore[untyped-decorator]
def nbdm_door_stop() -> None:
    """Stop cleanly and close."""
    assert _volume is not None
    _volume.stop()
