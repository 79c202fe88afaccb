/* SPDX-License-Identifier: BSD-3-Clause */

/* Changes of the state of a remote or of the volume.
 *
 * All of them happen here, so that the order of rules 3, 4 and 7 is written
 * once: regions that may differ become dirty, the dirty map and then the
 * superblock become durable, and only then the lock is released and requests
 * are answered.  C only makes the transitions that I/O forces.  When to
 * connect, which regions to copy and how fast is policy, and belongs to Python.
 *
 *   event                     from                   to
 *   connection lost           in_sync                holding
 *   connection lost           resyncing              out_of_sync
 *   deadline passed           in_sync, resyncing     out_of_sync
 *   the hold is over          holding                out_of_sync
 *   error answered            in_sync, resyncing     out_of_sync
 *   local write failed, and
 *     no remote replaces it   in_sync                resyncing
 *   admitted, nothing dirty   holding, out_of_sync   in_sync
 *   admitted, some dirty      holding, out_of_sync   resyncing
 *   last region flushed       resyncing              in_sync
 *   sample differs            any                    failed
 *   metadata not persisted    (volume)               failed, for good
 */

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include "api.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/fault.h"
#include "base/file.h"
#include "logs/bitmap.h"
#include "logs/dirty_map.h"
#include "logs/layout.h"
#include "logs/superblock.h"
#include "volume/backlog.h"
#include "volume/local_state.h"
#include "volume/node.h"
#include "volume/state.h"
#include "volume/volume.h"
#include "wire/conn.h"
#include "wire/transport.h"

void
region_span (const struct nbdm *v, uint64_t offset, uint64_t length,
             uint64_t *first, uint64_t *count)
{
  *first = offset / v->region_size;
  *count = (offset + length - 1) / v->region_size - *first + 1;
}

/* Does any other remote have the region?  A failed one does not count beside
 * one that has not failed, as behind it may be another disk.
 */
static bool
other_has_locked (const struct remote *r, uint64_t region)
{
  const struct nbdm *v = r->disk.volume;

  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    const struct remote *other = &v->remotes[i];

    if (other != r && (other->state != NBDM_FAILED || r->state == NBDM_FAILED)
        && !bitmap_test (&other->disk.dm.map[MAP_DIRTY], region))
      return true;
  }
  return false;
}

/* The remote is the only source of a region.  An event that would have made the
 * region dirty means that this remote may have old bytes where others have new
 * ones.  The remote stays the source, so the others now differ from it: what
 * was copied from it is copied again.
 *
 * During a takeover local may turn out to be the source after all, so the mark
 * is deferred.  Until then the region is read from neither disk (read.c). After
 * a kill the next start makes the mark, from the open slot or from the region's
 * bit in an unflushed map.
 */
static void
keep_source_locked (struct remote *r, uint64_t region, bool late)
{
  struct nbdm *v = r->disk.volume;

  if (v->local.taking_over)
    dirty_map_owe (&r->disk.dm, region, late);
  FOR_EACH_DISK (d, v)
    if (d != &r->disk)
      bitmap_clear (&d->dm.copied, region, 1);
}

void
remotes_pay_locked (struct nbdm *v)
{
  uint64_t nr = v->nr_regions, region;

  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    struct remote *r = &v->remotes[i];

    for (region = 0;
         (region = bitmap_next_set (&r->disk.dm.owed, region, nr)) < nr;
         region++)
      if (other_has_locked (r, region))
        dirty_map_pay (&r->disk.dm, region);
    if (r->state == NBDM_IN_SYNC)
      remote_update_state_locked (r);
  }
}

/* Every region keeps a source.  If local misses a region, "may differ from
 * local" does not speak against the remote that was last written to.  If that
 * remote were dirty too, no disk would be left to read or to copy from.
 */
void
mark_regions_locked (struct remote *r, uint64_t first, uint64_t count,
                     bool late)
{
  const struct bitmap *missing = &r->disk.volume->local.disk.dm.map[MAP_DIRTY];
  uint64_t end = first + count;

  if (missing->nr_set == 0) {
    dirty_map_mark (&r->disk.dm, first, count, late);
    return;
  }
  while (first < end) {
    uint64_t next = bitmap_next_set (missing, first, end);

    if (next > first)
      dirty_map_mark (&r->disk.dm, first, next - first, late);
    first = bitmap_next_clear (missing, next, end);
    for (; next < first; next++)
      if (other_has_locked (r, next))
        dirty_map_mark (&r->disk.dm, next, 1, late);
      else
        keep_source_locked (r, next, late);
  }
}

/* What is still unflushed has no other source: its server may have it in its
 * cache alone.  The flusher makes it durable once the remote is back.
 */
