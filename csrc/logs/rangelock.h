/* SPDX-License-Identifier: BSD-3-Clause */

/* One writer per byte range.  See rangelock.c. */

#ifndef NBDM_RANGELOCK_H
#define NBDM_RANGELOCK_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

/* Which thread may touch which bytes: first come, first served.  The list holds
 * held and waiting ranges in the order they came; a range waits for every
 * overlapping one ahead of it, held or waiting, so no range is overtaken.  Only
 * readers, whose ranges are `shared`, do not wait for each other.  While a
 * range is in the list its offset and length must not change.
 */
struct range {
  uint64_t offset, length;
  bool shared;             /* a reader's: held together with other readers' */
  uint32_t blockers;       /* ranges ahead that exclude it; 0: held */
  pthread_cond_t *granted; /* signalled when blockers becomes 0; or NULL */
  struct range *next, *prev;
};

#define RANGE_COUNTERS 1024u

/* All zero at first. */
struct rangelock {
  struct range *first, *last;
  uint32_t nr_wide;                /* wide ranges, which are in no counter */
  uint32_t counts[RANGE_COUNTERS]; /* blocks by their hash: see rangelock.c */
};

/* Add the range.  True: it is held at once.  Else it is held once `blockers` is
 * 0.
 */
bool rangelock_add (struct rangelock *rl, struct range *range);
/* Add the range only if it is held at once. */
bool rangelock_try (struct rangelock *rl, struct range *range);
/* Cut the range to its longest part that is free, and add that.  False: every
 * byte is held by others.  It overtakes the ranges that wait.  The comparison
 * with a remote needs that: a waiting range may wait for a request which waits
 * for that remote.
 */
bool rangelock_try_part (struct rangelock *rl, struct range *range);
void rangelock_remove (struct rangelock *rl, struct range *range);

#endif /* NBDM_RANGELOCK_H */
