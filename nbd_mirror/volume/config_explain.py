# SPDX-License-Identifier: BSD-3-Clause
"""Turn pydantic's errors about a configuration into lines for its reader."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from . import config_values as values

__all__ = ["explain", "plain_line"]


def explain(
    data: Mapping[str, Any],
    error: ValidationError,
    models: Mapping[str, type[BaseModel]],
) -> Iterator[str]:
    """
    Yield a line for each mistake: the key, the value, what is allowed.

    Args:
        data: the file.
        error: what is wrong with it.
        models: by table, of which "" is the top of the file.
    """
    for item in error.errors(include_url=False):
        kind, *where = (str(item["loc"][0]), *item["loc"][1:])
        if not where:
            # A value that a node's table has is explained there.
            if kind in data or item["type"] == "missing":
                yield _explain_key(kind, data, "", models, item)
            continue
        table, prefix = data[kind], f"{kind}: "
        if isinstance(where[0], int):
            table = table[where[0]]
            name = table.get("name") if isinstance(table, dict) else None
            prefix = f'{kind} "{name}": ' if name else f"{kind} {where[0] + 1}: "
        if isinstance(where[-1], int):
            yield f"{prefix}must be a [[{kind}]] table"
        else:
            key = str(where[-1])
            yield prefix + _explain_key(key, table, kind, models, item)


def _explain_key(
    key: str,
    table: Mapping[str, Any],
    kind: str,
    models: Mapping[str, type[BaseModel]],
    item: Any,
) -> str:
    if item["type"] == "extra_forbidden":
        return _explain_unknown(key, kind, models)
    if item["type"] == "missing":
        shared = kind == "" and "node" in table and key in _keys(models["node"])
        or_there = ", here or in each [[node]] table" if shared else ""
        return f"{key}: is missing; it must be {values.RULES[key]}{or_there}"
    cause = item.get("ctx", {}).get("error")
    rule = (
        str(cause) if item["type"] == "value_error" else f"must be {values.RULES[key]}"
    )
    value = table[key]
    if isinstance(value, list | dict):
        return f"{key}: {rule}"
    return f"{key} = {_toml(value)}: {rule}"


def _explain_unknown(key: str, kind: str, models: Mapping[str, type[BaseModel]]) -> str:
    top, allowed = _keys(models[""]), _keys(models[kind])
    if kind == "node" and key in top:
        return f"{key}: must be the same on all nodes; it stands before the first table"
    near = difflib.get_close_matches(key, allowed, n=1, cutoff=0.6)
    if key == "deadline":
        near = []  # a key of a table, no misspelt local_deadline
    # A key of the top was most often put after a table.
    if near:
        return f"{key}: unknown key; did you mean {near[0]}?"
    if key in values.RULES:
        place = values.PLACES.get(key, "before the first table")
        return f"{key}: unknown key here; it stands {place}"
    return f"{key}: unknown key; allowed are {', '.join(allowed)}"


def _keys(model: type[BaseModel]) -> Collection[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _toml(value: object) -> str:
    """Write a value as in the file, shortened."""
    if isinstance(value, int) and value.bit_length() > 400:
        return "a number of over 120 digits"  # Python prints no such number
    known = isinstance(value, str | bool | int | float)
    text = json.dumps(value, ensure_ascii=False) if known else str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def plain_line(line: str) -> str:
    """Remove line breaks from quoted text, so that a line stays one line."""
    line = line if len(line) <= 500 else f"{line[:497]}..."
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in line
    )
