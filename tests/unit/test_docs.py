# SPDX-License-Identifier: BSD-3-Clause
"""
The documents say what the code does, in both directions.

What a document lists (commands, options, keys, codes, states, byte offsets) is read
out of its tables and headings and compared with the code's own list: neither may
have one more.  Examples are taken as a user would: configurations are loaded,
command lines parsed.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import typer.main
from e2e.lib.node_points import CONTROL_POINTS
from support import ROOT
from unit.pages import (
    BLOCK,
    DESIGN,
    FORMAT,
    MANUAL,
    PAGES,
    README,
    UNITS,
    blocks,
    by_name,
    code_names,
    rows,
    section,
)

from nbd_mirror.base import errors
from nbd_mirror.base.errors import EXIT_CODES
from nbd_mirror.base.hints import ASKED_VARIABLE
from nbd_mirror.base.units import parse_duration, parse_size
from nbd_mirror.commands.cli import app
from nbd_mirror.commands.create import create_volume
from nbd_mirror.rules.state import RemoteState
from nbd_mirror.server.node_role import GRANT_VARIABLE, HAND_OVER_VARIABLE
from nbd_mirror.volume import config as config_module
from nbd_mirror.volume import core
from nbd_mirror.volume.answers import Answer, Flag, Unit
from nbd_mirror.volume.config_hooks import HooksConfig
from nbd_mirror.volume.config_tables import NodeConfig, RemoteConfig, TlsConfig
from nbd_mirror.volume.status import (
    Local,
    NodeStatus,
    OtherNode,
    Persists,
    Promotable,
    Remote,
    Resync,
    Status,
)

LAYOUT = ROOT / "csrc" / "logs" / "layout.h"
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")

# --- the command line ----------------------------------------------------


def commands() -> dict[str, Any]:
    """Return the commands there are, by name."""
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def options_of(command: Any) -> set[str]:
    """Return a command's own options, without the one of every command with CONFIG."""
    own = [one for one in command.params if one is not common_option(command)]
    return {word for one in own for word in one.opts if word[:2] == "--"}


def common_option(command: Any) -> Any:
    """Return a command's `--node NODE`, or None."""
    options = [one for one in command.params if one.param_type_name == "option"]
    found = [one for one in options if one.metavar == "NODE" and one.opts == ["--node"]]
    return found[0] if found else None


def arguments_of(command: Any) -> list[str]:
    """Return a command's arguments as help names them, [in brackets] if optional."""
    found = [one for one in command.params if one.param_type_name == "argument"]
    return [one.metavar if one.required else f"[{one.metavar}]" for one in found]


def synopses() -> dict[str, str]:
    """Return the manual's SYNOPSIS: a line for each command."""
    lines = section(MANUAL, "SYNOPSIS").split("\n")
    found = [re.match(r" +(nbd-mirror ([a-z-]+) .*)", line) for line in lines]
    return {match[2]: match[1] for match in found if match}


def test_manual_synopsis_lists_every_command() -> None:
    """The SYNOPSIS has each command with its arguments and options, and no other."""
    assert set(commands()) == set(synopses())
    for name, line in synopses().items():
        command = commands()[name]
        assert options_of(command) == set(OPTION.findall(line)), line
        assert " ".join(["nbd-mirror", name, *arguments_of(command)]) in line


def test_manual_commands_have_a_section_each() -> None:
    """Below COMMANDS each command has its heading, its synopsis and its options."""
    text = section(MANUAL, "COMMANDS")
    headings = re.findall(r"^### nbd-mirror ([\w-]+)$", text, re.MULTILINE)
    assert list(commands()) == headings
    for name in headings:
        body = section(MANUAL, f"nbd-mirror {name}")
        assert synopses()[name] == body.strip().splitlines()[0].strip()
        items = re.findall(r"^- `(--[a-z-]+)", body, re.MULTILINE)
        assert sorted(options_of(commands()[name])) == sorted(items)


def test_every_command_of_a_volume_takes_the_node() -> None:
    """The manual says once that each command with CONFIG has this option."""
    for name, command in commands().items():
        takes = any("CONFIG" in one for one in arguments_of(command))
        assert takes == (common_option(command) is not None), name
        assert not takes or common_option(command).opts == ["--node"]
    assert "`--node NODE`" in section(MANUAL, "SYNOPSIS")


