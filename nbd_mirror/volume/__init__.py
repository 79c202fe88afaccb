# SPDX-License-Identifier: BSD-3-Clause
"""A volume as its server and the commands see it: file, engine, maps, socket."""
