# SPDX-License-Identifier: BSD-3-Clause
"""A volume as its server and the commands know it: file, engine, maps, socket."""
