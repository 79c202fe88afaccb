/* SPDX-License-Identifier: BSD-3-Clause */

/* How long clients' requests take, during resync and without it; see latency.c.
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
  LATENCY_LOCAL = 1,   /* a write that was sent to no remote */
  LATENCY_MIRRORED = 2 /* a write that was sent to a remote */
};

/* Statistics: read and written without a lock. */
struct latency {
  atomic_u64 counts[NBDM_LATENCY_KINDS][2][NBDM_LATENCY_BUCKETS];
  atomic_uint copying; /* resyncs that copy now, not those that pause */
  atomic_u64 quiet_ns; /* they do not disturb requests that begin later */
};

/* Count an answered request of that kind, which began at start_ns. */
void latency_add (struct latency *latency, enum latency_kind kind,
                  uint64_t start_ns, uint64_t end_ns);
/* A resync begins or stops to copy. */
void latency_copying (struct latency *latency, bool copying);

#endif /* NBDM_LATENCY_H */
