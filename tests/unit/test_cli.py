# SPDX-License-Identifier: BSD-3-Clause
"""
The command line, as a user meets it: lines, exit codes, and no traceback ever.

Each command is run in its own process, and no server answers it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import support
from support import ROOT
from unit.command_line import nbd_mirror
from unit.volumes import make_file

from nbd_mirror.base.errors import (
    EXIT_CODES,
    AccessError,
    ConfigError,
    ExistsError,
    FormatError,
    MissingError,
    NotRunningError,
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Give the path of a volume's file; its state directory exists."""
    return make_file(tmp_path)


# --- errors and exit codes ---


def test_help_documents_every_exit_code() -> None:
    """The epilog is the table of errors.py."""
    said = nbd_mirror("--help")
    assert said.returncode == 0
    for code, meaning in EXIT_CODES.items():
        assert f"{code:<4} {meaning}" in said.stdout


def test_version_is_printed() -> None:
    """--version prints one line."""
    assert nbd_mirror("--version").stdout.startswith("nbd-mirror 0.")


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["nonsense"], 2),
        (["wait", "x", "--for", "nonsense"], 2),
        (["wait", "FILE", "--for", "in_sync", "--timeout", "soon"], 2),
        (["wait", "FILE", "--for", "paused", "--remote", "local", "--timeout", "0"], 2),
        (["status", "/nonexistent/x.toml"], MissingError.exit_code),
        (["create", "FILE"], MissingError.exit_code),
        (["serve", "FILE"], MissingError.exit_code),
        (["create", "FILE", "--assume-in-sync", "x"], ConfigError.exit_code),
        (["stop", "FILE"], NotRunningError.exit_code),
        (["pause", "FILE"], NotRunningError.exit_code),
        (["invalidate", "FILE", "dr"], NotRunningError.exit_code),
        (["invalidate", "FILE", "rd"], ConfigError.exit_code),
        (["invalidate", "FILE", "local"], NotRunningError.exit_code),
        (["resume", "FILE", "local"], NotRunningError.exit_code),
        (["pause", "FILE", "local"], ConfigError.exit_code),
        (["inspect", "FILE"], MissingError.exit_code),
        (
            ["detach", "/dev/sda"],
            (AccessError if os.geteuid() else MissingError).exit_code,
        ),
    ],
)
def test_mistake_gets_its_exit_code_and_no_traceback(
    file: Path, args: list[str], code: int
) -> None:
    """Each mistake ends with the documented code and words on standard error."""
    done = nbd_mirror(*[str(file) if arg == "FILE" else arg for arg in args])
    assert (code, "") == (done.returncode, done.stdout)
    assert done.stderr


def test_error_is_one_line_and_a_hint_with_the_users_name_for_it(file: Path) -> None:
    """The hint can be pasted."""
    done = nbd_mirror("stop", file)
    assert done.stderr == (
        "nbd-mirror: no server answers for this volume\n"
        f"  try: nbd-mirror serve {file}\n"
    )


@pytest.mark.parametrize(
    "name", [b"my CONFIG's $HOME", b"\xff caf\xc3\xa9", b"two\nlines' \x1b[1m"]
)
def test_hints_can_be_pasted(tmp_path: Path, name: bytes) -> None:
    """Whatever the paths are, a shell runs each command as it stands."""
    folder = tmp_path / os.fsdecode(name)
    # A file names no such path itself: TOML is UTF-8.
    folder.mkdir()
    file = make_file(tmp_path).rename(folder / "v.toml")
    (tmp_path / "st").rename(folder / "st").chmod(0o777)

    def paste(code: int, *options: str) -> str:
        done = nbd_mirror("create", file, *options)
        assert code == done.returncode, done.stderr
        command = done.stderr.partition("  try: ")[2].splitlines()[0].split(" (")[0]
        subprocess.run(
            ["/bin/bash", "-c", command],
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"},
            check=True,
            timeout=60,
            capture_output=True,
        )
        return command

    assert "truncate" in paste(MissingError.exit_code)
    assert "chmod" in paste(AccessError.exit_code)
    assert nbd_mirror("create", file).returncode == 0
    assert "--force" in paste(ExistsError.exit_code)
    assert "--assume-in-sync dr --force" in paste(
        ExistsError.exit_code, "--assume-in-sync", "dr"
    )
    assert "assumed" in nbd_mirror("status", file).stdout


