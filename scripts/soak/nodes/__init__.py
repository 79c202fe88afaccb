# SPDX-License-Identifier: BSD-3-Clause
"""
The soak of a volume of nodes: real servers on hosts of their own, and an operator.

hosts.py has the hosts and what may happen to them, branch.py what each image must hold,
volume.py the episode, nemesis.py the faults, and sabotage.py the proof that a broken
mirror is noticed.
"""
