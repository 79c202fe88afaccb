# SPDX-License-Identifier: BSD-3-Clause
"""
Have nbdkit run a Python module of ours.

nbdkit embeds a Python that does not know our virtual environment. So it gets the path
of the modules that ours imports, and leads nowhere else: not to the current folder, nor
to the caller's modules.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from ..base.errors import UnsupportedError
from ..base.programs import find_program, run

__all__ = ["PLUGINS", "module_path", "plugin_command"]

PLUGINS = Path(__file__).resolve().parent.parent / "server"
# The modules that our plugins import, and nbdkit's Python cannot find.
_IMPORTS = ("nbd_mirror", "_cffi_backend", "bitarray", "pydantic", "typing_inspection")


def module_path() -> str:
    """Return the PYTHONPATH with which any Python finds our modules."""
    folders: list[str] = []
    for name in _IMPORTS:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin:
            origin = Path(spec.origin).resolve()
            package = spec.submodule_search_locations is not None
            folders.append(os.fspath(origin.parents[1 if package else 0]))
    return os.pathsep.join(dict.fromkeys(folders))


def plugin_command(
    plugin: str, *, options: Sequence[str] = (), hint: str = "", **parameters: str
) -> list[str]:
    """
    Return the words that have nbdkit run a plugin in the foreground.

    Args:
        plugin: the name of a file in PLUGINS.
        options: of nbdkit.
        hint: what helps where a parameter's value is not UTF-8.
        parameters: of the plugin.
    Raises:
        UnsupportedError: nbdkit or its Python plugin is not installed, or it cannot be
            told a value.
    """
    nbdkit = find_program("nbdkit", "nbdkit")
    for value in parameters.values():
        if not _is_utf8(value):
            raise UnsupportedError(
                f"nbdkit's Python plugin cannot be told of {value}, whose name is not "
                "UTF-8",
                hint,
            )
    done = run(nbdkit, "python", "--dump-plugin")
    if done.status:
        raise UnsupportedError(
            f"nbdkit has no Python plugin: {done.said}",
            "apt-get install nbdkit-plugin-python",
        )
    words = [f"{key}={value}" for key, value in parameters.items()]
    return [nbdkit, "-f", *options, "python", os.fspath(PLUGINS / plugin), *words]


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
