# SPDX-License-Identifier: BSD-3-Clause
"""
Build the C code through CFFI: the hatchling hook, and ``python -m nbd_mirror._build``.

The shared object ``_core``, an extension module for Python, takes its declarations from
csrc/nbdm.h itself, so no second copy can differ. It is always put beside this file: an
editable install uses it there, a wheel packs it from there. A build is skipped while
the hash of its inputs is the one noted beside the last result.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import cffi
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

__all__ = ["BuildError", "CffiBuildHook", "build", "main"]

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
CSRC = ROOT / "csrc"

# initial-exec: thread-local variables come with a thread's stack. By default the C
# library allocates them when the thread first uses one, and ends the process if there
# is no memory. The room is small: tests/unit/test_build.py bounds their size.
C_FLAGS = ("-std=gnu11", "-O2", "-g", "-fPIC", "-pthread", "-ftls-model=initial-exec")
# Only for our own files: CFFI's generated code has warnings under -Wextra, and its next
# release may have others.
WARNINGS = ("-Wall", "-Wextra", "-Wshadow")
# Export only CFFI's entry points: plain names such as crc32c must not bind to another
# library in the same process.
HIDDEN = "-fvisibility=hidden"
# The log's threads run until the process ends: nothing may unload their code.
KEEP_MAPPED = ("-Wl,-z,nodelete",)

# Requirements: pkg-config's name, the well-known header, the Debian package.
LIBRARIES = (
    ("libnbd", "libnbd.h", "libnbd-dev"),
    ("libisal", "isa-l.h", "libisal-dev"),
    ("gnutls", "gnutls/gnutls.h", "libgnutls28-dev"),
)


class BuildError(Exception):
    """Something the build needs is missing, or the compiler failed."""


class Target(NamedTuple):
    """A shared object: its CFFI *module* name, *file* name and inputs."""

    module: str
    file: str
    sources: tuple[Path, ...]
    headers: tuple[Path, ...]

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Every file that the result depends on."""
        return (*self.sources, *self.headers)

    @property
    def output(self) -> Path:
        """The path of the shared object."""
        return PACKAGE / self.file


def the_target() -> Target:
    """
    Describe the shared object.

    Raises:
        BuildError: this is not a source tree.
    """
    if not (CSRC / "nbdm.h").exists():
        raise BuildError(
            f"{CSRC} holds no nbdm.h: the C sources are only in a checkout or an "
            "sdist; build there"
        )
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    sources, headers = (tuple(sorted(CSRC.rglob(end))) for end in ("*.c", "*.h"))
    return Target("nbd_mirror._core", f"_core{suffix}", sources, headers)


def compiler() -> list[str]:
    """Return the C compiler and the user's own flags, as CFFI will use them."""
    command = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    return [*shlex.split(command), *shlex.split(os.environ.get("CFLAGS", ""))]


def warning_flags() -> tuple[str, ...]:
    """Return the warning flags; warnings are errors only in CI."""
    return (*WARNINGS, "-Werror") if os.environ.get("CI") == "true" else WARNINGS


def digest(paths: tuple[Path, ...]) -> str:
    """Hash everything that a result depends on: *paths*, flags, versions."""
    facts = (
        sys.version,
        sys.base_prefix,
        cffi.__version__,
        *compiler(),
        *C_FLAGS,
        *warning_flags(),
        HIDDEN,
        os.environ.get("LDFLAGS", ""),
    )
    total = hashlib.sha256("\0".join(facts).encode())
    for path in (*paths, Path(__file__)):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"\0{path.name}\0{content}".encode())
    return total.hexdigest()


def pkg_config(option: str, name: str) -> list[str]:
    """Return pkg-config's words for *option*; raises CalledProcessError."""
    done = subprocess.run(
        ["pkg-config", option, name], check=True, capture_output=True, text=True
    )
    return done.stdout.split()


def check_prerequisites() -> None:
    """
    Check that compiler, headers and libraries are there.

    Raises:
        BuildError: names each missing thing with its Debian package.
    """
    missing: list[tuple[str, str]] = []
    if shutil.which(compiler()[0]) is None:
        missing.append((f"C compiler {compiler()[0]}", "gcc libc6-dev"))
    if shutil.which("pkg-config") is None:
        missing.append(("pkg-config", "pkg-config"))
    else:
        for name, header, package in LIBRARIES:
            try:
                pkg_config("--exists", name)
            except subprocess.CalledProcessError:
                missing.append((header, package))
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing.append((f"Python.h of {sys.base_prefix}", "python3-dev"))
    if missing:
        lines = "".join(f"\n  {what}: in Debian's {where}" for what, where in missing)
        packages = " ".join(package for _, package in missing)
        raise BuildError(
            f"the C code cannot be built, there is no{lines}\n"
            f"Install it: apt-get install {packages}"
        )


def warnings_of(out: Path) -> Path:
    """Return the file for the compiler's warnings about the object *out*."""
    return out.with_suffix(".o.warnings")


