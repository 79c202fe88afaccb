/* SPDX-License-Identifier: BSD-3-Clause */

/* How long clients' requests take, beside resync and without it; see latency.c.
 */

#ifndef NBDM_LATENCY_H
#define NBDM_LATENCY_H

#include <stdint.h>

#include "internal.h"

#define LATENCY_KINDS 3
#define LATENCY_BUCKETS 112

enum latency_kind {
  LATENCY_READ = 0,
  LATENCY_LOCAL = 1,   /* a write that no remote was sent */
  LATENCY_MIRRORED = 2 /* a write that one was */
};

/* Statistics: read and written without a lock. */
struct latency {
  atomic_u64 counts[LATENCY_KINDS][2][LATENCY_BUCKETS];
  atomic_uint copying; /* resyncs that copy now, and do not rest */
  atomic_u64 quiet_ns; /* when the last one stopped */
};

/* A request of that kind was answered, which began at start_ns. */
void latency_add (struct latency *latency, enum latency_kind kind,
                  uint64_t start_ns, uint64_t end_ns);
/* A resync begins to copy, or stops. */
void latency_copying (struct latency *latency, bool copying);

#endif /* NBDM_LATENCY_H */
