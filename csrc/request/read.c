/* SPDX-License-Identifier: BSD-3-Clause */

/* Reads, and other requests that do not change the disks.
 *
 * Reads come from the local disk and take no lock: a read beside a write of the
 * same range may see either, as on any disk.  Where local cannot read, or
 * misses something, the read goes region by region: from a remote that misses
 * no answered write of the region (rule 11: a dirty region is never read from
 * it).  The read waits for such a remote while it is on hold.
 *
 * Such a read waits for the writes under way to its range, and holds the range.
 * Otherwise the disk that serves a region could change during a write that only
 * one of two disks has carried out, and a client that has read the new bytes
 * would read the old ones again.  While the range is held, all disks that have
 * the region hold the same bytes.
 */

#include <errno.h>
#include <stdlib.h>

#include "api.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/latency.h"
#include "base/lock.h"
#include "logs/bitmap.h"
#include "logs/layout.h"
#include "logs/rangelock.h"
#include "request/engine.h"
#include "request/read.h"
#include "request/sector.h"
#include "volume/local.h"
#include "volume/local_state.h"
#include "volume/policy.h"
#include "volume/state.h"
#include "volume/volume.h"
#include "wire/conn.h"
#include "wire/transport.h"

static bool
any_set (const struct remote *r, const struct bitmap *map, uint64_t count,
         uint64_t offset)
{
  uint64_t first, nr;

  region_span (r->disk.volume, offset, count, &first, &nr);
  return bitmap_next_set (map, first, first + nr) < first + nr;
}

/* A remote that has the range, with a reference to its connection.  `refused`
 * has a bit for each remote that has answered an error: it is not returned.
 * NULL: no remote has the range.
 */
static struct remote *
find_source (struct nbdm *v, const struct remote *except, uint64_t count,
             uint64_t offset, uint32_t refused, struct conn **conn)
{
  struct remote *found = NULL;
  bool held = true;

  LOCK_FOR_SCOPE (&v->lock);
  while (held && found == NULL) {
    held = false;
    for (uint32_t i = 0; i < v->nr_remotes && found == NULL; i++) {
      struct remote *r = &v->remotes[i];

      if (r == except || refused >> i & 1
          || any_set (r, &r->disk.dm.map[MAP_DIRTY], count, offset))
        continue;
      if (any_set (r, &r->disk.dm.owed, count, offset)) {
        held = true; /* after the takeover it is known which disk has it */
        continue;
      }
      if (r->admitted)
        found = r;
      held = held || (r->state == NBDM_HOLDING && !v->failed && !v->stopping);
    }
    if (found)
      *conn = conn_get (found->conn);
    else if (held)
      pthread_cond_wait (&v->changed, &v->lock);
  }
  return found;
}

static int
remotes_pread (struct nbdm *v, const struct remote *except, void *buf,
               uint64_t count, uint64_t offset)
{
  uint32_t refused = 0, losses = 0;
  struct remote *r;
  struct conn *conn;
  int rc;

  while (losses < MAX_LOSSES
         && (r = find_source (v, except, count, offset, refused, &conn))) {
    rc = conn_pread (conn, buf, count, offset);
    if (rc == -ENOTCONN || rc == -ESHUTDOWN) {
      losses++;
      pthread_mutex_lock (&v->lock);
      conn_kill (conn, "the connection was lost during a read");
      remote_lost_locked (r, conn);
      pthread_mutex_unlock (&v->lock);
    }
    conn_put (conn);
    if (rc == 0)
      return 0;
    if (rc != -ENOTCONN && rc != -ESHUTDOWN)
      refused |= 1u << remote_index (r);
  }
  return -EIO;
}

static bool
has_region (struct nbdm *v, uint64_t region)
{
  LOCK_FOR_SCOPE (&v->lock);
  return local_has_locked (v, region);
}

/* The same, after the end of any takeover. */
static bool
given_back (struct nbdm *v, uint64_t region)
{
  LOCK_FOR_SCOPE (&v->lock);
  while (v->local.taking_over)
    pthread_cond_wait (&v->changed, &v->lock);
  return local_has_locked (v, region);
}