static void
keep_unflushed_locked (struct remote *r)
{
  struct bitmap *map = &r->disk.dm.map[MAP_UNFLUSHED0 + r->filling];
  struct bitmap *other = &r->disk.dm.map[MAP_UNFLUSHED0 + (r->filling ^ 1)];

  bitmap_merge (map, other);
  atomic_signal_fence (memory_order_seq_cst);
  bitmap_clear_all (other);
  r->unflushed_ns = 0;
}

void
unflushed_lost_locked (struct remote *r)
{
  uint64_t nr = r->disk.volume->nr_regions, region = 0;
  struct dirty_map *dm = &r->disk.dm;

  if (r->disk.volume->local.disk.dm.map[MAP_DIRTY].nr_set == 0) {
    dirty_map_lost (dm);
    return;
  }
  /* In two steps: after a kill between them the bits are in both maps. */
  for (int i = MAP_UNFLUSHED0; i <= MAP_UNFLUSHED1; i++, region = 0) {
    const struct bitmap *map = &dm->map[i];

    while ((region = bitmap_next_set (map, region, nr)) < nr) {
      uint64_t next = bitmap_next_clear (map, region, nr);
      mark_regions_locked (r, region, next - region, false);
      dirty_map_mark_lost (dm, region, next - region);
      region = next;
    }
    atomic_signal_fence (memory_order_seq_cst);
    fault_point ("lost_merged");
    dirty_map_settle (dm, i);
  }
  keep_unflushed_locked (r);
  bitmap_clear_all (&dm->copied);
  dm->changed = true;
}

void
mark_dirty_locked (struct remote *r, uint64_t offset, uint64_t length,
                   bool late)
{
  uint64_t first, count;

  region_span (r->disk.volume, offset, length, &first, &count);
  mark_regions_locked (r, first, count, late);
}

void
remote_set_locked (struct remote *r, enum nbdm_remote_state state,
                   const char *fmt, ...)
{
  va_list args;

  va_start (args, fmt);
  vsnprintf (r->disk.reason, sizeof r->disk.reason, fmt, args);
  va_end (args);
  disk_changed_locked (&r->disk, r->state != state);
  r->state = state;
}

bool
remote_used_locked (const struct remote *r)
{
  return r->state == NBDM_IN_SYNC || r->state == NBDM_HOLDING
         || r->state == NBDM_RESYNCING;
}

/* The state to store for a restart.  A connection does not outlive the process,
 * so the dirty map determines holding and resyncing.
 */
static uint32_t
persistent_state (const struct remote *r)
{
  if (r->disk.volume->secondary)
    return r->kept_state;
  if (r->state == NBDM_FAILED)
    return NBDM_FAILED;
  if (r->state == NBDM_OUT_OF_SYNC || r->disk.dm.map[MAP_DIRTY].nr_set > 0
      || !node_has_generation_locked (r))
    return NBDM_OUT_OF_SYNC;
  return NBDM_IN_SYNC;
}

static struct disk_remote
disk_remote (const struct remote *r)
{
  struct disk_remote disk = {
    .state = htole32 (persistent_state (r)),
    .flags = htole32 ((r->disk.paused ? REMOTE_PAUSED : 0)
                      | (r->assumed ? REMOTE_ASSUMED : 0)),
    .generation = htole64 (r->generation),
    .since = (int64_t)htole64 ((uint64_t)r->disk.since),
    .address = htole64 (r->address),
  };

  snprintf (disk.name, sizeof disk.name, "%s", r->disk.name);
  snprintf (disk.reason, sizeof disk.reason, "%s", r->disk.reason);
  return disk;
}

int
command_gate_locked (const struct nbdm *v)
{
  return v->stopping ? set_message (-ESHUTDOWN, "the volume is stopping") : 0;
}

int
volume_persist_locked (struct nbdm *v)
{
  int rc = 0;

  if (v->failed)
    return -EIO;
  if (v->closed)
    return command_gate_locked (v);
  FOR_EACH_DISK (d, v)
    if (rc == 0)
      rc = dirty_map_persist (&d->dm);
  if (rc == 0) {
    memset (v->sb.remotes, 0, sizeof v->sb.remotes);
    for (uint32_t i = 0; i < v->nr_remotes; i++)
      v->sb.remotes[i] = disk_remote (&v->remotes[i]);
    v->sb.nr_remotes = htole32 (v->nr_remotes);
    v->sb.generation = htole64 (v->generation);
    node_put_locked (v);
    v->sb.local_state = htole32 (local_persistent_state (v));
    v->sb.local_since = (int64_t)htole64 ((uint64_t)v->local.disk.since);
    snprintf (v->sb.local_reason, sizeof v->sb.local_reason, "%s",
              v->local.disk.reason);
    v->sb.flags = htole32 ((v->stopped ? SUPERBLOCK_CLEAN : 0)
                           | (v->fenced ? SUPERBLOCK_FENCED : 0)
                           | (local_undecided (v) ? SUPERBLOCK_UNDECIDED : 0));
    rc = superblock_store (v->sb_fd, &v->sb, &v->nodes);
    v->superblock_persists++;
  }
  if (rc < 0)
    volume_fail_locked (v, last_error ());
  return rc;
}

