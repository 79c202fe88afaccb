/* SPDX-License-Identifier: BSD-3-Clause */

/* Copy back to the local disk what it misses, while clients read and write.
 *
 * The mirror image of resync.c, in the other direction:
 *
 *   range lock -> read from a remote that is clean there -> write to local ->
 *   `copied`, unlock ... -> local flushed -> dirty bit cleared
 *
 * Once local is admitted, clients' writes go to it, whether it misses the
 * regions or not.  So a copied region stays equal until its bit is cleared.
 * This makes one copy at a time: a local disk has no round trips to hide, and
 * clients' reads wait for this disk.  For the same reason no copy runs beside a
 * flush.  As in resync.c, a call runs for a long time, its pace may change
 * while it runs, and it holds nothing while it rests.
 */

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "api.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/fault.h"
#include "base/file.h"
#include "base/lock.h"
#include "logs/bitmap.h"
#include "logs/dirty_map.h"
#include "logs/layout.h"
#include "logs/rangelock.h"
#include "request/read.h"
#include "resync/resync_call.h"
#include "volume/backlog.h"
#include "volume/flush.h"
#include "volume/identity.h"
#include "volume/local.h"
#include "volume/local_state.h"
#include "volume/state.h"
#include "volume/volume.h"

struct copy_back {
  struct resync_call call; /* first */
  uint8_t *buf;
  /* bytes already covered by a flush */
  uint64_t flushed_bytes, flushed_zero_bytes;
  bool flush_failed;
};

static struct copy_back *
copy_back_of (struct resync_call *c)
{
  return (struct copy_back *)c; /* its first member */
}

/* Find the next run that is missing and not copied, as long as the pace allows.
 */
static bool
find_run_locked (const struct copy_back *b, uint64_t *first, uint64_t *count)
{
  const struct nbdm *v = b->call.target->volume;
  const struct bitmap *missing = &v->local.disk.dm.map[MAP_DIRTY];
  const struct bitmap *copied = &v->local.disk.dm.copied;
  uint64_t nr = v->nr_regions, region = b->call.cursor, end;

  for (;;) {
    region = bitmap_next_set (missing, region, nr);
    if (region == nr)
      return false;
    end = bitmap_next_clear (copied, region, nr);
    if (end == region)
      break;
    region = end;
  }
  end = region + b->call.pace.copy_bytes / v->region_size;
  end = bitmap_next_clear (missing, region, end < nr ? end : nr);
  end = bitmap_next_set (copied, region, end);
  *first = region;
  *count = end - region;
  return true;
}

/* Lock the range, if local must still be written, and keep the disk from being
 * replaced until the copy has ended.
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
  struct nbdm *v = b->call.target->volume;
  int rc = source_pread (v, NULL, b->buf, range->length, range->offset);

  if (rc < 0)
    return set_message (-ENOTCONN,
                        "no remote that has what the local disk misses at %llu "
                        "is connected",
                        (unsigned long long)range->offset);
  fault_point ("local_resync_after_read");
  if (all_zero (b->buf, range->length)) {
    rc = local_zero (v, range->length, range->offset, true);
    b->call.zero_bytes += rc == 0 ? range->length : 0;
  }
  else
    rc = local_pwrite (v, b->buf, range->length, range->offset);
  if (rc < 0) {
    local_note_error (v, rc);
    pthread_mutex_lock (&v->lock);
    local_await_takeover_relock (v);
    /* Local fails again if a remote can serve.  Once drained, the maps are
     * about to be closed and must not change.
     */
    if (!v->drained)
      local_takeover_relock (v);
    pthread_mutex_unlock (&v->lock);
    return -EIO;
  }
  b->call.issued_bytes += range->length;
  return 0;
}

/* 1: copied a run; 0: no run is left; -errno. */
static int
copy_run (struct resync_call *c)
{
  struct copy_back *b = copy_back_of (c);
  struct nbdm *v = b->call.target->volume;
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
  /* The disk may have failed and been replaced during the copy.  Then the bytes
   * went to the old one.
   */
  if (rc == 0 && v->local.state == NBDM_LOCAL_RESYNCING
      && v->local.failures == failures)
    bitmap_set (&v->local.disk.dm.copied, first, count);
  rangelock_remove (&v->ranges, &range);
  pthread_mutex_unlock (&v->lock);
  local_leave ();
  /* Go on after a run that has no source now: later runs may have one. */
  b->call.cursor = first + count;
  return rc == 0 ? 1 : rc;
}

