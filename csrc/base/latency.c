/* SPDX-License-Identifier: BSD-3-Clause */

/* Histograms of the times of clients' requests: resync's pace depends on them.
 *
 * A request counts as disturbed if any resync copied during it or just before,
 * as the scheduler still shows the effect of the copying then, and else as
 * quiet.  So the pace, which compares the two, need not know when a burst of
 * copies began.  Writes that were sent to a remote are counted apart from those
 * that were not: while a remote is behind both occur, they take different
 * times, and their shares change as resync goes on.
 *
 * A bucket is a quarter of a power of two, so 19 % wide; the first also counts
 * times below 1 us, the last those above two minutes.  A count is one atomic
 * add, so no request waits for it.
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