/* Local could not read bytes that a remote could. */
static void
mend (struct nbdm *v, uint64_t region)
{
  if (local_check_size (v) < 0)
    local_give_up (v); /* nothing is repaired on a disk that lost bytes */
  else
    local_miss_regions (v, region, 1);
}

#define PROBE_BYTES (64u << 10)

static bool
can_read (struct nbdm *v, uint64_t region, uint8_t *buf)
{
  uint64_t at = region * v->region_size, n;
  uint64_t left = v->size - at < v->region_size ? v->size - at : v->region_size;
  int rc = 0;

  for (; left > 0 && rc == 0; left -= n, at += n) {
    n = left < PROBE_BYTES ? left : PROBE_BYTES;
    rc = local_pread (v, buf, n, at);
  }
  return rc == 0;
}

/* A bad sector may take seconds to be read: after the first bad region the rest
 * counts as bad too, and is only rewritten.
 */
void
miss_unreadable (struct nbdm *v, uint64_t count, uint64_t offset)
{
  uint8_t *buf = malloc (PROBE_BYTES);
  uint64_t first, nr, end;

  region_span (v, offset, count, &first, &nr);
  end = first + nr;
  while (buf && first < end && can_read (v, first, buf))
    first++;
  if (atomic_load (&v->local.file.shrunk))
    local_miss_regions (v, 0, v->nr_regions);
  else if (buf && first < end)
    local_miss_regions (v, first, end - first);
  free (buf);
}

/* `*had`: local had the region. */
static int
try_region (struct nbdm *v, const struct remote *except, void *buf,
            uint64_t count, uint64_t offset, bool *had)
{
  uint64_t region = offset / v->region_size;
  bool on_local;
  int rc;

  *had = true;
  /* Local may have lost writes: ask a remote that has the region first. */
  if (local_doubted (v) && remotes_pread (v, except, buf, count, offset) == 0)
    return 0;
  *had = on_local = has_region (v, region);
  if (on_local) {
    rc = local_pread (v, buf, count, offset);
    if (rc < 0)
      local_note_error (v, rc);
    else if (has_region (v, region))
      return 0;
    else
      on_local = false; /* it has failed in between */
  }
  rc = remotes_pread (v, except, buf, count, offset);
  if (rc == 0 && on_local)
    mend (v, region);
  return rc;
}

/* Read one region or a part of it.  The local disk is not replaced during this.
 */
static int
region_pread (struct nbdm *v, const struct remote *except, void *buf,
              uint64_t count, uint64_t offset)
{
  bool had, doubted = local_doubted (v);
  int rc = try_region (v, except, buf, count, offset, &had);

  /* Local may have lost during the read what was read. */
  if (rc == 0 && !doubted && local_doubted (v))
    rc = try_region (v, except, buf, count, offset, &had);
  /* A takeover made local miss the region and then failed. */
  if (rc < 0 && !had && given_back (v, offset / v->region_size))
    rc = try_region (v, except, buf, count, offset, &had);
  if (rc < 0)
    return set_message (-EIO,
                        "no disk that has every answered write can read at "
                        "%llu",
                        (unsigned long long)offset);
  return 0;
}

static void
hold_range (struct nbdm *v, struct range *range)
{
  pthread_mutex_lock (&v->lock);
  rangelock_add (&v->ranges, range);
  while (range->blockers > 0)
    pthread_cond_wait (range->granted, &v->lock);
  pthread_mutex_unlock (&v->lock);
}

static void
release_range (struct nbdm *v, struct range *range)
{
  pthread_mutex_lock (&v->lock);
  rangelock_remove (&v->ranges, range);
  pthread_mutex_unlock (&v->lock);
}

/* Take the disk only once the range is held: a write may hold the range while
 * it waits for a remote, and an operator's command waits for the disk's users.
 */
