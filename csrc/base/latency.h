/* SPDX-License-Identifier: BSD-3-Clause */

/* How long clients' requests take, beside resync and without it; see latency.c.
 */

#ifndef NBDM_LATENCY_H
#define NBDM_LATENCY_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "api.h"
#include "base/atomics.h"

enum latency_kind {
  LATENCY_READ = 0,
  LATENCY_LOCAL = 1,   /* a write that no remote was sent */
  LATENCY_MIRRORED = 2 /* a write that one was */
};

/* Statistics: read and written without a lock. */
struct latency {
  atomic_u64 counts[NBDM_LATENCY_KINDS][2][NBDM_LATENCY_BUCKETS];
  atomic_uint copying; /* resyncs that copy now, and do not rest */
  atomic_u64 quiet_ns; /* what begins from then on, they do not disturb */
};

/* A request of that kind was answered, which began at start_ns. */
void latency_add (struct latency *latency, enum latency_kind kind,
                  uint64_t start_ns, uint64_t end_ns);
/* A resync begins to copy, or stops. */
void latency_copying (struct latency *latency, bool copying);

#endif /* NBDM_LATENCY_H */
