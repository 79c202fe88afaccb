# SPDX-License-Identifier: BSD-3-Clause
"""
A disk mirror over NBD that needs no kernel module.

This file imports nothing: the direct door, the Python door and the command line each
need another part, and a command should start quickly.
"""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
