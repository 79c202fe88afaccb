# SPDX-License-Identifier: BSD-3-Clause
"""The process that serves a volume: its doors, its keepers, the one control object."""
