/* SPDX-License-Identifier: BSD-3-Clause */

/* Histograms of what clients' requests take: what the pace of resync goes by.
 *
 * Each request is counted as disturbed if any resync copied at any time of it
 * or just before, when threads are still where the copying had put them, and as
 * quiet otherwise; so the pace, which compares the two, need not know when a
 * burst of copies began.  Writes that a remote was sent are apart from those it
 * was not: while a remote is behind both occur, take different times, and their
 * shares change as resync goes on.
 *
 * A bucket is a quarter of a power of two, so 19 % wide; the first also holds
 * what is below 1 us, the last what is above two minutes.  A count is one
 * atomic add: no lock, and nothing a request waits for.
 */

#include <stdatomic.h>
#include <stdbool.h>

#include "base/clock.h"
#include "base/latency.h"

#define FIRST_LOG 10         /* 2^10 ns */
#define AFTERMATH_NS 2000000 /* 2 ms: some slices of the scheduler */

static unsigned
bucket (uint64_t ns)
{
  unsigned log, i;

  if (ns < 1u << FIRST_LOG)
    return 0;
  log = 63 - (unsigned)__builtin_clzll (ns);
  i = (log - FIRST_LOG) * 4 + (unsigned)(ns >> (log - 2) & 3);
  return i < NBDM_LATENCY_BUCKETS ? i : NBDM_LATENCY_BUCKETS - 1;
}

void
latency_add (struct latency *latency, enum latency_kind kind, uint64_t start_ns,
             uint64_t end_ns)
{
  bool disturbed
      = atomic_load_explicit (&latency->copying, memory_order_relaxed) > 0
        || atomic_load_explicit (&latency->quiet_ns, memory_order_relaxed)
               > start_ns;

  atomic_fetch_add_explicit (
      &latency->counts[kind][disturbed][bucket (end_ns - start_ns)], 1,
      memory_order_relaxed);
}

void
latency_copying (struct latency *latency, bool copying)
{
  if (copying)
    atomic_fetch_add (&latency->copying, 1);
  else {
    atomic_store (&latency->quiet_ns, now_ns () + AFTERMATH_NS);
    atomic_fetch_sub (&latency->copying, 1);
  }
}
