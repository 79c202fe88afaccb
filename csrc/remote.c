/* SPDX-License-Identifier: BSD-3-Clause */

/* A remote's comings and goings: what the policy threads call.
 *
 * A new connection is used for nothing until it is admitted, because the disk
 * behind it may not be the one that was left.  The engine compares single
 * regions; which ones, and what a difference means, is policy.
 */

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "internal.h"
#include "volume.h"

static struct remote *
find (struct nbdm *v, uint32_t index)
{
  return index < v->nr_remotes ? &v->remotes[index] : NULL;
}

#define FIND_OR_RETURN(r, v, index)                                            \
  struct remote *r = find (v, index);                                          \
  if (r == NULL)                                                               \
  return set_message (-EINVAL, "there is no remote %u", index)

static int
check_server (const struct nbdm *v, const struct conn_info *info)
{
  if (info->size < v->size)
    return set_message (
        -ERANGE, "its disk has %llu bytes, the volume %llu: too small",
        (unsigned long long)info->size, (unsigned long long)v->size);
  if (info->read_only)
    return set_message (-EROFS, "it exports the disk read-only");
  if (info->min_block > nbdm_min_block (v))
    return set_message (-EINVAL,
                        "it takes blocks of %u bytes, the volume's are %u",
                        info->min_block, nbdm_min_block (v));
  return 0;
}

int
nbdm_remote_connect (struct nbdm *v, uint32_t index, const char *uri,
                     uint32_t timeout_ms)
{
  FIND_OR_RETURN (r, v, index);
  struct conn *conn;
  int rc = conn_open (uri, timeout_ms, &conn);

  if (rc < 0)
    return rc;
  rc = check_server (v, conn_info (conn));
  pthread_mutex_lock (&v->lock);
  r->remote_size = conn_info (conn)->size;
  if (rc == 0 && v->stopping)
    rc = set_message (-ESHUTDOWN, "the volume is stopping");
  if (rc == 0 && r->conn)
    rc = set_message (-EISCONN, "already connected");
  if (rc == 0)
    r->conn = conn_get (conn);
  pthread_mutex_unlock (&v->lock);
  if (rc < 0)
    conn_farewell (conn);
  conn_put (conn);
  return rc;
}

/* Take the region's range lock if nobody has it, and the connection. */
static int
compare_begin (struct remote *r, uint64_t region, struct range *range,
               struct conn **conn)
{
  struct nbdm *v = r->volume;
  int rc = 0;

  pthread_mutex_lock (&v->lock);
  if (r->conn == NULL)
    rc = set_message (-ENOTCONN, "the connection was lost");
  else if (bitmap_test (&r->dm.map[MAP_DIRTY], region)
           || bitmap_test (&v->local.dm.map[MAP_DIRTY], region))
    rc = set_message (-EAGAIN, "the region is dirty");
  else if (v->local.state == NBDM_LOCAL_FAILED && !v->local.attached)
    rc = set_message (-EAGAIN, "the local disk is not open");
  else if (!rangelock_try (&v->ranges, range))
    rc = set_message (-EBUSY, "a request holds the region");
  else
    *conn = conn_get (r->conn);
  pthread_mutex_unlock (&v->lock);
  return rc;
}

static int
compare_bytes (struct nbdm *v, struct conn *conn, const struct range *range,
               uint8_t *ours, uint8_t *theirs)
{
  int rc = conn_pread (conn, theirs, range->length, range->offset);

  if (rc < 0)
    return set_message (rc, "it answered a read at %llu with: %s",
                        (unsigned long long)range->offset, strerror (-rc));
  rc = local_pread (v, ours, range->length, range->offset);
  if (rc == 0)
    return memcmp (ours, theirs, range->length) != 0;
  /* A bad sector of ours says nothing about the remote, which is needed to
   * write it anew.
   */
  local_note_error (v);
  return -ENODATA;
}

int
nbdm_remote_compare (struct nbdm *v, uint32_t index, uint64_t region)
{
  FIND_OR_RETURN (r, v, index);
  uint64_t offset = region * v->region_size;
  struct range range = { .offset = offset, .length = v->region_size };
  struct conn *conn = NULL;
  uint8_t *buf;
  int rc;

  if (region >= v->nr_regions)
    return set_message (-EINVAL, "there is no region %llu",
                        (unsigned long long)region);
  if (range.length > v->size - offset)
    range.length = v->size - offset;
  buf = malloc (2 * (size_t)range.length);
  if (buf == NULL)
    return set_error (-ENOMEM, "compare");
  rc = compare_begin (r, region, &range, &conn);
  if (rc == 0) {
    rc = compare_bytes (v, conn, &range, buf, buf + range.length);
    pthread_mutex_lock (&v->lock);
    rangelock_remove (&v->ranges, &range);
    pthread_mutex_unlock (&v->lock);
    conn_put (conn);
  }
  free (buf);
  return rc;
}

int
nbdm_remote_admit (struct nbdm *v, uint32_t index)
{
  FIND_OR_RETURN (r, v, index);
  int rc = 0;

  pthread_mutex_lock (&v->lock);
  if (r->conn == NULL || conn_dead (r->conn))
    rc = set_message (-ENOTCONN, "the connection was lost");
  else if (r->state == NBDM_FAILED)
    rc = set_message (-EPERM, "the remote has failed: %s", r->reason);
  else if (v->failed)
    rc = set_message (-EIO, "the volume has failed: %s", v->reason);
  else {
    r->admitted = true;
    r->flush.done = r->flush.asked; /* unflushed became dirty meanwhile */
    fault_point ("admitted");
    remote_settle_locked (r);
    remote_bump_locked (r);
    pthread_cond_broadcast (&v->changed);
  }
  pthread_mutex_unlock (&v->lock);
  return rc;
}