/* The kernel may have dropped the pages that it could not write, including
 * pages of our mappings.  So the next start must not treat the page cache as
 * exact, but recover as after lost power.  No boot has the id 0.  A file
 * records this too: the store may fail, and its slot may be garbled later.
 * Both are best effort, because the volume has failed already.
 */
static void
distrust_page_cache (struct nbdm *v)
{
  memset (v->sb.boot_id, 0, sizeof v->sb.boot_id);
  /* The store that failed may be the one that was to set the flag. */
  v->sb.flags &= htole32 (~(uint32_t)SUPERBLOCK_CLEAN);
  superblock_store (v->sb_fd, &v->sb, &v->nodes);
  (void)volume_note (v, DISTRUST_FILE);
}

/* No fsync: see state.h. */
bool
volume_note (const struct nbdm *v, const char *file)
{
  int fd = openat (v->dirfd, file, O_WRONLY | O_CREAT | PLAIN_FILE, 0600);

  if (fd >= 0)
    close (fd);
  return fd >= 0;
}

void
volume_distrust_locked (struct nbdm *v)
{
  if (volume_note (v, DISTRUST_FILE))
    return;
  memset (v->sb.boot_id, 0, sizeof v->sb.boot_id);
  (void)superblock_store (v->sb_fd, &v->sb, &v->nodes);
}

void
volume_trust_locked (struct nbdm *v)
{
  memcpy (v->sb.boot_id, v->boot_id, sizeof v->sb.boot_id);
  if (volume_persist_locked (v) == 0)
    (void)volume_forget_note (v, DISTRUST_FILE);
}

bool
volume_noted (const struct nbdm *v, const char *file)
{
  return faccessat (v->dirfd, file, F_OK, 0) == 0;
}

int
volume_forget_note (const struct nbdm *v, const char *file)
{
  if (unlinkat (v->dirfd, file, 0) < 0 && errno != ENOENT)
    return set_error (-errno, "cannot remove the file \"%s\" of the state",
                      file);
  return 0;
}

void
volume_fail_locked (struct nbdm *v, const char *why)
{
  size_t length;

  /* After a clean stop nothing is left that could be lost. */
  if (v->failed || v->closed)
    return;
  v->failed = true;
  length = strnlen (why, sizeof v->reason - 1);
  memmove (v->reason, why, length);
  v->reason[length] = '\0';
  fault_point ("volume_failing");
  distrust_page_cache (v);
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    disk_bump_locked (&v->remotes[i].disk);
  pthread_cond_broadcast (&v->changed);
}

/* Every admitted request whose answer depends on this remote: the remote may or
 * may not get it, and if it was sent, it may arrive late (rule 12).
 */
static void
strand_requests_locked (struct remote *r)
{
  const struct request *req;

  LIST_FOREACH (req, &r->disk.volume->requests, link) {
    const struct leg *leg = &req->legs[remote_index (r)];
    if (leg->active)
      mark_dirty_locked (r, req->offset, req->length, leg->sent);
  }
}

static bool
requests_need_locked (const struct remote *r)
{
  const struct request *req;

  LIST_FOREACH (req, &r->disk.volume->requests, link)
    if (req->legs[remote_index (r)].active)
      return true;
  return false;
}

/* In a volume of nodes only nodes count, and the record says which: node.c. */
static bool
node_advance_locked (struct nbdm *v, struct remote *r)
{
  if (r->disk.is_node)
    return node_missed_locked (v, r);
  r->generation = 0;
  volume_persist_locked (v);
  return true;
}

bool
generation_advance_locked (struct nbdm *v, struct remote *r)
{
  uint64_t next = 0;

  if (!r->disk.is_node && r->generation != v->generation)
    return false;
  if (v->has_nodes)
    return node_advance_locked (v, r);
  while (next == 0 || next == v->generation)
    if (getrandom (&next, sizeof next, 0) != (ssize_t)sizeof next)
      next = v->generation + 1;
  memmove (&v->sb.history[1], &v->sb.history[0],
           sizeof v->sb.history - sizeof v->sb.history[0]);
  v->sb.history[0] = htole64 (v->generation);
  /* The other remotes in sync get this write, and join the new generation. */
  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    struct remote *other = &v->remotes[i];
    if (other != r
        && (other->state == NBDM_IN_SYNC || other->state == NBDM_HOLDING))
      other->generation = next;
  }
  v->generation = next;
  fault_point ("generation_new");
  volume_persist_locked (v);
  return true;
}