def examples() -> list[tuple[str, list[str]]]:
    """Return every command line of nbd-mirror in shell blocks and unit files."""
    texts = [(page.name, text) for page in PAGES for text in blocks(page, "sh")]
    texts += [(page.name, text) for page in PAGES for text in blocks(page, "ini")]
    texts += [(unit.name, unit.read_text()) for unit in UNITS]
    found = []
    for name, text in texts:
        for line in text.splitlines():
            # In a unit also the lines that stand ready behind a "#".
            match = re.match(r"(?:sudo |#?Exec\w+=-?[\w/]*/)?nbd-mirror (.+)", line)
            if match:
                words = shlex.split(match[1].split(" | ")[0], comments=True)
                found.append((name, words))
    return found


def test_readme_fits_on_four_screens() -> None:
    """A reader sees what it is and how to use it; the tables are in the manual."""
    assert len(README.read_text().splitlines()) <= 4 * 50


def test_examples_are_valid_command_lines() -> None:
    """Every nbd-mirror line a reader may type, or systemd runs, is understood."""
    found = examples()
    assert {"README.md", "manual.md", "nbd-mirror@.service"} <= {n for n, _ in found}
    for where, (name, *words) in found:
        assert name in commands(), f"{where}: nbd-mirror {name}"
        commands()[name].make_context(name, list(words))  # raises on a mistake


# --- configuration -------------------------------------------------------


REQUIRED = "required"


def keys() -> dict[str, object]:
    """Return every key there is with its default; REQUIRED: it has none."""
    found: dict[str, object] = {}
    for prefix, model in (
        ("", config_module.VolumeConfig),
        ("remote.", RemoteConfig),
        ("node.", NodeConfig),
        ("tls.", TlsConfig),
        ("hooks.", HooksConfig),
    ):
        for name, field in model.model_fields.items():
            key = prefix + (field.alias or name)
            found[key] = REQUIRED if field.is_required() else field.default
    return found


def value_of(key: str, text: str) -> object:
    """Read a default as it stands in a table."""
    value = text.strip('"')
    if key == "region_size":
        return parse_size(value)
    if value == "off":
        return 0.0
    return value if key in ("policy", "fenced_reads") else parse_duration(value)


def test_configuration_table_has_every_key_and_default() -> None:
    """The keys and defaults are those of config.py."""
    found = rows(section(MANUAL, "CONFIGURATION"))
    table = {key: one[1] for one in found for key in code_names(one[0])}
    assert set(keys()) == set(table)
    for key, default in keys().items():
        if default in (REQUIRED, None, (), HooksConfig()):
            assert table[key] == (REQUIRED if default == REQUIRED else "none"), key
        else:
            assert default == value_of(key, code_names(table[key])[0]), key


@pytest.mark.parametrize("page", [README, MANUAL], ids=by_name)
def test_example_configurations_load(page: Path, tmp_path: Path) -> None:
    """Each TOML block is a configuration that is taken as it stands."""
    found = blocks(page, "toml")
    assert found
    for text in found:
        file = tmp_path / "v.toml"
        file.write_text(text)
        # A volume with nodes is one of this host, which is not alpha.
        config_module.load(file, "alpha" if "[[node]]" in text else None)


# --- codes, states, status, files ----------------------------------------


def test_exit_status_table_is_the_real_one() -> None:
    """The table has every code with its meaning."""
    table = rows(section(MANUAL, "EXIT STATUS"))
    assert EXIT_CODES == {int(code): what for code, what in table}


def test_states_are_all_explained() -> None:
    """The manual has a section for each state, README a row, design.md the table."""
    states = {state.value for state in RemoteState}
    headings = re.findall(r"^### (\w+)$", section(MANUAL, "STATES"), re.MULTILINE)
    assert states | {"stopped", "no_answer"} == set(headings)
    told = rows(section(README, "When something fails"))
    assert states == {code_names(cells[0])[0] for cells in told}
    table = rows(section(DESIGN, "States of a remote"))
    assert states == {name for cells in table for name in code_names(cells[0])}


