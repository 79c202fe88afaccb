# SPDX-License-Identifier: BSD-3-Clause
"""
The benchmark: nbd_mirror against its peers, row by row.

`benchmarks/run` is the command. `rows` is the table of what is measured and what is
wanted of it; `fio_rows`, `resync_rows`, `scale_rows` and `plots` measure; `servers`,
`mirror`, `load` and `link` are what they measure with; `report` turns figures into
tables.
"""
