/* SPDX-License-Identifier: BSD-3-Clause */

/* The clock that deadlines and times are of: CLOCK_MONOTONIC, in nanoseconds.
 * A time at which something ends is a plain number of this clock, so that it
 * can be computed and compared; only this module makes a timespec of it.
 */

#ifndef NBDM_CLOCK_H
#define NBDM_CLOCK_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#define NS_PER_US UINT64_C (1000)
#define NS_PER_MS UINT64_C (1000000)
#define NS_PER_S UINT64_C (1000000000)
#define NEVER UINT64_MAX /* as a time: it does not come */

uint64_t now_ns (void);
/* The same, up to a tick of the kernel's (4 ms) old, and at less cost. */
uint64_t now_coarse_ns (void);

/* A condition variable for wait_until: its waits end by this clock. */
void cond_init (pthread_cond_t *cond);
/* Wait for a signal, as pthread_cond_wait does, but not beyond `until_ns`.
 * False: that time has come.
 */
bool wait_until (pthread_cond_t *cond, pthread_mutex_t *lock,
                 uint64_t until_ns);
/* Sleep that long, or until a signal comes to the thread. */
void sleep_ns (uint64_t ns);

#endif /* NBDM_CLOCK_H */
