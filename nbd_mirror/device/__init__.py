# SPDX-License-Identifier: BSD-3-Clause
"""The kernel's nbd device, by which a volume is a local disk."""
