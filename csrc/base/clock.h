/* SPDX-License-Identifier: BSD-3-Clause */

/* The clock of all deadlines and times: CLOCK_MONOTONIC, in nanoseconds.  A
 * deadline is a plain number, so that code can add and compare; only this
 * module makes a timespec of it.
 */

#ifndef NBDM_CLOCK_H
#define NBDM_CLOCK_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#define NS_PER_US UINT64_C (1000)
#define NS_PER_MS UINT64_C (1000000)
#define NS_PER_S UINT64_C (1000000000)
#define NEVER UINT64_MAX /* a time that never comes */

uint64_t now_ns (void);
/* The same at less cost, but up to one kernel tick (4 ms) old. */
uint64_t now_coarse_ns (void);

/* Initialise a condition variable for wait_until: its timed waits use this
 * clock.
 */
void cond_init (pthread_cond_t *cond);
/* Wait for a signal, as pthread_cond_wait does, but at most until `until_ns`.
 * False: that time is reached.
 */
bool wait_until (pthread_cond_t *cond, pthread_mutex_t *lock,
                 uint64_t until_ns);
/* Sleep that long, or until the thread receives a signal. */
void sleep_ns (uint64_t ns);

#endif /* NBDM_CLOCK_H */
