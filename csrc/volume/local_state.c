/* SPDX-License-Identifier: BSD-3-Clause */

/* The local disk fails, and a remote takes its place.
 *
 *   event                                       from           to
 *   a write or flush fails, a remote in sync    ok, resyncing  failed
 *   it keeps a request for `local_deadline`     ok, resyncing  failed
 *   the same, no remote in sync                 any            (unchanged)
 *   a region cannot be read, a remote can       ok             resyncing
 *   an operator attaches and admits a disk      failed         resyncing
 *   nothing is missing any more                 resyncing      ok
 *
 * A bit in local's own dirty map marks a region that local misses.  The rules:
 *
 * - Every region keeps a source.  A region that local misses is not made dirty
 *   on the last remote that has it (mark_regions_locked).
 * - A remote that holds the only copy of some bytes holds it durably: it is
 *   flushed before local is recorded as missing them, and later writes to it
 *   use FUA.  Otherwise its crash would lose the only copy.
 * - When local fails, what it answered and did not flush may be lost too.  So
 *   local misses the whole of every active extent, as after lost power.
 *
 * In a takeover the marks and a superblock that says resyncing become durable
 * first, and only then the remote is flushed.  If the process is killed after
 * that point, a remote serves what local may have lost.  If it is killed
 * before, nothing was answered on the strength of the takeover.  No request is
 * answered during the takeover (`taking_over`).
 *
 * Until that flush is answered, the remote may lose its cache, and with it what
 * local is said to miss.  That may happen before a kill or after it, and the
 * next start cannot see it.  So the superblock also says whether local may be
 * believed (UNDECIDED).  The remote's unflushed map tells what it has durably.
 *
 *   the takeover is for                     what no remote has durably belongs
 *   a write that failed, or hangs           to local
 *   a failed flush, bytes that were cut,
 *     a region that local cannot read       to a remote
 *   any of these, and a remote was lost     to local: the running process would
 *                                           take it back as well
 */

#include <endian.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "api.h"
#include "base/error.h"
#include "base/fault.h"
#include "base/lock.h"
#include "logs/activity.h"
#include "logs/bitmap.h"
#include "logs/dirty_map.h"
#include "logs/layout.h"
#include "volume/flush.h"
#include "volume/local.h"
#include "volume/local_io.h"
#include "volume/local_state.h"
#include "volume/state.h"
#include "volume/volume.h"
#include "wire/conn.h"
#include "wire/transport.h"

void
local_note_error_locked (struct nbdm *v, int rc)
{
  if (rc == LOCAL_GIVEN_UP)
    return;
  atomic_fetch_add (&v->local.errors, 1);
  disk_explain_locked (&v->local.disk, "%s", last_error ());
}

void
local_note_error (struct nbdm *v, int rc)
{
  LOCK_FOR_SCOPE (&v->lock);
  local_note_error_locked (v, rc);
}

uint32_t
local_persistent_state (const struct nbdm *v)
{
  return v->local.taking_over && v->local.state == NBDM_LOCAL_OK
             ? NBDM_LOCAL_RESYNCING
             : v->local.state;
}

/* Where local was not ok before, it has nothing that no remote has durably:
 * writes have asked for FUA.
 */
bool
local_undecided (const struct nbdm *v)
{
  if (!v->local.taking_over || v->local.state != NBDM_LOCAL_OK)
    return false;
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    if (v->remotes[i].disk.dm.owed.nr_set > 0)
      return true;
  return !v->local.mending && !v->local.doubted && !v->local.file.shrunk;
}

void
local_set_locked (struct nbdm *v, enum nbdm_local_state state)
{
  disk_changed_locked (&v->local.disk, v->local.state != state);
  v->local.repairing = false;
  atomic_store (&v->local.state, state);
}

bool
local_doubted (const struct nbdm *v)
{
  return atomic_load (&v->local.doubted) || atomic_load (&v->local.taking_over);
}

