# SPDX-License-Identifier: BSD-3-Clause
"""
The rows: what is measured, against what, the minimum and the goal.

Nothing else decides what is good enough. A claim without a minimum is only reported, to
be read beside the judged ones.
"""

from __future__ import annotations

from .fio_rows import activity_log, against, degraded
from .load import Workload
from .model import MIB, Claim, Row
from .node_rows import over_nodes
from .plots import plot_latency, plot_resync, plot_throughput
from .resync_rows import (
    first_sync_sparse,
    resync_full,
    resync_link,
    resync_p99,
    resync_scattered,
)
from .scale_rows import memory_16t, rate_16t, start_16t
from .tls_rows import over_tls
from .vm import run_vm

__all__ = ["ROWS", "chosen"]

QEMU = "against qemu"
TWO_COPIES = "against two copies"
ONE_COPY = "against one copy"

WRITE_1M = Workload("write", MIB, 8)
READ_1M = Workload("read", MIB, 8)
READ_4K = Workload("randread", 4096, 16)

FIO_ROWS = (
    Row(
        "write_4k_qd1",
        "4 KiB random write QD1",
        against(Workload.writes(1), "qemu"),
        (Claim("qemu", QEMU, 1.05, 1.2),),
    ),
    *(
        Row(
            f"write_4k_qd{depth}",
            f"4 KiB random write QD{depth}",
            against(Workload.writes(depth), "two_copies", "qemu"),
            (
                Claim("two_copies", TWO_COPIES, 0.8, 1.2),
                Claim("qemu", QEMU, 1.6, 2.2),
            ),
        )
        for depth in (16, 64)
    ),
    Row(
        "write_1m_qd8",
        "1 MiB sequential write QD8",
        against(WRITE_1M, "two_copies", "qemu"),
        (
            Claim("two_copies", TWO_COPIES, 0.7, 0.95),
            Claim("qemu", QEMU, 2.4, 3),
        ),
    ),
    Row(
        "flush_4k_qd16",
        "4 KiB random write QD16, a flush every 32 writes",
        against(Workload.writes(16, fsync_every=32), "qemu"),
        (Claim("qemu", QEMU, 1.3, 2),),
    ),
    Row(
        "read_4k_qd16",
        "4 KiB random read QD16",
        against(READ_4K, "one_copy"),
        (Claim("one_copy", ONE_COPY, 0.95, 1.0),),
    ),
    Row(
        "read_1m",
        "1 MiB sequential read QD8",
        against(READ_1M, "one_copy"),
        (Claim("one_copy", ONE_COPY, 0.95, 1.0),),
    ),
    Row(
        "degraded_4k_qd16",
        "4 KiB random write QD16, remote lost",
        degraded(Workload.writes(16)),
        (Claim("one_copy", ONE_COPY, 0.85, 0.95),),
    ),
    Row(
        "activity_log",
        "4 KiB random write QD16, power-safe activity log on a real disk, hot set warm",
        activity_log(Workload.writes(16)),
        (Claim("off", "against the same with it off", 0.97, 1.0),),
    ),
    Row(
        "proxy_4k_qd16",
        "4 KiB random write QD16 against one copy behind a proxy",
        against(Workload.writes(16), "proxy", "one_copy"),
        (
            Claim("proxy", "against nbdkit's nbd plugin, no mirror"),
            Claim("one_copy", ONE_COPY),
        ),
    ),
    Row(
        "transport_4k_qd16",
        "4 KiB random write QD16, the plain transport",
        against(Workload.writes(16), "libnbd"),
        (Claim("libnbd", "against libnbd's", 1.25),),
    ),
    Row(
        "tls_4k_qd16",
        "4 KiB random write QD16, a remote over TCP with TLS",
        over_tls(Workload.writes(16), "tcp"),
        (Claim("tcp", "against the same without TLS", 0.75, 0.85),),
    ),
    Row(
        "tls_1m_qd8",
        "1 MiB sequential write QD8, a remote over TCP with TLS",
        over_tls(WRITE_1M, "relay", "tcp"),
        (
            Claim("relay", "against a bare GnuTLS relay", 0.9, 1.0),
            Claim("tcp", "against the same without TLS"),
        ),
    ),
    Row(
        "nodes_4k_qd16",
        "4 KiB random write QD16, two nodes without TLS",
        over_nodes(Workload.writes(16), "tcp"),
        (Claim("tcp", "against a plain nbdkit remote", 0.95, 1.1),),
    ),
    Row(
        "nodes_tls_4k_qd16",
        "4 KiB random write QD16, two nodes with TLS",
        over_nodes(Workload.writes(16), "nodes", tls=True),
        (Claim("nodes", "against the same without TLS", 0.75, 0.85),),
    ),
    Row(
        "nodes_tls_1m_qd8",
        "1 MiB sequential write QD8, two nodes with TLS",
        over_nodes(WRITE_1M, "relay", "nodes", tls=True),
        (
            Claim("relay", "against a bare GnuTLS relay to nbdkit", 0.9, 1.0),
            Claim("nodes", "against the same without TLS"),
        ),
    ),
    Row(
        "python_door",
        "4 KiB random write QD16 through the Python door",
        against(Workload.writes(16), "qemu", "direct", ours="python"),
        (
            Claim("qemu", QEMU),
            Claim("direct", "against the direct door"),
        ),
    ),
)

