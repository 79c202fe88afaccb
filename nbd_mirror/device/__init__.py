# SPDX-License-Identifier: BSD-3-Clause
"""The kernel's nbd device, which makes a volume a local disk."""