bool
local_believed (const struct nbdm *v)
{
  return atomic_load (&v->local.state) == NBDM_LOCAL_OK
         && !atomic_load (&v->local.file.shrunk) && !local_doubted (v);
}

bool
local_has_locked (const struct nbdm *v, uint64_t region)
{
  return v->local.state != NBDM_LOCAL_FAILED
         && !bitmap_test (&v->local.disk.dm.map[MAP_DIRTY], region);
}

static bool
remote_has_locked (const struct remote *r, uint64_t region)
{
  return remote_used_locked (r)
         && !bitmap_test (&r->disk.dm.map[MAP_DIRTY], region);
}

bool
range_has_source_locked (const struct nbdm *v, uint64_t offset, uint64_t length)
{
  uint64_t first, count;

  if (v->local.state != NBDM_LOCAL_FAILED
      && v->local.disk.dm.map[MAP_DIRTY].nr_set == 0)
    return true;
  region_span (v, offset, length, &first, &count);
  for (uint64_t region = first; region < first + count; region++) {
    bool found = local_has_locked (v, region);

    for (uint32_t i = 0; i < v->nr_remotes && !found; i++)
      found = remote_has_locked (&v->remotes[i], region);
    if (!found)
      return false;
  }
  return true;
}

/* --- the regions that local misses -------------------------------------- */

/* Mark regions as missing on local.  If the takeover under way fails, these
 * marks are undone: `owed` records them.
 */
static void
miss_locked (struct nbdm *v, uint64_t first, uint64_t count)
{
  struct dirty_map *dm = &v->local.disk.dm;
  const struct bitmap *missing = &dm->map[MAP_DIRTY];
  uint64_t end = first + count, region = first, stop;

  while ((region = bitmap_next_clear (missing, region, end)) < end) {
    stop = bitmap_next_set (missing, region, end);
    bitmap_set (&dm->owed, region, stop - region);
    region = stop;
  }
  dirty_map_mark (dm, first, count, false);
}

static void
extent_span (const struct nbdm *v, uint64_t extent, uint64_t *first,
             uint64_t *count)
{
  uint64_t offset = extent * EXTENT_SIZE;

  region_span (v, offset,
               v->size - offset < EXTENT_SIZE ? v->size - offset : EXTENT_SIZE,
               first, count);
}

/* Only a flush shows which writes local has lost.  Until then a copy reads the
 * old bytes instead, and a flush of the remote does not turn them into what
 * clients wrote.  So a remote is `unproven` from such a copy until a flush of
 * local, and becomes in sync only after that (resync.c).  All writes that no
 * flush of local has covered are in active extents.  Copies under way notice
 * the changed count of doubts.
 */
void
local_doubt_copies_locked (struct nbdm *v)
{
  uint64_t extents[ACTIVITY_EXTENTS], first, count;
  uint32_t nr = activity_list (&v->activity, extents, ACTIVITY_EXTENTS);

  v->local.doubts++;
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    for (uint32_t e = 0; v->remotes[i].unproven && e < nr; e++) {
      extent_span (v, extents[e], &first, &count);
      mark_regions_locked (&v->remotes[i], first, count, false);
    }
}

/* Local misses all that it has answered and not flushed, and the copies of that
 * data are doubted.
 */
static void
miss_active_locked (struct nbdm *v)
{
  uint64_t extents[ACTIVITY_EXTENTS], first, count;
  uint32_t nr = activity_list (&v->activity, extents, ACTIVITY_EXTENTS);

  for (uint32_t i = 0; i < nr; i++) {
    extent_span (v, extents[i], &first, &count);
    miss_locked (v, first, count);
  }
  local_doubt_copies_locked (v);
}

/* In this order: after a kill between the two the next start makes the marks
 * again, and would find no disk that has the region otherwise.
 */
static void
take_back_run_locked (struct nbdm *v, uint64_t first, uint64_t end)
{
  bitmap_clear (&v->local.disk.dm.map[MAP_DIRTY], first, end - first);
  atomic_signal_fence (memory_order_seq_cst);
  fault_point ("takeover_taking_back");
  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    struct dirty_map *dm = &v->remotes[i].disk.dm;
    uint64_t region = first;

    for (; (region = bitmap_next_set (&dm->owed, region, end)) < end; region++)
      dirty_map_pay (dm, region);
  }
}

