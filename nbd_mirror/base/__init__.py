# SPDX-License-Identifier: BSD-3-Clause
"""What every layer uses: errors, units, files, threads, other programs."""
