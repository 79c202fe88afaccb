/* SPDX-License-Identifier: BSD-3-Clause */

/* Copy back to the local disk what it misses, while clients read and write.
 *
 * The mirror image of resync.c, with one leg's order turned round:
 *
 *   range lock -> read from a remote that is clean there -> write to local ->
 *   `copied`, unlock ... -> local flushed -> dirty bit cleared
 *
 * Clients' writes go to local from the moment it is admitted, whole regions
 * missing or not, so a copied region stays equal until its bit is cleared.
 * One copy at a time: a local disk has no round trips to hide, and it is the
 * disk that clients' reads wait for.  No copy goes on beside a flush, for the
 * same reason; but as there, a call goes on for long, its pace may be changed
 * meanwhile, and nothing is held while it rests.
 */

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "api.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/fault.h"
#include "base/file.h"
#include "base/latency.h"
#include "base/lock.h"
#include "logs/bitmap.h"
#include "logs/dirty_map.h"
#include "logs/layout.h"
#include "logs/rangelock.h"
#include "request/read.h"
#include "resync/resync.h"
#include "volume/backlog.h"
#include "volume/flush.h"
#include "volume/identity.h"
#include "volume/local.h"
#include "volume/local_state.h"
#include "volume/state.h"
#include "volume/volume.h"

#define COPY_BYTES (1u << 20) /* in one copy, or one region if more */
#define FLUSH_NS 500000000    /* of what was copied: see resync.c */

struct copy_back {
  struct nbdm *volume;
  uint64_t cursor; /* region */
  uint8_t *buf;
  size_t buf_size;
  uint64_t max_bytes, until_ns;
  uint64_t bytes, zero_bytes, cleaned_bytes;
  uint64_t flushed_bytes, flushed_ns; /* how far it was, and when */
  uint64_t flushed_zero_bytes;
  uint64_t burst_ns; /* when the burst under way began */
  struct resync_pace pace;
};

/* The next run that is missing and not copied, as long as the pace says. */
static bool
find_run_locked (const struct copy_back *b, uint64_t *first, uint64_t *count)
{
  const struct nbdm *v = b->volume;
  const struct bitmap *missing = &v->local.disk.dm.map[MAP_DIRTY];
  const struct bitmap *copied = &v->local.disk.dm.copied;
  uint64_t nr = v->nr_regions, region = b->cursor, end;

  for (;;) {
    region = bitmap_next_set (missing, region, nr);
    if (region == nr)
      return false;
    end = bitmap_next_clear (copied, region, nr);
    if (end == region)
      break;
    region = end;
  }
  end = region + b->pace.copy_bytes / v->region_size;
  end = bitmap_next_clear (missing, region, end < nr ? end : nr);
  end = bitmap_next_set (copied, region, end);
  *first = region;
  *count = end - region;
  return true;
}

/* Hold the range, if local is still to be written; and the disk, which is not
 * to be replaced before that was done.
 */
static bool
lock_range (struct nbdm *v, struct range *range, pthread_cond_t *granted)
{
  bool held;

  range->granted = granted;
  LOCK_FOR_SCOPE (&v->lock);
  rangelock_add (&v->ranges, range);
  while (range->blockers > 0)
    pthread_cond_wait (granted, &v->lock);
  held = v->local.state == NBDM_LOCAL_RESYNCING && !v->failed && !v->stopping;
  if (held)
    local_use (v);
  else
    rangelock_remove (&v->ranges, range);
  return held;
}

static int
copy_range (struct copy_back *b, const struct range *range)
{
  struct nbdm *v = b->volume;
  int rc = source_pread (v, NULL, b->buf, range->length, range->offset);

  if (rc < 0)
    return set_message (-ENOTCONN,
                        "no remote that has what the local disk misses at %llu "
                        "is connected",
                        (unsigned long long)range->offset);
  fault_point ("local_resync_after_read");
  if (all_zero (b->buf, range->length)) {
    rc = local_zero (v, range->length, range->offset, true);
    b->zero_bytes += rc == 0 ? range->length : 0;
  }
  else
    rc = local_pwrite (v, b->buf, range->length, range->offset);
  if (rc < 0) {
    local_note_error (v, rc);
    pthread_mutex_lock (&v->lock);
    local_await_takeover_relock (v);
    /* To failed again, if a remote can serve; but once drained the maps are
     * about to be closed, and change no more.
     */
    if (!v->drained)
      local_takeover_relock (v);
    pthread_mutex_unlock (&v->lock);
    return -EIO;
  }
  b->bytes += range->length;
  return 0;
}

/* 1: copied a run; 0: there is none; -errno. */
static int
copy_run (struct copy_back *b)
{
  struct nbdm *v = b->volume;
  pthread_cond_t granted = PTHREAD_COND_INITIALIZER;
  uint64_t first, count, end;
  struct range range;
  unsigned failures;
  bool found;
  int rc;

  pthread_mutex_lock (&v->lock);
  failures = v->local.failures;
  found = find_run_locked (b, &first, &count);
  pthread_mutex_unlock (&v->lock);
  if (!found)
    return 0;
  end = (first + count) * v->region_size;
  end = end < v->size ? end : v->size;
  range = (struct range){ .offset = first * v->region_size,
                          .length = end - first * v->region_size };
  if (!lock_range (v, &range, &granted))
    return set_message (-ENOTCONN, "copying back was interrupted");
  rc = copy_range (b, &range);
  pthread_mutex_lock (&v->lock);
  /* It may have failed and been replaced while we wrote: to the old one. */
  if (rc == 0 && v->local.state == NBDM_LOCAL_RESYNCING
      && v->local.failures == failures)
    bitmap_set (&v->local.disk.dm.copied, first, count);
  rangelock_remove (&v->ranges, &range);
  pthread_mutex_unlock (&v->lock);
  local_leave ();
  /* Past one that has no source now, as others may have one. */
  b->cursor = first + count;
  return rc == 0 ? 1 : rc;
}