def kind(annotation: Any) -> str:
    """Say what the values of a model's field are."""
    if get_origin(annotation) is tuple:
        return "array"
    first, *others = get_args(annotation) or [annotation]
    if NoneType in others:
        return f"{kind(first)}, or null"
    units = [one.words for one in others if isinstance(one, Unit)]
    return units[-1] if units else "object"


@pytest.mark.parametrize(
    ("title", "model"),
    [
        ("The volume", Status),
        ("Its `local`", Local),
        ("Each of `remotes`", Remote),
        ("A `resync`", Resync),
        ("Its `persists`", Persists),
        ("Its `node`", NodeStatus),
        ("Each of its `peers`", OtherNode),
        ("Its `promotable`", Promotable),
    ],
)
def test_status_json_tables_are_the_models(title: str, model: type[Answer]) -> None:
    """The manual lists each key of the JSON in its order, as the model has it."""
    hints = get_type_hints(model, include_extras=True)
    if model is Status:  # left out where they would be null
        hints |= {"clean_stop": Flag, "node": NodeStatus}
    expected = [
        [f"`{name}`", kind(hints[name]), field.description]
        for name, field in model.model_fields.items()
    ]
    assert expected == list(rows(section(MANUAL, title)))


def test_files_of_a_new_volume_are_documented(tmp_path: Path) -> None:
    """Whatever create leaves in the state directory stands under FILES."""
    (tmp_path / "v.img").write_bytes(bytes(1 << 20))
    file = tmp_path / "v.toml"
    file.write_text(
        'name = "v"\nsize = "adopt"\nlocal = "v.img"\nstate = "state"\n'
        'listen = "unix:/run/v.sock"\n'
        '[[remote]]\nname = "REMOTE"\nuri = "nbd://localhost"\n'
    )
    create_volume(config_module.load(file), [], force=False)
    listed = set(code_names(section(MANUAL, "FILES")))
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "state").iterdir()}
    assert {f"/{name}" for name in sizes} <= listed
    logs = {code_names(one[0])[0]: one[1] for one in rows(section(FORMAT, "Files"))}
    for name in sizes.keys() - {"lock", "dirty.REMOTE", "dirty.local"}:
        assert sum(_product(part) for part in logs[name].split("+")) == sizes[name]


def _product(text: str) -> int:
    """Return what "17 \N{MULTIPLICATION SIGN} 512" comes to."""
    return math.prod(map(int, text.split("\N{MULTIPLICATION SIGN}")))


def test_unit_does_not_restart_what_another_try_does_not_mend() -> None:
    """Each error that stays until an operator acts keeps systemd from trying again."""
    (unit,) = (one for one in UNITS if one.name == "nbd-mirror@.service")
    found = re.search(r"^RestartPreventExitStatus=(.*)$", unit.read_text(), re.M)
    assert found
    lasting = {
        errors.ConfigError,
        errors.MissingError,
        errors.BusyError,
        errors.FormatError,
        errors.UnsupportedError,
        errors.AccessError,
        errors.WrongDiskError,
    }
    usage = 2
    assert {int(code) for code in found[1].split()} == {
        usage,
        *(cls.exit_code for cls in lasting),
    }


def test_environment_variables_are_documented() -> None:
    """The manual lists every variable a user can set, and no other."""
    listed = {code_names(one[0])[0] for one in rows(section(MANUAL, "ENVIRONMENT"))}
    sources = [*(ROOT / "nbd_mirror").rglob("*.py"), *(ROOT / "csrc").rglob("*.c")]
    text = "\n".join(path.read_text() for path in sources)
    used = set(re.findall(r"\b(?:NBD_MIRROR_[A-Z_]+[A-Z]|NBDM_FAULT)\b", text))
    # Set by `serve` for the door it starts, never by a user.
    ours = {"NBD_MIRROR_DOOR", config_module.CHOICE_VARIABLE, ASKED_VARIABLE}
    # A server sets them for itself, as it changes its role.
    ours |= {GRANT_VARIABLE, HAND_OVER_VARIABLE}
    # A server sets them for a hook, which is another program.
    text = (ROOT / "nbd_mirror" / "server" / "node_hooks.py").read_text()
    hooks = set(re.findall(r'"(NBD_MIRROR_[A-Z_]+)":', text))
    told = {code_names(one[0])[0] for one in rows(section(MANUAL, "Hooks"))}
    assert hooks == {name for name in told if name.startswith("NBD_MIRROR_")}
    assert used - ours - (hooks - {"NBD_MIRROR_NODE"}) == listed


