/* SPDX-License-Identifier: BSD-3-Clause */

/* One call of nbdm_disk_resync: its driver, and the interface to the code that
 * copies to a kind of disk.  See resync_call.c.
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

/* A call under way.  It belongs to the thread that makes the call. */
struct resync_call {
  struct disk *target;
  const struct copy_strategy *how;
  uint64_t cursor; /* region */
  uint64_t max_bytes, until_ns;
  uint64_t issued_bytes, zero_bytes, cleaned_bytes;
  struct resync_pace pace; /* the pace when the last copy began */
  uint64_t burst_ns;       /* when the burst under way began */
  uint64_t flush_ended_ns; /* end of the last flush, or begin of the call */
};

/* How to copy to a kind of disk.  The source of a range is no part of this:
 * source_pread reads from any disk that misses nothing of the range.  Functions
 * named `_locked` are called with volume->lock held, the others take it.  Each
 * returns -errno to end the call.
 */
struct copy_strategy {
  /* 1: copy; 0: nothing to do. */
  int (*begin_locked) (struct resync_call *c);
  /* Allocate memory for the call; release frees all of it. */
  int (*prepare) (struct resync_call *c);
  void (*release) (struct resync_call *c);
  /* Start the next copy at the cursor or above it, or complete it.  1:
   * continue; 0: no region is left.
   */
  int (*copy) (struct resync_call *c);
  /* If a flush is due, flush what was copied, and clean what was flushed. */
  int (*flush) (struct resync_call *c);
  /* End everything that another thread may wait for. */
  int (*settle) (struct resync_call *c);
  /* May the call continue after a rest? */
  bool (*usable_locked) (const struct resync_call *c);
  /* End what is under way, and clean what can be cleaned.  `rc`: the result of
   * the copying so far.  0 or -errno.
   */
  int (*finish) (struct resync_call *c, int rc);
  /* If one copy takes longer than a burst, as over a slow link, lengthen the
   * rest after it in proportion.
   */
  bool stretches_rests;
};

/* Make the call; the target and the strategy are set. */
int resync_run (struct resync_call *c, struct nbdm_resync *io);
/* Is a flush of the copied and unflushed bytes due? */
bool resync_flush_due (const struct resync_call *c, uint64_t unflushed_bytes);
/* This many regions of the target have become clean. */
void resync_cleaned_locked (struct resync_call *c, uint64_t regions);

/* The two kinds of call; see nbdm_disk_resync. */
int resync_to_remote (struct remote *r, struct nbdm_resync *io);
int resync_to_local (struct nbdm *v, struct nbdm_resync *io);

#endif /* NBDM_RESYNC_CALL_H */