static void
unflushed (const struct copy_back *b, uint64_t *used)
{
  used[BACKLOG_ZEROES] = b->call.zero_bytes - b->flushed_zero_bytes;
  used[BACKLOG_DATA]
      = b->call.issued_bytes - b->flushed_bytes - used[BACKLOG_ZEROES];
}

/* Only a flush that begins after a copy makes its regions clean. */
static int
flush_and_clean (struct copy_back *b)
{
  struct nbdm *v = b->call.target->volume;
  uint64_t cleaned, used[BACKLOG_KINDS], begin = now_ns ();
  int rc;

  local_use (v); /* no replacement before the flush is applied */
  rc = flush_local_group (v);
  unflushed (b, used);
  flush_bound_took (&v->local.flush_bound, used, now_ns () - begin);
  fault_point ("local_resync_before_clean");
  pthread_mutex_lock (&v->lock);
  if (rc < 0) {
    local_flush_failed_relock (v);
    rc = -EIO;
  }
  else if (v->local.state == NBDM_LOCAL_RESYNCING && !v->failed && !v->drained
           && identity_copied_back_locked (v) == 0) {
    cleaned = dirty_map_clean (&v->local.disk.dm, 0, v->nr_regions);
    /* Make this durable before a write of these regions goes to local only.
     * Otherwise a start after lost power would take the remote as their source.
     */
    if (cleaned > 0)
      volume_persist_locked (v);
    resync_cleaned_locked (&b->call, cleaned);
    if (v->local.repairing)
      v->local.repaired += cleaned;
    local_update_state_locked (v);
  }
  pthread_mutex_unlock (&v->lock);
  local_leave ();
  b->flushed_bytes = b->call.issued_bytes;
  b->flushed_zero_bytes = b->call.zero_bytes;
  b->call.flush_ended_ns = now_ns ();
  b->flush_failed = rc < 0;
  return rc;
}

/* No deadline bounds a flush of the local disk, but progress must be visible.
 */
static int
drive_flush (struct resync_call *c)
{
  struct copy_back *b = copy_back_of (c);
  uint64_t used[BACKLOG_KINDS];
  bool due = resync_flush_due (c, c->issued_bytes - b->flushed_bytes);

  unflushed (b, used);
  due = due || flush_bound_half (&c->target->volume->local.flush_bound, used);
  return due ? flush_and_clean (b) : 0;
}

/* No copy is under way between two calls of copy_run. */
static int
settle (struct resync_call *c)
{
  (void)c;
  return 0;
}

static int
finish (struct resync_call *c, int rc)
{
  struct copy_back *b = copy_back_of (c);
  int clean_rc = 0;

  if (rc != -EIO && !b->flush_failed)
    clean_rc = flush_and_clean (b);
  return rc < 0 ? rc : clean_rc;
}

static int
begin_locked (struct resync_call *c)
{
  const struct nbdm *v = c->target->volume;
  int rc = command_gate_locked (v);

  return rc < 0 ? rc : v->local.state == NBDM_LOCAL_RESYNCING;
}

static bool
usable_locked (const struct resync_call *c)
{
  return c->target->volume->local.state == NBDM_LOCAL_RESYNCING;
}

static int
prepare (struct resync_call *c)
{
  struct copy_back *b = copy_back_of (c);
  uint32_t region = c->target->volume->region_size;

  b->buf = malloc (region > RESYNC_COPY_BYTES ? region : RESYNC_COPY_BYTES);
  return b->buf ? 0 : set_error (-ENOMEM, "copying back");
}

static void
release (struct resync_call *c)
{
  free (copy_back_of (c)->buf);
}

static const struct copy_strategy to_local = {
  .begin_locked = begin_locked,
  .prepare = prepare,
  .release = release,
  .copy = copy_run,
  .flush = drive_flush,
  .settle = settle,
  .usable_locked = usable_locked,
  .finish = finish,
};

int
resync_to_local (struct nbdm *v, struct nbdm_resync *io)
{
  struct copy_back b
      = { .call = { .target = &v->local.disk, .how = &to_local } };

  return resync_run (&b.call, io);
}