void
remote_degrade_locked (struct remote *r)
{
  struct nbdm *v = r->disk.volume;
  bool writes = requests_need_locked (r);
  char why[NBDM_REASON_LEN];

  snprintf (why, sizeof why, "%s", r->disk.reason);
  strand_requests_locked (r);
  remote_set_locked (r, NBDM_OUT_OF_SYNC, "%s", why);
  fault_point ("degrade_marked");
  if (v->policy == NBDM_STOP)
    v->fenced = true;
  if (!writes || !generation_advance_locked (v, r))
    volume_persist_locked (v);
}

/* Give up the connection.  What the remote answered and did not flush becomes
 * dirty, because a server that died may have lost it (rule 4).
 */
static void
detach_locked (struct remote *r)
{
  struct conn *conn = r->conn;

  r->commands += conn_report (conn).answered;
  r->conn = NULL;
  if (r->admitted) {
    strand_requests_locked (r);
    fault_point ("lost_stranded");
    unflushed_lost_locked (r);
    /* Only local may have these regions now, whatever the takeover is for. */
    if (r->disk.dm.owed.nr_set > 0)
      volume_persist_locked (r->disk.volume);
  }
  backlog_forget_locked (r);
  r->admitted = false;
  conn_put (conn);
  disk_changed_locked (&r->disk, false);
}

void
remote_lost_locked (struct remote *r, struct conn *conn)
{
  bool admitted = r->admitted;
  struct conn_report report;

  if (conn == NULL || r->conn != conn)
    return;
  report = conn_report (conn);
  backlog_lost_locked (r, &report);
  detach_locked (r);
  if (!admitted)
    return;
  /* After a passed deadline clients have waited long enough: add no hold.  And
   * once the volume stops, no keeper connects again.
   */
  if (r->state == NBDM_IN_SYNC && r->disk.volume->hold_ms > 0 && !report.overdue
      && !r->disk.volume->stopping) {
    r->hold_until_ns = now_ns () + r->disk.volume->hold_ms * NS_PER_MS;
    remote_set_locked (r, NBDM_HOLDING, "%s", report.why);
  }
  else if (remote_used_locked (r)) {
    disk_explain_locked (&r->disk, "%s", report.why);
    remote_degrade_locked (r);
  }
}

void
remote_broken_locked (struct remote *r, struct conn *conn, const char *why)
{
  bool admitted = r->admitted;

  if (r->conn == NULL || r->conn != conn)
    return;
  conn_kill (conn, why);
  detach_locked (r);
  if (r->state == NBDM_FAILED)
    return;
  disk_explain_locked (&r->disk, "%s", why);
  /* A connection that was never admitted does not end the hold. */
  if (admitted && remote_used_locked (r))
    remote_degrade_locked (r);
}

bool
remote_unaware_locked (const struct remote *r)
{
  return r->disk.is_node && r->admitted && !r->filled;
}

/* As a connection that is lost: the hold lasts until the two have met again. */
static void
meet_again_locked (struct remote *r, const char *why)
{
  conn_kill (r->conn, why);
  remote_lost_locked (r, r->conn);
}

void
remote_lacks_locked (struct remote *r, const char *fmt, ...)
{
  char why[NBDM_REASON_LEN];
  va_list args;

  va_start (args, fmt);
  vsnprintf (why, sizeof why, fmt, args);
  va_end (args);
  if (remote_unaware_locked (r))
    meet_again_locked (r, why);
  else
    remote_set_locked (r, NBDM_RESYNCING, "%s", why);
}

void
lift_fence_locked (struct nbdm *v)
{
  if (v->local.state != NBDM_LOCAL_OK)
    return;
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    if (v->remotes[i].state != NBDM_IN_SYNC)
      return;
  v->fenced = false;
}

void
remote_update_state_locked (struct remote *r)
{
  struct nbdm *v = r->disk.volume;

  if (!r->admitted || v->failed)
    return;
  if (r->disk.dm.map[MAP_DIRTY].nr_set > 0 && remote_unaware_locked (r)) {
    remote_lacks_locked (r, "it lacks a region that it was not told of");
    return;
  }
  if (r->disk.dm.map[MAP_DIRTY].nr_set > 0 || !node_counted_locked (r)) {
    if (r->state != NBDM_RESYNCING) {
      remote_set_locked (r, NBDM_RESYNCING, "%s", "");
      volume_persist_locked (v);
    }
    return;
  }
  if (r->state == NBDM_IN_SYNC)
    return;
  r->generation = v->generation;
  r->leaves_zeroes = false;
  remote_set_locked (r, NBDM_IN_SYNC, "%s", "");
  lift_fence_locked (v);
  fault_point ("settle_in_sync");
  volume_persist_locked (v);
}
