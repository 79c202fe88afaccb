# SPDX-License-Identifier: BSD-3-Clause
"""Pure rules: facts go in, decisions come out, without I/O, clock or thread."""