RESYNC_ROWS = (
    Row(
        "resync_full",
        "Resync of an image that is dirty all over",
        resync_full,
        (
            Claim("nbdcopy", "against nbdcopy between the same servers", 0.9, 1.1),
            Claim("file", "against nbdcopy from the file itself"),
            Claim("rate", "its rate", unit="MB/s"),
        ),
    ),
    Row(
        "resync_link",
        "Resync over 50 ms round trip and 1 Gbit/s",
        resync_link,
        (Claim("share", "share of the link used", 0.8, 0.95),),
    ),
    Row(
        "resync_scattered",
        "Resync of 1 % scattered dirty",
        resync_scattered,
        (Claim("sent", "bytes sent against bytes dirty", 1.1, 1.0, lower=True),),
    ),
    Row(
        "first_sync_sparse",
        "First sync of 100 GiB that hold 1 GiB",
        first_sync_sparse,
        (
            Claim("sent", "data sent", 1.02, unit="GiB", lower=True),
            Claim("time", "time against that of the 1 GiB", None, 1.1, lower=True),
        ),
    ),
    Row(
        "resync_p99",
        "Client's p99 while resyncing against in sync, 4 KiB 70/30 read/write QD4",
        resync_p99,
        (
            Claim("p99", "p99", 3, 1.5, lower=True),
            Claim("iops", "its requests/s"),
            Claim("rate", "the resync's rate meanwhile", unit="MB/s"),
        ),
    ),
)

SCALE_ROWS = (
    Row(
        "memory_16t",
        "Memory of a 16 TiB volume, one remote, 64 KiB regions",
        memory_16t,
        (
            Claim("rss", "resident", 256, 128, unit="MiB", lower=True),
            Claim("pss", "proportional", unit="MiB", lower=True),
            Claim("logs", "resident, of it mapped logs", unit="MiB", lower=True),
            Claim("locked", "locked", unit="MiB", lower=True),
            Claim("all_dirty", "resident, all dirty", unit="MiB", lower=True),
        ),
    ),
    Row(
        "rate_16t",
        "4 KiB random write QD16 on a 16 TiB volume",
        rate_16t(Workload.writes(16)),
        (Claim("small", "against 1 GiB, same hot set", 0.95, 1.0),),
    ),
    Row(
        "start_16t",
        "Start after a clean stop",
        start_16t,
        (
            Claim("large", "16 TiB", 2, 0.3, unit="s", lower=True),
            Claim("small", "1 GiB", unit="s", lower=True),
        ),
    ),
)

VM_ROWS = (
    Row(
        "vm",
        "4 KiB random write over /dev/nbd0 in a virtual machine",
        run_vm,
        tuple(
            claim
            for depth in (1, 16)
            for claim in (
                Claim(f"qd{depth}_md", f"QD{depth} against md RAID1", 1.0),
                Claim(f"qd{depth}_drbd", f"QD{depth} against DRBD 8.4, protocol C"),
                Claim(f"qd{depth}_one_copy", f"QD{depth} {ONE_COPY}"),
                Claim(f"qd{depth}_relay", f"QD{depth} against one copy behind socat"),
            )
        ),
    ),
)

PLOTS = (
    Row("plot_latency", "Plot: latency against load", plot_latency),
    Row("plot_throughput", "Plot: throughput against block size", plot_throughput),
    Row("plot_resync", "Plot: a resync over time, with a client", plot_resync),
)

ROWS: tuple[Row, ...] = (*FIO_ROWS, *RESYNC_ROWS, *SCALE_ROWS, *VM_ROWS, *PLOTS)
GROUPS = {"plots": PLOTS}


def chosen(keys: list[str]) -> list[Row]:
    """
    Return the rows named *keys*, in the table's order; all of them if none is.

    "plots" names all plots.

    Raises:
        KeyError: there is no row of that name.
    """
    known = {row.key: (row,) for row in ROWS} | GROUPS
    wanted = [row for key in keys for row in known[key]]
    return [row for row in ROWS if not keys or row in wanted]