static void
unflushed (const struct copy_back *b, uint64_t *used)
{
  used[BACKLOG_ZEROES] = b->zero_bytes - b->flushed_zero_bytes;
  used[BACKLOG_DATA] = b->bytes - b->flushed_bytes - used[BACKLOG_ZEROES];
}

/* Only what a flush begun after its copy has covered is no longer missing. */
static int
flush_and_clean (struct copy_back *b)
{
  struct nbdm *v = b->volume;
  uint64_t cleaned, used[BACKLOG_KINDS], begin = now_ns ();
  int rc;

  local_use (v); /* it is not replaced before its flush was taken in */
  rc = flush_local_group (v);
  unflushed (b, used);
  flush_bound_took (&v->local.flush_bound, used, now_ns () - begin);
  fault_point ("local_resync_before_clean");
  pthread_mutex_lock (&v->lock);
  if (rc < 0)
    local_await_takeover_relock (v);
  if (rc < 0 && v->drained)
    rc = -EIO; /* as above: the stop flushes as well, and finds the same */
  else if (rc < 0)
    rc = local_flush_lost_relock (v) < 0 ? rc : -EIO;
  else if (v->local.state == NBDM_LOCAL_RESYNCING && !v->failed && !v->drained
           && identity_copied_back_locked (v) == 0) {
    cleaned = dirty_map_clean (&v->local.disk.dm, 0, v->nr_regions);
    /* Durable before local alone takes a write of it: after lost power the
     * remote would else count as its source.
     */
    if (cleaned > 0)
      volume_persist_locked (v);
    b->cleaned_bytes += cleaned * v->region_size;
    v->local.disk.copied_bytes += cleaned * v->region_size;
    if (v->local.repairing)
      v->local.repaired += cleaned;
    local_update_state_locked (v);
  }
  pthread_mutex_unlock (&v->lock);
  local_leave ();
  b->flushed_bytes = b->bytes;
  b->flushed_zero_bytes = b->zero_bytes;
  b->flushed_ns = now_ns ();
  return rc;
}

/* No deadline bounds a flush of the local disk, but progress is to show. */
static bool
flush_due (const struct copy_back *b)
{
  uint64_t used[BACKLOG_KINDS], bytes = b->bytes - b->flushed_bytes;

  unflushed (b, used);
  return bytes >= b->volume->flush_bytes
         || flush_bound_half (&b->volume->local.flush_bound, used)
         || (bytes > 0 && now_ns () - b->flushed_ns >= FLUSH_NS);
}

/* Is the call over, whatever is left?  Else takes the pace to go on at. */
static bool
call_over (struct copy_back *b)
{
  struct nbdm *v = b->volume;

  LOCK_FOR_SCOPE (&v->lock);
  b->pace = v->local.disk.pace;
  return v->waking || b->bytes >= b->max_bytes || now_ns () >= b->until_ns;
}

/* Leave the disks to clients for a while, after a burst. */
static void
rest_if_due (struct copy_back *b)
{
  struct nbdm *v = b->volume;
  uint64_t until_ns = now_ns () + b->pace.rest_us * NS_PER_US;
  bool resting = true;

  if (b->pace.rest_us == 0
      || now_ns () - b->burst_ns < b->pace.burst_us * NS_PER_US)
    return;
  latency_copying (&v->latency, false);
  pthread_mutex_lock (&v->lock);
  while (resting && v->local.state == NBDM_LOCAL_RESYNCING && !v->waking
         && !v->stopping && v->local.disk.pace.rest_us > 0)
    resting = wait_until (&v->events, &v->lock, until_ns);
  pthread_mutex_unlock (&v->lock);
  latency_copying (&v->latency, true);
  b->burst_ns = now_ns ();
}

static int
run_batch (struct copy_back *b, struct nbdm_resync *io)
{
  int rc = 1, clean_rc;

  while (rc == 1 && !call_over (b)) {
    rc = copy_run (b);
    if (rc == 1 && flush_due (b)) {
      clean_rc = flush_and_clean (b);
      if (clean_rc < 0)
        return clean_rc;
    }
    if (rc == 1)
      rest_if_due (b);
  }
  io->next_region = rc == 0 ? 0 : b->cursor;
  io->zero_bytes = b->zero_bytes;
  clean_rc = rc == -EIO ? 0 : flush_and_clean (b);
  return rc < 0 ? rc : clean_rc;
}

int
resync_local (struct nbdm *v, struct nbdm_resync *io)
{
  uint64_t now = now_ns ();
  struct copy_back b = {
    .volume = v,
    .cursor = io->first_region,
    .max_bytes = io->max_bytes,
    .until_ns = io->max_ms ? now + io->max_ms * NS_PER_MS : NEVER,
    .flushed_ns = now,
    .burst_ns = now,
  };
  int rc;

  pthread_mutex_lock (&v->lock);
  rc = command_gate_locked (v);
  pthread_mutex_unlock (&v->lock);
  if (rc < 0 || atomic_load (&v->local.state) != NBDM_LOCAL_RESYNCING)
    return rc;
  b.buf_size = v->region_size > COPY_BYTES ? v->region_size : COPY_BYTES;
  b.buf = malloc (b.buf_size);
  if (b.buf == NULL)
    return set_error (-ENOMEM, "copying back");
  nbdm_disk_resync_pace (v, NBDM_LOCAL, &io->pace);
  latency_copying (&v->latency, true);
  rc = run_batch (&b, io);
  latency_copying (&v->latency, false);
  io->copied_bytes = b.cleaned_bytes;
  free (b.buf);
  return rc;
}
