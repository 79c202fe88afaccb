# SPDX-License-Identifier: BSD-3-Clause
"""
The soak: random faults against a real site, and a judgement of every block.

`scripts/soak/run` is the command. `plan` draws an episode. `field` is its site, `far` a
secondary with its `link` and `net`, and `load` has its clients. `nemesis` breaks and
repairs things with `acts` and `acts_local`. `judge` checks disks with `checker` and
`register`. `sabotage` proves that the soak would find a loss.
"""
