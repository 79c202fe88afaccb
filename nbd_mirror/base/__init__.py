# SPDX-License-Identifier: BSD-3-Clause
"""Modules that every layer uses: errors, units, files, threads, other programs."""