/* No remote could take local's place.  Undo the marks of this takeover on
 * local, and give the remotes the marks that were deferred.  The remotes get no
 * other marks: a region that local cannot read would have no source.
 */
static void
take_back_locked (struct nbdm *v)
{
  struct dirty_map *dm = &v->local.disk.dm;
  uint64_t nr = v->nr_regions, region = 0, end;

  for (; (region = bitmap_next_set (&dm->owed, region, nr)) < nr;
       region = end) {
    end = bitmap_next_clear (&dm->owed, region, nr);
    take_back_run_locked (v, region, end);
  }
  dm->changed = true;
  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    struct remote *r = &v->remotes[i];
    if (r->disk.dm.map[MAP_DIRTY].nr_set > 0
        && (r->state == NBDM_IN_SYNC || remote_unaware_locked (r)))
      remote_lacks_locked (r, "%s", v->local.disk.reason);
  }
}

/* Flush every remote: any of them may become the only source of a region when
 * the others are lost.  `durable`: all that the remote answered before is
 * durable.  If a remote was lost and came back in the meantime, it is not,
 * though its flush succeeds: that flush was on another connection, and what the
 * first connection answered became dirty only where another remote had it.
 * Releases the lock.
 */
static void
flush_remotes_relock (struct nbdm *v, bool *durable)
{
  struct remote_flush flushes[NBDM_MAX_REMOTES];
  struct conn *conns[NBDM_MAX_REMOTES];
  uint32_t nr = v->nr_remotes;

  for (uint32_t i = 0; i < nr; i++)
    conns[i] = v->remotes[i].admitted ? conn_get (v->remotes[i].conn) : NULL;
  pthread_mutex_unlock (&v->lock);
  for (uint32_t i = 0; i < nr; i++)
    if (conns[i]) {
      remote_flush_begin (&v->remotes[i], &flushes[i]);
      /* all requests wait for this: do not wait for a hold */
      flushes[i].conn = conns[i];
    }
  for (uint32_t i = 0; i < nr; i++)
    durable[i] = conns[i] && remote_flush_end (&flushes[i]) == 0;
  pthread_mutex_lock (&v->lock);
  for (uint32_t i = 0; i < nr; i++) {
    const struct remote *r = &v->remotes[i];

    durable[i] = durable[i] && r->admitted && r->conn == conns[i];
    conn_put (conns[i]);
  }
}

void
local_await_takeover_relock (struct nbdm *v)
{
  bool said = le32toh (v->sb.flags) & SUPERBLOCK_UNDECIDED;

  /* This thread has found that local lost what it answered. */
  if (v->local.taking_over && said != local_undecided (v))
    volume_persist_locked (v);
  while (v->local.taking_over)
    pthread_cond_wait (&v->changed, &v->lock);
}

/* The end is durable before the waiting requests are answered. */
static void
end_taking_over_locked (struct nbdm *v)
{
  v->local.taking_over = v->local.mending = false;
  remotes_pay_locked (v);
  FOR_EACH_DISK (d, v)
    dirty_map_forgive (&d->dm);
  if (v->local.state == NBDM_LOCAL_FAILED)
    volume_trust_locked (v);
  else
    volume_persist_locked (v);
  /* Resync may have copied back all other missing regions during the takeover.
   */
  local_update_state_locked (v);
  if (v->local.state == NBDM_LOCAL_FAILED)
    local_io_give_up (v);
  pthread_cond_broadcast (&v->changed);
}

/* Being in sync is not enough: a write that both disks refused with the same
 * error made its range dirty on the remote, to be copied from local again.
 * `durable`: consider only these remotes; NULL: all.
 */
