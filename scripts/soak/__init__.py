# SPDX-License-Identifier: BSD-3-Clause
"""
The soak: random faults against a real site, every block judged.

`scripts/soak/run` is the command. `plan` draws an episode; `field` is its site, `far` a
secondary with its `link` and `net`; `load` are its clients; `nemesis` breaks and mends
things by `acts` and `acts_local`; `judge` looks at disks by `checker` and `register`;
`sabotage` proves that it would find a loss.
"""