def test_current_folder_that_was_removed_is_said(file: Path, tmp_path: Path) -> None:
    """A relative path leads nowhere from there; an absolute one works as before."""
    gone = tmp_path / "gone"
    script = 'mkdir "$0" && cd "$0" && rmdir "$0" && exec "$@"'
    for config, code in (("v.toml", 4), (str(file), NotRunningError.exit_code)):
        command = [sys.executable, "-m", "nbd_mirror", "stop", config]
        done = subprocess.run(
            ["sh", "-c", script, gone, *command],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, done.stderr


def test_traceback_is_shown_only_when_asked_for(file: Path) -> None:
    """NBD_MIRROR_DEBUG=1 adds it, the code stays."""
    done = nbd_mirror("stop", file, NBD_MIRROR_DEBUG="1")
    assert done.returncode == NotRunningError.exit_code


def test_config_mistakes_get_a_line_each(file: Path) -> None:
    """Several mistakes, several lines, each with the program's name."""
    file.write_text(file.read_text().replace('"1MiB"', '"x"').replace('"v"', '"/"', 1))
    done = nbd_mirror("status", file)
    assert done.returncode == ConfigError.exit_code
    lines = done.stderr.splitlines()
    assert [True, True] == [line.startswith("nbd-mirror: v.toml: ") for line in lines]


def test_wait_interrupted_ends_with_130(file: Path) -> None:
    """Ctrl-C is no error of ours, and has its own code."""
    process = subprocess.Popen(
        [sys.executable, "-m", "nbd_mirror", "wait", file, "--for", "in_sync"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    with process.stderr:
        assert "no server answers yet" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert "Traceback" not in process.stderr.read()


# --- create ---


def test_create_in_a_folder_with_other_files_is_refused(file: Path) -> None:
    """`state = "/etc"` must not fill /etc with logs."""
    (file.parent / "d.img").write_bytes(bytes(1 << 20))
    (file.parent / "st" / "passwd").touch()
    done = nbd_mirror("create", file)
    assert done.returncode == 6
    assert "other files, such as passwd" in done.stderr


def test_create_over_another_volumes_state_is_refused_even_by_force(file: Path) -> None:
    """A wrong `state` must not cost another volume its logs."""
    (file.parent / "d.img").write_bytes(bytes(1 << 20))
    (file.parent / "st").rmdir()
    assert nbd_mirror("create", file).returncode == 0
    other = file.with_name("other.toml")
    other.write_text(file.read_text().replace('name="v"', 'name="other"', 1))
    for words in (["create", other, "--force"], ["inspect", other]):
        done = nbd_mirror(*words)
        assert done.returncode == FormatError.exit_code
        assert "is the state of volume v, not of other" in done.stderr


def test_output_nobody_reads_to_the_end_is_no_error(file: Path) -> None:
    """`status | head -1` is how people use it."""
    (file.parent / "d.img").write_bytes(bytes(1 << 20))
    (file.parent / "st").rmdir()
    nbd_mirror("create", file)
    words = [sys.executable, "-m", "nbd_mirror", "inspect", str(file)]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert done.returncode == 0
    assert done.stderr == b""


def test_create_with_a_local_disk_too_small_tells_both_sizes(file: Path) -> None:
    """The message has the size that is there and the size that is needed."""
    (file.parent / "d.img").write_bytes(bytes(5000))
    done = nbd_mirror("create", file)
    assert done.returncode == ConfigError.exit_code
    assert "has 5000 bytes, the volume needs 1048576" in done.stderr


# --- Ctrl-C ---

# Interrupts the process as it imports a module, as a user may who is quick.
QUICK = """
import os, runpy, signal, sys

class Interrupts:
    def find_spec(self, name, *_):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)

module, how, what = sys.argv[1:4]
sys.argv[1:4] = []
sys.meta_path.insert(0, Interrupts())
if how == "module":
    runpy.run_module(what, run_name="__main__", alter_sys=True)
else:
    runpy.run_path(what, run_name="__main__")
"""
SCRIPT = Path(sys.executable).parent / "nbd-mirror"


@pytest.mark.parametrize(
    ("how", "what", "module"),
    [
        ("module", "nbd_mirror", "nbd_mirror.commands.cli"),
        ("module", "nbd_mirror", "nbd_mirror.volume.config"),
        ("script", str(SCRIPT), "typer"),
        ("script", str(SCRIPT), "nbd_mirror.volume.config"),
        ("module", "nbd_mirror.server", "nbd_mirror.server.volume"),
        ("module", "nbd_mirror.server", "nbd_mirror._core"),
    ],
)
def test_interrupt_over_the_imports_is_no_traceback(
    file: Path, how: str, what: str, module: str
) -> None:
    """The exit code of an interrupt, and not a word."""
    support.requires(how == "module" or SCRIPT.exists(), "nbd-mirror is not installed")
    done = subprocess.run(
        [sys.executable, "-c", QUICK, module, how, what, str(file)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    # A server ends by the signal itself; a shell shows 130 of it too.
    code = -signal.SIGINT if what == "nbd_mirror.server" else 130
    assert (code, "", "") == (done.returncode, done.stdout, done.stderr)


def test_interrupts_that_are_ignored_stay_so(file: Path) -> None:
    """As of a command in the background of a script."""
    script = f'trap \'\' INT; exec {sys.executable} -c "$0" "$@"'
    words = ["nbd_mirror.volume.config", "module", "nbd_mirror", "status", str(file)]
    done = subprocess.run(
        ["/bin/sh", "-c", script, QUICK, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == MissingError.exit_code, done.stderr


def test_second_interrupt_over_the_last_words_is_no_traceback(file: Path) -> None:
    """A reader of the output that takes nothing keeps the command's end."""
    script = (
        "import nbd_mirror.commands.cli as cli, os, signal\n"
        "def words():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "cli.finish_output = words\n"
        "cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "status", str(file)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