void
nbdm_remote_drop (struct nbdm *v, uint32_t index, const char *reason)
{
  struct remote *r = find (v, index);

  if (r == NULL)
    return;
  pthread_mutex_lock (&v->lock);
  remote_broken_locked (r, r->conn, reason);
  pthread_mutex_unlock (&v->lock);
}

int
nbdm_remote_explain (struct nbdm *v, uint32_t index, const char *reason)
{
  FIND_OR_RETURN (r, v, index);

  pthread_mutex_lock (&v->lock);
  if (!r->admitted && r->state != NBDM_FAILED)
    snprintf (r->reason, sizeof r->reason, "%s", reason);
  pthread_mutex_unlock (&v->lock);
  return 0;
}

int
nbdm_remote_fail (struct nbdm *v, uint32_t index, const char *reason)
{
  FIND_OR_RETURN (r, v, index);
  int rc;

  pthread_mutex_lock (&v->lock);
  remote_broken_locked (r, r->conn, reason);
  snprintf (r->reason, sizeof r->reason, "%s", reason);
  if (remote_used_locked (r))
    remote_degrade_locked (r); /* it was holding: end the wait, by the rules */
  remote_set_locked (r, NBDM_FAILED, "%s", reason);
  fault_point ("remote_failing");
  rc = volume_persist_locked (v);
  pthread_mutex_unlock (&v->lock);
  return rc;
}

int
nbdm_remote_reset (struct nbdm *v, uint32_t index)
{
  FIND_OR_RETURN (r, v, index);
  int rc = 0;

  pthread_mutex_lock (&v->lock);
  if (r->state == NBDM_FAILED) {
    remote_set_locked (r, NBDM_OUT_OF_SYNC, "an operator resumed it");
    rc = volume_persist_locked (v);
  }
  pthread_mutex_unlock (&v->lock);
  return rc;
}

int
nbdm_remote_pause (struct nbdm *v, uint32_t index, int paused)
{
  FIND_OR_RETURN (r, v, index);
  int rc;

  pthread_mutex_lock (&v->lock);
  r->paused = paused;
  remote_bump_locked (r);
  rc = volume_persist_locked (v);
  pthread_mutex_unlock (&v->lock);
  return rc;
}

int
nbdm_remote_invalidate (struct nbdm *v, uint32_t index)
{
  FIND_OR_RETURN (r, v, index);
  static const char why[] = "an operator made every region dirty";
  int rc;

  pthread_mutex_lock (&v->lock);
  if (v->local.state != NBDM_LOCAL_OK || v->local.taking_over) {
    pthread_mutex_unlock (&v->lock);
    return set_message (-EBUSY,
                        "the local disk is not ok: %s may be the only copy of "
                        "what it misses",
                        r->name);
  }
  dirty_map_mark (&r->dm, 0, v->nr_regions, false);
  fault_point ("invalidate_marked");
  r->assumed = false;
  if (r->admitted)
    remote_set_locked (r, NBDM_RESYNCING, "%s", why);
  else if (!remote_used_locked (r))
    remote_set_locked (r, NBDM_OUT_OF_SYNC, "%s", why);
  /* else it is holding: what waits is sent again or degrades as ever. */
  rc = volume_persist_locked (v);
  pthread_mutex_unlock (&v->lock);
  return rc;
}

int
nbdm_remote_release_late (struct nbdm *v, uint32_t index)
{
  FIND_OR_RETURN (r, v, index);

  pthread_mutex_lock (&v->lock);
  /* Not if it was lost meanwhile: what is late now is late from then on. */
  if (r->admitted)
    bitmap_clear_all (&r->dm.map[MAP_LATE]);
  fault_point ("late_released");
  remote_bump_locked (r);
  pthread_mutex_unlock (&v->lock);
  return 0;
}

static uint64_t
wait_serial (struct nbdm *v, const uint64_t *serial, uint64_t seen,
             uint32_t timeout_ms)
{
  struct timespec until;
  uint64_t now;
  int rc = 0;

  clock_gettime (CLOCK_MONOTONIC, &until);
  until.tv_sec += timeout_ms / 1000;
  until.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
  if (until.tv_nsec >= 1000000000) {
    until.tv_nsec -= 1000000000;
    until.tv_sec++;
  }
  pthread_mutex_lock (&v->lock);
  while (*serial == seen && !v->waking && rc == 0)
    rc = pthread_cond_timedwait (&v->events, &v->lock, &until);
  now = *serial;
  pthread_mutex_unlock (&v->lock);
  return now;
}

uint64_t
nbdm_wait_event (struct nbdm *v, uint32_t index, uint64_t seen,
                 uint32_t timeout_ms)
{
  struct remote *r = find (v, index);

  return r ? wait_serial (v, &r->serial, seen, timeout_ms) : 0;
}

uint64_t
nbdm_wait_local (struct nbdm *v, uint64_t seen, uint32_t timeout_ms)
{
  return wait_serial (v, &v->local.serial, seen, timeout_ms);
}

void
nbdm_wake (struct nbdm *v)
{
  pthread_mutex_lock (&v->lock);
  v->waking = true;
  pthread_cond_broadcast (&v->events);
  pthread_mutex_unlock (&v->lock);
}
