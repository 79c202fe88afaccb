# SPDX-License-Identifier: BSD-3-Clause
"""What a forced promotion may lose: as much as the node can know, and no more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from unit.test_config_nodes import GOOD
from unit.test_node_engine import node_params, opened
from unit.test_node_lies import Victim

from nbd_mirror.rules.node_side import Crash
from nbd_mirror.rules.promotion import Answer, Verdict
from nbd_mirror.server.node_status import Facts, node_status
from nbd_mirror.volume.config import load

FORCE = Verdict(Answer.FORCE, "another node may have gone on alone")


def test_what_may_be_lost(tmp_path: Path) -> None:
    """A number only if a node counted it, and then as the least; else a time."""
    (tmp_path / "v.toml").write_text(GOOD)
    config = load(tmp_path / "v.toml", "alpha")
    folder = tmp_path / "v"
    folder.mkdir()
    with opened(node_params(folder)) as engine:
        node = Victim(engine)

        def lost() -> str:
            return node_status(
                Facts(
                    config,
                    node.local,
                    node.others,
                    ("", ""),
                    lambda: FORCE,
                    lambda _: ("", ""),
                    1_700_000_000.0,
                )
            ).promotable.lost

        assert lost().startswith("all that another node holds")
        node.local.change(
            lambda record: replace(
                record,
                lineage=replace(record.lineage, generation=9),
                peers=tuple(replace(one, met=1_600_000_000) for one in record.peers),
            )
        )
        unknown = "unknown: at most what another node has answered alone since 2020-09"
        assert lost().startswith(unknown)
        node.others.saw(replace(node.side(), dirty=3))
        node.others.left("beta")
        size = node.engine.status().region_size * 3 // 1024
        assert lost().startswith(f"at least the writes in 3 regions ({size}KiB); ")
        assert unknown in lost()
        node.others.adopted("beta")
        node.local.change(lambda record: replace(record, crash=Crash.HOST))
        assert lost().startswith(unknown)
        assert "what was not flushed when its host went down" in lost()
