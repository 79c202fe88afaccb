# SPDX-License-Identifier: BSD-3-Clause
"""The micro-benchmarks: instructions a call."""
