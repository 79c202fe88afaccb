# SPDX-License-Identifier: BSD-3-Clause
"""
Fail if an include in csrc/ or an import in nbd_mirror/ points to a higher layer.

A folder is a layer, and the two lists define their order: a file uses its own folder
and those of the layers before it. docs/design.md draws the same layers. Imports inside
functions and for types count like any other.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

C_LAYERS = (
    *("base", "logs", "wire", "volume", "request"),
    *("resync", "life", "executor", "doors"),
)
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
ANYWHERE = ("api.h", "nbdm.h")  # the C API's types, which every layer uses

PACKAGE = "nbd_mirror"
# In the last layer neither folder uses the other: they meet at the control socket.
PYTHON_LAYERS = (
    ("base",),
    ("rules",),
    ("volume",),
    ("device",),
    ("server", "commands"),
)
COMPILED = "_core"  # the compiled C code
BOUNDARY = ("volume", "core", "boundary")  # the only module that imports it
TOP = "__main__"  # above all layers
OUTSIDE = ("__init__", "_build")  # import nothing of ours
VERSION = "__version__"  # of the package itself; every layer may import it


def complaints(root: Path) -> list[str]:
    """Return a line for each include and import below *root* that is wrong."""
    return [*c_complaints(root), *python_complaints(root)]


# --- C ---


def c_complaints(root: Path) -> Iterator[str]:
    """Yield a line for each include in csrc/ that is wrong."""
    csrc = root / "csrc"
    for path in sorted(csrc.rglob("*.[ch]")):
        name = path.relative_to(root)
        if path.parent == csrc:
            if path.name not in ANYWHERE:
                yield f"{name}: lies in no layer: {', '.join(C_LAYERS)}"
            continue
        for target in INCLUDE.findall(path.read_text(encoding="utf-8")):
            yield from judge_include(csrc, path, target)


def judge_include(csrc: Path, path: Path, target: str) -> Iterator[str]:
    """Yield what is wrong with the include of *target* by the file *path*."""
    name, layer = path.relative_to(csrc.parent), path.parent.name
    folder, _, _ = target.partition("/")
    if target in ANYWHERE:
        return
    if not (csrc / target).is_file() or folder not in C_LAYERS:
        yield f'{name}: "{target}" is no header of csrc/, written folder/name.h'
    elif layer not in C_LAYERS:
        yield f"{name}: lies in no layer: {', '.join(C_LAYERS)}"
    elif C_LAYERS.index(folder) > C_LAYERS.index(layer):
        yield f'{name}: "{target}" is of a higher layer than {layer}/'


# --- Python ---


def python_complaints(root: Path) -> Iterator[str]:
    """Yield a line for each import in nbd_mirror/ that is wrong."""
    package = root / PACKAGE
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = path.relative_to(root)
        if floor(parts) is None:
            folders = ", ".join(folder for one in PYTHON_LAYERS for folder in one)
            yield f"{name}: lies in no layer: {folders}"
            continue
        for line, target in imports(path, parts):
            wrong = judge_import(parts, target)
            if wrong:
                dotted = ".".join((PACKAGE, *target))
                yield f"{name}:{line}: {dotted} {wrong}"


def floor(module: tuple[str, ...]) -> int | None:
    """Return the height of a module, given by its path in the package, or None."""
    if len(module) > 1:
        for number, folders in enumerate(PYTHON_LAYERS):
            if module[0] in folders:
                return number
        return None
    if module == (TOP,):
        return len(PYTHON_LAYERS)
    return -1 if module[0] in OUTSIDE else None


def judge_import(importer: tuple[str, ...], target: tuple[str, ...]) -> str:
    """Return what is wrong with the import of *target*, or nothing."""
    if target == (VERSION,):
        return ""
    if target[:1] == (COMPILED,):
        return "" if importer == BOUNDARY else "is volume/core/boundary.py's alone"
    here, there = floor(importer), floor((*target, "*"))
    assert here is not None
    if there is None:
        return "is not imported by its folder and name"
    if there > here:
        return f"is of a higher layer than {importer[0]}"
    if there == here and target[0] != importer[0]:
        return f"is of the layer beside {importer[0]}"
    return ""


def imports(
    path: Path, module: tuple[str, ...]
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield the line and the path in the package of each import of ours."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = [PACKAGE, *module][: -node.level] if node.level else []
            origin = [*above, *(node.module.split(".") if node.module else [])]
            # `from ..volume import config` names a module, like `from .config`.
            deep = len(origin) > 2
            names = [origin if deep else [*origin, x.name] for x in node.names]
        else:
            continue
        for name in names:
            if name[0] == PACKAGE:
                yield node.lineno, tuple(name[1:])


if __name__ == "__main__":
    wrong = complaints(ROOT)
    for line in wrong:
        print(f"lint: {line}", file=sys.stderr)
    sys.exit(1 if wrong else 0)
