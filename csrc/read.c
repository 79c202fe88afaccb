/* SPDX-License-Identifier: BSD-3-Clause */

/* Reads, and what else leaves the disks as they are.
 *
 * Reads come from the local disk and take no lock: a read beside a write of
 * the same range may see either, as on any disk.  Where local cannot read, a
 * remote that misses no answered write of the range is asked (rule 11: a
 * dirty region is never read from it).
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>

#include "internal.h"
#include "volume.h"

/* A reference to its connection if the whole range is clean there. */
static struct conn *
clean_conn (struct remote *r, uint64_t count, uint64_t offset)
{
  struct nbdm *v = r->volume;
  struct conn *conn = NULL;
  uint64_t first, nr;

  region_span (v, offset, count, &first, &nr);
  pthread_mutex_lock (&v->lock);
  if (r->admitted
      && bitmap_next_set (&r->dm.map[MAP_DIRTY], first, first + nr)
             == first + nr)
    conn = conn_get (r->conn);
  pthread_mutex_unlock (&v->lock);
  return conn;
}

static int
remote_pread (struct remote *r, uint8_t *buf, uint64_t count, uint64_t offset)
{
  struct conn *conn = clean_conn (r, count, offset);
  int rc;

  if (conn == NULL)
    return -ENOTCONN;
  rc = conn_pread (conn, buf, count, offset);
  conn_put (conn);
  return rc;
}

static int
any_remote_pread (struct nbdm *v, void *buf, uint64_t count, uint64_t offset)
{
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    if (remote_pread (&v->remotes[i], buf, count, offset) == 0)
      return 0;
  return -EIO;
}

int
nbdm_pread (struct nbdm *v, void *buf, uint32_t count, uint64_t offset)
{
  int rc = check_range (v, count, offset);

  if (rc < 0)
    return rc;
  /* After a failed flush local may have lost what it answered. */
  rc = atomic_load (&v->local_doubted)
           ? any_remote_pread (v, buf, count, offset)
           : -EIO;
  if (rc < 0)
    rc = local_pread (v, buf, count, offset);
  if (rc < 0) {
    local_failed (v, last_error ());
    if (any_remote_pread (v, buf, count, offset) == 0)
      rc = 0;
  }
  atomic_fetch_add (&v->reads, 1);
  return rc;
}

int
nbdm_cache (struct nbdm *v, uint64_t count, uint64_t offset)
{
  int rc = check_range (v, count, offset);

  /* Advice: that it could not be taken is no reason to fail. */
  if (rc == 0)
    (void)posix_fadvise (v->local_fd, (off_t)offset, (off_t)count,
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
  return (int)nr;
}