static int
part_pread (struct nbdm *v, const struct remote *except, void *buf,
            uint64_t count, uint64_t offset, bool is_held)
{
  pthread_cond_t granted = PTHREAD_COND_INITIALIZER;
  struct range range = {
    .offset = offset, .length = count, .shared = true, .granted = &granted
  };
  int rc;

  if (!is_held)
    hold_range (v, &range);
  local_use (v);
  rc = region_pread (v, except, buf, count, offset);
  local_leave ();
  if (!is_held)
    release_range (v, &range);
  return rc;
}

static int
any_pread (struct nbdm *v, const struct remote *except, void *buf,
           uint64_t count, uint64_t offset, bool is_held)
{
  uint8_t *at = buf;
  int rc = 0;

  if (local_pread_believed (v, buf, count, offset))
    return 0;
  while (count > 0 && rc == 0) {
    uint64_t n = v->region_size - offset % v->region_size;

    n = n < count ? n : count;
    rc = part_pread (v, except, at, n, offset, is_held);
    at += n;
    offset += n;
    count -= n;
  }
  return rc;
}

int
source_pread (struct nbdm *v, const struct remote *except, void *buf,
              uint64_t count, uint64_t offset)
{
  return any_pread (v, except, buf, count, offset, true);
}

int
client_pread (struct nbdm *v, void *buf, uint64_t count, uint64_t offset)
{
  return any_pread (v, NULL, buf, count, offset, false);
}

int
nbdm_pread (struct nbdm *v, void *buf, uint32_t count, uint64_t offset)
{
  uint64_t start = now_ns ();
  int rc = check_range (v, count, offset);

  if (rc == 0)
    rc = fenced_read_check (v);
  if (rc < 0)
    return rc;
  rc = in_sectors (v, count, offset) ? client_pread (v, buf, count, offset)
                                     : parts_pread (v, buf, count, offset);
  latency_add (&v->latency, LATENCY_READ, start, now_ns ());
  atomic_fetch_add (&v->reads, 1);
  return rc;
}

/* One request of 28 bytes may ask for 4 GiB, and a client for many at once:
 * they must keep neither all threads of a door nor all of the disk from the
 * reads of other clients.
 */
#define MAX_ADVISING 4u

int
nbdm_cache (struct nbdm *v, uint64_t count, uint64_t offset)
{
  int rc = check_range (v, count, offset);

  /* It is only advice, so one that is left out or fails is no error. */
  if (atomic_fetch_add (&v->advising, 1) < MAX_ADVISING && rc == 0
      && atomic_load (&v->local.state) != NBDM_LOCAL_FAILED) {
    local_use (v);
    local_advise (v, count < NBDM_MAX_REQUEST ? count : NBDM_MAX_REQUEST,
                  offset);
    local_leave ();
  }
  atomic_fetch_sub (&v->advising, 1);
  return rc;
}

int
nbdm_extents (struct nbdm *v, uint64_t count, uint64_t offset,
              struct nbdm_extent *extents, uint32_t max)
{
  uint64_t end = offset + count;
  uint32_t nr = 0;
  int rc = check_range (v, count, offset);

  if (rc == 0)
    rc = fenced_read_check (v); /* a hole reveals as much as a read */
  if (rc < 0)
    return rc;
  while (offset < end && nr < max) {
    uint64_t hole_end = local_hole_end (v, offset, end);
    bool hole = hole_end > offset;
    uint64_t next = hole ? hole_end : local_data_end (v, offset, end);

    extents[nr++] = (struct nbdm_extent){ .offset = offset,
                                          .length = next - offset,
                                          .type = hole ? NBDM_EXTENT_HOLE
                                                       : NBDM_EXTENT_DATA };
    offset = next;
  }
  /* The disk may have failed at any time, and lost data before that was
   * noticed.
   */
  if (nr > 0 && !local_believed (v)) {
    extents[0] = (struct nbdm_extent){ end - count, count, NBDM_EXTENT_DATA };
    return 1;
  }
  return (int)nr;
}
