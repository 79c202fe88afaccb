# SPDX-License-Identifier: BSD-3-Clause
"""
The benchmark: nbd_mirror against its peers, row by row.

`benchmarks/run` is the command. `rows` is the table of what is measured, with minimum
and goal. `fio_rows`, `resync_rows`, `scale_rows` and `plots` measure, using `servers`,
`mirror`, `load` and `link`. `report` turns figures into tables.
"""
