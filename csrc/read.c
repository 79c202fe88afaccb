/* SPDX-License-Identifier: BSD-3-Clause */

/* Reads, and what else leaves the disks as they are.
 *
 * Reads come from the local disk and take no lock: a read beside a write of
 * the same range may see either, as on any disk.  Where local cannot read, or
 * misses something, the way is region by region: from a remote that misses no
 * answered write of it (rule 11: a dirty region is never read from it), which
 * is waited for while its connection is on hold.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>

#include "internal.h"
#include "volume.h"

/* A read that loses connection after connection gives up: a server that dies
 * of it must not hang the client.
 */
#define MAX_LOSSES 4

static bool
has_range_locked (const struct remote *r, uint64_t count, uint64_t offset)
{
  uint64_t first, nr;

  region_span (r->volume, offset, count, &first, &nr);
  return bitmap_next_set (&r->dm.map[MAP_DIRTY], first, first + nr)
         == first + nr;
}

/* A remote that has the range, with a reference to its connection; `nr`-th of
 * those, as one may have answered an error.  NULL: nobody.
 */
static struct remote *
find_source (struct nbdm *v, const struct remote *except, uint64_t count,
             uint64_t offset, uint32_t nr, struct conn **conn)
{
  struct remote *found = NULL;
  bool held = true;

  pthread_mutex_lock (&v->lock);
  while (held && found == NULL) {
    uint32_t skip = nr;

    held = false;
    for (uint32_t i = 0; i < v->nr_remotes && found == NULL; i++) {
      struct remote *r = &v->remotes[i];

      if (r == except || !has_range_locked (r, count, offset))
        continue;
      if (r->admitted && skip-- == 0)
        found = r;
      held = held || (r->state == NBDM_HOLDING && !v->failed && !v->stopping);
    }
    if (found)
      *conn = conn_get (found->conn);
    else if (held)
      pthread_cond_wait (&v->changed, &v->lock);
  }
  pthread_mutex_unlock (&v->lock);
  return found;
}

static int
remotes_pread (struct nbdm *v, const struct remote *except, void *buf,
               uint64_t count, uint64_t offset)
{
  uint32_t errors = 0, losses = 0;
  struct remote *r;
  struct conn *conn;
  int rc;

  while (losses < MAX_LOSSES
         && (r = find_source (v, except, count, offset, errors, &conn))) {
    rc = conn_pread (conn, buf, count, offset);
    if (rc == -ENOTCONN || rc == -ESHUTDOWN) {
      losses++;
      pthread_mutex_lock (&v->lock);
      conn_kill (conn, "the connection was lost over a read");
      remote_lost_locked (r, conn);
      pthread_mutex_unlock (&v->lock);
    }
    conn_put (conn);
    if (rc == 0)
      return 0;
    if (rc != -ENOTCONN && rc != -ESHUTDOWN)
      errors++;
  }
  return -EIO;
}

/* One region, or a part of one. */
static int
region_pread (struct nbdm *v, const struct remote *except, void *buf,
              uint64_t count, uint64_t offset)
{
  uint64_t region = offset / v->region_size;
  bool on_local;
  int rc;

  pthread_mutex_lock (&v->lock);
  on_local = local_has_locked (v, region);
  pthread_mutex_unlock (&v->lock);
  if (atomic_load (&v->local.doubted)
      && remotes_pread (v, except, buf, count, offset) == 0)
    return 0;
  if (on_local) {
    rc = local_pread (v, buf, count, offset);
    if (rc == 0)
      return 0;
    local_note_error (v);
  }
  rc = remotes_pread (v, except, buf, count, offset);
  if (rc == 0 && on_local)
    local_miss_region (v, region);
  if (rc < 0)
    return set_message (-EIO,
                        "no disk that has every answered write can read at "
                        "%llu",
                        (unsigned long long)offset);
  return 0;
}

int
source_pread (struct nbdm *v, const struct remote *except, void *buf,
              uint64_t count, uint64_t offset)
{
  uint8_t *at = buf;
  int rc = 0;

  if (atomic_load (&v->local.state) == NBDM_LOCAL_OK
      && !atomic_load (&v->local.doubted)
      && local_pread (v, buf, count, offset) == 0)
    return 0;
  while (count > 0 && rc == 0) {
    uint64_t n = v->region_size - offset % v->region_size;

    n = n < count ? n : count;
    rc = region_pread (v, except, at, n, offset);
    at += n;
    offset += n;
    count -= n;
  }
  return rc;
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
  rc = source_pread (v, NULL, buf, count, offset);
  latency_add (&v->latency, LATENCY_READ, start, now_ns ());
  atomic_fetch_add (&v->reads, 1);
  return rc;
}

int
nbdm_cache (struct nbdm *v, uint64_t count, uint64_t offset)
{
  int rc = check_range (v, count, offset);

  /* Advice: that it could not be taken is no reason to fail. */
  if (rc == 0)
    (void)posix_fadvise (v->local.disk.fd, (off_t)offset, (off_t)count,
                         POSIX_FADV_WILLNEED);
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
    rc = fenced_read_check (v); /* that it is a hole is what a read tells */
  if (rc < 0)
    return rc;
  /* Its holes say nothing about what it misses. */
  if ((atomic_load (&v->local.state) != NBDM_LOCAL_OK
       || atomic_load (&v->local.doubted))
      && max > 0) {
    extents[0] = (struct nbdm_extent){ offset, count, NBDM_EXTENT_DATA };
    return 1;
  }
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
  return (int)nr;
}