def compile_object(source: Path, headers: tuple[Path, ...], *, verbose: bool) -> Path:
    """
    Compile one of our C files, unless it and its headers are unchanged.

    The compiler's warnings are kept beside it, and shown whenever the object is used.
    """
    out = ROOT / "build" / f"{source.stem}.o"
    noted = out.with_suffix(".o.sha256")
    wanted = digest((source, *headers))
    kept = out.exists() and warnings_of(out).exists() and noted.exists()
    if kept and noted.read_text() == wanted:
        sys.stderr.write(warnings_of(out).read_text())
        return out
    noted.unlink(missing_ok=True)
    flags = [flag for name, _, _ in LIBRARIES for flag in pkg_config("--cflags", name)]
    command = [*compiler(), *C_FLAGS, *warning_flags(), HIDDEN, f"-I{CSRC}", *flags]
    command += ["-c", str(source), "-o", str(out)]
    if verbose:
        print(shlex.join(command))
    done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
    # In one write, because other files are compiled at the same time.
    sys.stderr.write(done.stderr)
    if done.returncode != 0:
        raise BuildError(f"{source.name} did not compile, see above")
    warnings_of(out).write_text(done.stderr)
    noted.write_text(wanted)
    return out


def compile_objects(target: Target, *, verbose: bool) -> list[Path]:
    """Compile the changed C files of *target*, several at a time."""

    def compile_one(source: Path) -> Path:
        return compile_object(source, target.headers, verbose=verbose)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, target.sources))


def check_warnings() -> None:
    """
    Compile every changed C file of ours, and fail on any warning.

    These are the build's own objects, so an unchanged file costs nothing here, and a
    changed one costs nothing in the next build. -Werror would find the same, but it is
    another flag, so every object would be compiled once more.

    Raises:
        BuildError: the compiler warned, now or when it made the present object.
    """
    with build_lock():
        check_prerequisites()
        objects = compile_objects(the_target(), verbose=False)
    warned = [out.stem for out in objects if warnings_of(out).read_text()]
    if warned:
        raise BuildError(f"the compiler warns, see above: {', '.join(warned)}")


def make_ffi(target: Target, objects: list[Path]) -> cffi.FFI:
    """Describe *target* to CFFI: declarations, flags, what to link."""
    ffi = cffi.FFI()
    ffi.cdef((CSRC / "nbdm.h").read_text(encoding="utf-8"))
    libraries = [x for name, _, _ in LIBRARIES for x in pkg_config("--libs", name)]
    ffi.set_source(
        target.module,
        '#include <stdint.h>\n#include "nbdm.h"\n',
        include_dirs=[str(CSRC)],
        extra_objects=[str(path) for path in objects],
        extra_compile_args=[*C_FLAGS, HIDDEN],
        extra_link_args=[*libraries, "-pthread", *KEEP_MAPPED],
    )
    return ffi


def compile_target(target: Target, *, verbose: bool) -> None:
    """
    Compile *target* and put it in place in one step.

    A running server keeps the file it has mapped: the new one is renamed over it.
    """
    objects = compile_objects(target, verbose=verbose)
    scratch = Path(tempfile.mkdtemp(prefix="cffi-", dir=ROOT / "build"))
    try:
        made = make_ffi(target, objects).compile(
            tmpdir=str(scratch), target=target.file, verbose=verbose
        )
        staged = target.output.with_name(f".{target.file}.new")
        shutil.copy(made, staged)
        staged.replace(target.output)
    except cffi.VerificationError as error:
        raise BuildError(f"{target.file} was not built, see above: {error}") from error
    finally:
        shutil.rmtree(scratch)


@contextmanager
def build_lock() -> Iterator[None]:
    """Allow one build at a time in the source tree."""
    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(*, force: bool = False, verbose: bool = False) -> Path:
    """
    Bring the shared object up to date.

    Blocks while the compiler runs, about ten seconds.

    Args:
        force: also build what has not changed.
        verbose: show the compiler's command lines.

    Returns:
        The shared object, built now or before.

    Raises:
        BuildError: something is missing or did not compile.
    """
    with build_lock():
        target = the_target()
        noted = ROOT / "build" / f"{target.file}.sha256"
        wanted = digest(target.inputs)
        current = target.output.exists() and noted.exists()
        if force or not current or noted.read_text() != wanted:
            check_prerequisites()
            noted.unlink(missing_ok=True)
            compile_target(target, verbose=verbose)
            noted.write_text(wanted)
    return target.output


class CffiBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """hatchling calls this before it packs a wheel, editable or not."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build, and tell hatchling to pack the result, tied to this Python."""
        try:
            output = build(verbose=self.app.verbosity > 0)
        except BuildError as error:
            # SystemExit puts the message at the end of pip's output; a traceback would
            # hide it.
            sys.exit(f"nbd_mirror: {error}")
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        if version != "editable":
            # It is in .gitignore, which hatchling otherwise obeys.
            build_data["artifacts"].append(str(output.relative_to(ROOT)))


def main(arguments: list[str]) -> int:
    """
    Rebuild in place; ``--force`` and ``--verbose`` as in build().

    With ``--warnings`` only the objects are made, and a warning is an error.
    """
    unknown = set(arguments) - {"--force", "--verbose", "--warnings"}
    if unknown:
        usage = "[--force] [--verbose] | --warnings"
        print(f"usage: python -m nbd_mirror._build {usage}, not {unknown}")
        return 2
    try:
        if "--warnings" in arguments:
            check_warnings()
            return 0
        build(force="--force" in arguments, verbose="--verbose" in arguments)
    except BuildError as error:
        print(f"nbd_mirror: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