static bool
successor_locked (const struct nbdm *v, const bool *durable)
{
  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    const struct remote *r = &v->remotes[i];

    if (r->admitted && r->state == NBDM_IN_SYNC
        && r->disk.dm.map[MAP_DIRTY].nr_set == 0 && (!durable || durable[i]))
      return true;
  }
  return false;
}

/* Requests that came while the remotes were flushed may have activated more
 * extents, and local has failed for these too.  And what was copied back but
 * not flushed is lost as well.
 */
static void
fail_locked (struct nbdm *v)
{
  miss_active_locked (v);
  /* It may have lost any of its bytes, even if its size is right again later.
   */
  if (atomic_load (&v->local.file.shrunk))
    dirty_map_mark (&v->local.disk.dm, 0, v->nr_regions, false);
  bitmap_clear_all (&v->local.disk.dm.copied);
  v->local.attached = false;
  v->local.failures++;
  /* The policy may have been switched during the takeover. */
  if (v->policy == NBDM_STOP)
    v->fenced = true;
  local_set_locked (v, NBDM_LOCAL_FAILED);
}

bool
local_may_be_replaced_locked (const struct nbdm *v)
{
  return v->local.state != NBDM_LOCAL_FAILED && successor_locked (v, NULL)
         && v->policy != NBDM_STOP && !v->failed;
}

int
local_takeover_relock (struct nbdm *v)
{
  bool durable[NBDM_MAX_REMOTES];

  local_await_takeover_relock (v);
  if (v->local.state == NBDM_LOCAL_FAILED)
    return 0;
  if (!local_may_be_replaced_locked (v))
    return -EIO;
  v->local.taking_over = true;
  miss_active_locked (v);
  volume_persist_locked (v);
  fault_point ("takeover_marked");
  flush_remotes_relock (v, durable);
  if (successor_locked (v, durable) && !v->failed)
    fail_locked (v);
  else
    take_back_locked (v);
  fault_point ("takeover_done");
  end_taking_over_locked (v);
  return v->local.state == NBDM_LOCAL_FAILED && !v->failed ? 0 : -EIO;
}

void
local_replace_doubted_relock (struct nbdm *v)
{
  if (v->local.flush_error && !v->local.taking_over && !v->drained
      && local_may_be_replaced_locked (v))
    local_takeover_relock (v);
}

void
local_give_up (struct nbdm *v)
{
  LOCK_FOR_SCOPE (&v->lock);
  local_await_takeover_relock (v);
  /* Once drained, the maps are about to be closed and must not change. */
  if (v->local.state != NBDM_LOCAL_FAILED && !v->drained) {
    disk_explain_locked (&v->local.disk, "%s", last_error ());
    local_takeover_relock (v);
  }
}

int
local_flush_lost_relock (struct nbdm *v)
{
  int rc = local_takeover_relock (v);

  if (rc < 0)
    volume_fail_locked (v, v->local.disk.reason);
  return rc;
}

/* Is a remote on hold that may take local's place once it is back? */
static bool
successor_held_locked (const struct nbdm *v)
{
  if (v->failed || v->stopping || v->policy == NBDM_STOP
      || v->local.state == NBDM_LOCAL_FAILED || successor_locked (v, NULL))
    return false;
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    if (v->remotes[i].state == NBDM_HOLDING)
      return true;
  return false;
}

int
local_flush_failed_relock (struct nbdm *v)
{
  local_await_takeover_relock (v);
  while (successor_held_locked (v) && !v->waking) {
    pthread_cond_wait (&v->changed, &v->lock);
    local_await_takeover_relock (v);
  }
  /* A policy thread that connects may still admit the remote. */
  if (v->drained || successor_held_locked (v))
    return -EIO;
  return local_flush_lost_relock (v);
}

/* --- regions that local cannot read -------------------------------------- */

/* A cut disk lacks all of a volume, which may have billions of regions, and the
 * lock is held: so these functions look at runs of regions.
 */

/* May the remote become the only source of what it has? */
static bool
may_keep_locked (const struct remote *r)
{
  return r->admitted && remote_used_locked (r);
}