# --- the bytes on disk ---------------------------------------------------


def layout_fields() -> dict[str, list[str]]:
    """Return the fields of every struct in layout.h."""
    text = re.sub(r"/\*.*?\*/", "", LAYOUT.read_text(), flags=re.DOTALL)
    found = {}
    for name, body in re.findall(r"^struct (\w+) \{(.*?)^\};", text, re.M | re.S):
        fields = re.findall(r"(\w+)(?:\[[^;]*\])?;", body)
        found[name] = fields
    return found


def compiled(expressions: list[str], folder: Path) -> list[int]:
    """Return the values of C *expressions* that layout.h gives a meaning."""
    lines = "".join(f'  printf ("%llu\\n", F ({one}));\n' for one in expressions)
    source = folder / "layout.c"
    source.write_text(
        '#include <stdio.h>\n#include "logs/layout.h"\n'
        "#define F(x) ((unsigned long long) (x))\n"
        f"int main (void)\n{{\n{lines}  return 0;\n}}\n"
    )
    program = folder / "layout"
    subprocess.run(["cc", "-I", ROOT / "csrc", "-o", program, source], check=True)
    done = subprocess.run([program], check=True, capture_output=True, text=True)
    return [int(word) for word in done.stdout.split()]


def test_format_structs_are_those_of_layout_h(tmp_path: Path) -> None:
    """Every field of every struct stands in FORMAT.md at its offset, with its size."""
    heads = re.findall(r"^### struct (\w+): (\d+) bytes$", FORMAT.read_text(), re.M)
    fields = layout_fields()
    assert set(fields) == {name for name, _ in heads}
    for name, size in heads:
        table = list(rows(section(FORMAT, f"struct {name}: {size} bytes")))
        assert fields[name] == [code_names(cells[2])[0] for cells in table]
        wanted = [f"sizeof (struct {name})"]
        for field in fields[name]:
            wanted.append(f"offsetof (struct {name}, {field})")
            wanted.append(f"sizeof (((struct {name} *)0)->{field})")
        numbers = [int(size)]
        for cells in table:
            numbers += [int(cells[0]), int(cells[1])]
        assert compiled(wanted, tmp_path) == numbers, name


def test_format_constants_are_those_of_layout_h(tmp_path: Path) -> None:
    """Every constant and magic of layout.h stands in FORMAT.md with its value."""
    text = LAYOUT.read_text()
    table = {
        code_names(one[0])[0]: one[1] for one in rows(section(FORMAT, "Constants"))
    }
    defined = set(re.findall(r"^#define (\w+)[\s\\]+(?:\d|NBDM_)", text, re.M))
    enum = re.search(r"enum dirty_map_index \{(.*?)\};", text, re.S)
    assert enum
    defined |= set(re.findall(r"^ +([A-Z]\w+),?", enum[1], re.M))
    assert defined == set(table)
    names = sorted(table)
    assert compiled(names, tmp_path) == [int(table[name]) for name in names]
    for magic in re.findall(r'_MAGIC "(\w{8})"', text):
        assert f"`{magic}`" in FORMAT.read_text()


# --- what the pages point at ---------------------------------------------


def anchors(page: Path) -> set[str]:
    """Return the anchors a page's headings have."""
    heads = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.M)
    kept = [re.sub(r"[^\w\- ]", "", head.lower()) for head in heads]
    return {head.replace(" ", "-") for head in kept}


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_links_resolve(page: Path) -> None:
    """Every link inside the project leads to a file, and to a heading in it."""
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_relative_to(ROOT), target
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", [*PAGES, *UNITS], ids=by_name)
def test_no_path_of_one_machine(page: Path) -> None:
    """No document names a path that exists on the machine it was written on alone."""
    found = re.findall(r"(?<![\w.])/(?:work|tmp|home|root)\b\S*", page.read_text())
    assert not found
    assert "../shared" not in page.read_text()


def test_readme_names_the_two_commands() -> None:
    """README's two commands stand in it and can be run."""
    text = section(README, "Two commands")
    for name in ("scripts/demo", "scripts/demo-failover", "scripts/test"):
        assert name in text
        assert os.access(ROOT / name, os.X_OK), name
    for name in re.findall(r"\b(?:scripts|benchmarks)/(?:\w+)\b", README.read_text()):
        assert (ROOT / name).exists() or name == "benchmarks/results", name


