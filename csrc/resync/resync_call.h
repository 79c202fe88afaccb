/* SPDX-License-Identifier: BSD-3-Clause */

/* A call of nbdm_disk_resync: its driver, and how copies to a disk are made.
 * See resync_call.c.
 */

#ifndef NBDM_RESYNC_CALL_H
#define NBDM_RESYNC_CALL_H

#include <stdbool.h>
#include <stdint.h>

#include "volume/disk.h"

struct nbdm_resync;
struct remote;

#define RESYNC_MAX_DEPTH 64          /* copies under way */
#define RESYNC_COPY_BYTES (1u << 20) /* of data in one copy, or one region */
#define RESYNC_COPY_COMMANDS 32      /* under way for one copy */

/* A call under way.  All of it belongs to the thread that makes the call. */
struct resync_call {
  struct disk *target;
  const struct copy_strategy *how;
  uint64_t cursor; /* region */
  uint64_t max_bytes, until_ns;
  uint64_t issued_bytes, zero_bytes, cleaned_bytes;
  struct resync_pace pace; /* as it was when the last copy began */
  uint64_t burst_ns;       /* when the burst under way began */
  uint64_t flush_ended_ns; /* the last one, or the call's begin */
};

/* How a kind of disk is copied to.  Where a range is read from is no part of
 * it: source_pread takes any disk that misses nothing of the range.  What is
 * named `_locked` wants volume->lock, the others take it.  Each returns -errno,
 * which ends the call.
 */
struct copy_strategy {
  /* 1: copy; 0: there is nothing to do. */
  int (*begin_locked) (struct resync_call *c);
  /* Get the memory for it, and give all of it back. */
  int (*prepare) (struct resync_call *c);
  void (*release) (struct resync_call *c);
  /* Begin the next copy at the cursor or above it, or make it: 1; 0: nothing is
   * left.
   */
  int (*copy) (struct resync_call *c);
  /* Flush what was copied, if it is due, and clean what was flushed. */
  int (*flush) (struct resync_call *c);
  /* End all that another thread may wait for. */
  int (*settle) (struct resync_call *c);
  /* May the call go on after a rest? */
  bool (*usable_locked) (const struct resync_call *c);
  /* End what is under way and clean what can be cleaned.  `rc`: how the copying
   * ended.  0 or -errno.
   */
  int (*finish) (struct resync_call *c, int rc);
  /* Where one copy takes many bursts, as over a slow link, the rest after it is
   * as many times longer.
   */
  bool stretches_rests;
};

/* Make the call, of which target and strategy are set. */
int resync_run (struct resync_call *c, struct nbdm_resync *io);
/* Is a flush due of what was copied and not flushed? */
bool resync_flush_due (const struct resync_call *c, uint64_t unflushed_bytes);
/* So many regions of the target have become clean. */
void resync_cleaned_locked (struct resync_call *c, uint64_t regions);

/* The two kinds: as nbdm_disk_resync. */
int resync_to_remote (struct remote *r, struct nbdm_resync *io);
int resync_to_local (struct nbdm *v, struct nbdm_resync *io);

#endif /* NBDM_RESYNC_CALL_H */