/* Does local have a region of [first, end) that a remote has too? */
static bool
may_miss_any_locked (const struct nbdm *v, uint64_t first, uint64_t end)
{
  const struct bitmap *missing = &v->local.disk.dm.map[MAP_DIRTY];
  bool found = false;

  if (v->local.state == NBDM_LOCAL_FAILED)
    return false;
  for (uint32_t i = 0; i < v->nr_remotes && !found; i++) {
    const struct bitmap *dirty = &v->remotes[i].disk.dm.map[MAP_DIRTY];
    uint64_t region = may_keep_locked (&v->remotes[i]) ? first : end;

    while (region < end && !found) {
      uint64_t has = bitmap_next_clear (missing, region, end);

      region = bitmap_next_clear (dirty, has, end);
      found = region == has && has < end;
    }
  }
  return found;
}

static void
miss_kept_locked (struct nbdm *v, uint64_t first, uint64_t end)
{
  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    const struct bitmap *dirty = &v->remotes[i].disk.dm.map[MAP_DIRTY];
    uint64_t region = may_keep_locked (&v->remotes[i]) ? first : end, stop;

    for (; (region = bitmap_next_clear (dirty, region, end)) < end;
         region = stop) {
      stop = bitmap_next_set (dirty, region, end);
      miss_locked (v, region, stop - region);
    }
  }
}

/* The end of the run at `region` that one of these remotes has. */
static uint64_t
kept_end_locked (const struct nbdm *v, const bool *durable, uint64_t region,
                 uint64_t end)
{
  uint64_t longest = region;

  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    const struct remote *r = &v->remotes[i];
    uint64_t stop = region;

    if (durable[i] && may_keep_locked (r))
      stop = bitmap_next_set (&r->disk.dm.map[MAP_DIRTY], region, end);
    longest = stop > longest ? stop : longest;
  }
  return longest;
}

/* Does one of these remotes have each region that the takeover has made local
 * miss?
 */
static bool
all_kept_locked (const struct nbdm *v, const bool *durable)
{
  const struct bitmap *owed = &v->local.disk.dm.owed;
  uint64_t nr = v->nr_regions, region = 0, end, kept;

  while ((region = bitmap_next_set (owed, region, nr)) < nr) {
    end = bitmap_next_clear (owed, region, nr);
    for (; region < end; region = kept) {
      kept = kept_end_locked (v, durable, region, end);
      if (kept == region)
        return false;
    }
  }
  return true;
}

static void
miss_for_good_relock (struct nbdm *v, uint64_t first, uint64_t end)
{
  bool durable[NBDM_MAX_REMOTES], was_ok = v->local.state == NBDM_LOCAL_OK;

  v->local.taking_over = v->local.mending = true;
  miss_kept_locked (v, first, end);
  volume_persist_locked (v);
  fault_point ("takeover_marked");
  flush_remotes_relock (v, durable);
  if (all_kept_locked (v, durable) && !v->failed) {
    if (was_ok) {
      local_set_locked (v, NBDM_LOCAL_RESYNCING);
      v->local.repairing = true;
    }
  }
  else
    take_back_locked (v);
  end_taking_over_locked (v);
}

void
local_miss_regions (struct nbdm *v, uint64_t first, uint64_t count)
{
  LOCK_FOR_SCOPE (&v->lock);
  local_await_takeover_relock (v);
  /* Once drained, the maps are about to be closed and must not change. */
  if (!v->failed && !v->drained
      && may_miss_any_locked (v, first, first + count))
    miss_for_good_relock (v, first, first + count);
}

void
local_update_state_locked (struct nbdm *v)
{
  if (v->local.state != NBDM_LOCAL_RESYNCING || v->failed
      || v->local.taking_over || v->local.disk.dm.map[MAP_DIRTY].nr_set > 0)
    return;
  v->local.disk.reason[0] = '\0';
  local_set_locked (v, NBDM_LOCAL_OK);
  lift_fence_locked (v);
  volume_persist_locked (v);
}