@pytest.mark.parametrize(
    "name",
    [
        "benchmarks/run",
        "scripts/demo",
        "scripts/demo-failover",
        "scripts/setup",
        "scripts/soak/run",
        "scripts/test",
    ],
)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_of_a_script_installs_nothing(
    name: str, option: str, tmp_path: Path
) -> None:
    """It is printed where there is nothing to set up, and no program but sed's."""
    script = tmp_path / name
    script.parent.mkdir(parents=True)
    shutil.copy(ROOT / name, script)
    before = list(tmp_path.rglob("*"))
    done = subprocess.run(
        ["/bin/bash", script, option],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (0, "") == (done.returncode, done.stderr)
    assert done.stdout.startswith(f"usage: {name}")
    assert "set -euo" not in done.stdout
    assert before == list(tmp_path.rglob("*"))


@pytest.mark.parametrize("name", ["benchmarks/run", "scripts/soak/run"])
def test_help_after_a_setup_lists_the_options_without_another(
    name: str, tmp_path: Path
) -> None:
    """The program prints them, which scripts/setup has made able to run."""
    script, python = tmp_path / name, tmp_path / ".venv" / "bin" / "python"
    for path in (script, python):
        path.parent.mkdir(parents=True)
    shutil.copy(ROOT / name, script)
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["/bin/bash", script, "--help"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (0, "") == (done.returncode, done.stderr)
    assert done.stdout.startswith("-P -m ")
    assert done.stdout.endswith(" --help\n")


def source_text() -> str:
    """Return all C and Python sources in one text."""
    files = [*(ROOT / "csrc").rglob("*.[ch]"), *(ROOT / "nbd_mirror").rglob("*.py")]
    return "\n".join(path.read_text() for path in files)


def test_design_names_what_exists() -> None:
    """Functions and files that design.md names are there, in the file it names."""
    text, sources = DESIGN.read_text(), source_text()
    for name in re.findall(r"`(\w+) \(\)`", text):
        assert re.search(rf"\b{name} \(", sources), name
    for path in re.findall(r"\b(?:csrc|nbd_mirror|tests)/[\w/]+\.(?:py|[ch])\b", text):
        assert (ROOT / path).exists(), path
    diagram = section(DESIGN, "Parts")
    for name in re.findall(r"(?<![\w/])(\w+\.(?:c|py))\b", diagram):
        folders = (ROOT / "csrc", ROOT / "nbd_mirror")
        assert any(any(folder.rglob(name)) for folder in folders), name


def test_fault_points_in_the_source_are_those_of_the_table() -> None:
    """No point is passed that cannot be asked for, none listed that is not passed."""
    sources = source_text()
    looked_at: set[str] = set()
    ignored: set[str] = set()
    for before, name in re.findall(r'(.*)fault_point \("(\w+)"\)', sources):
        (looked_at if before.strip() else ignored).add(name)
    ignored |= CONTROL_POINTS
    fails = core.fault_points()
    assert looked_at == {name for name, may_fail in fails.items() if may_fail}
    assert ignored == {name for name, may_fail in fails.items() if not may_fail}


def test_design_lists_every_fault_point() -> None:
    """The fault points, and which can fail, are those the engine has."""
    *groups, (_, failing) = rows(section(DESIGN, "Fault points"))
    listed = [name for _, names in groups for name in code_names(names)]
    fails = core.fault_points()
    assert listed == list(fails)
    assert code_names(failing) == [name for name in fails if fails[name]]


def test_documents_say_their_licence() -> None:
    """Every document begins with an SPDX line."""
    for page in [*PAGES, *UNITS]:
        first = page.read_text().splitlines()[0]
        assert "SPDX-License-Identifier: BSD-3-Clause" in first, page.name


def test_testing_names_tests_that_are_there() -> None:
    """Every test that testing.md calls a proof exists."""
    text = (ROOT / "docs" / "testing.md").read_text()
    named = set(re.findall(r"`(tests/[\w/.]+)`", text))
    assert len(named) > 20
    assert [one for one in sorted(named) if not (ROOT / one).is_file()] == []
