/* SPDX-License-Identifier: BSD-3-Clause */

/* Connect, admit and drop a remote: the calls of the policy threads.
 *
 * A new connection is not used until it is admitted, because the disk behind it
 * may be a wrong one.  The engine compares single regions; Python decides which
 * ones, and what a difference means.
 */

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/fault.h"
#include "base/lock.h"
#include "life/open.h"
#include "life/remote.h"
#include "life/remote_address.h"
#include "logs/bitmap.h"
#include "logs/dirty_map.h"
#include "logs/layout.h"
#include "logs/rangelock.h"
#include "volume/flush.h"
#include "volume/flusher.h"
#include "volume/local.h"
#include "volume/local_state.h"
#include "volume/state.h"
#include "volume/volume.h"
#include "wire/conn.h"
#include "wire/transport.h"

/* Clients wait for a range that is being compared, and a slow link may need
 * minutes for a large region: after this time the part that was compared is
 * enough.
 */
#define COMPARE_NS UINT64_C (2000000000)
#define COMPARE_BYTES (256u << 10) /* in one command, at most */
#define COMPARE_FIRST (64u << 10)  /* in the first: 2 s at 256 kbit/s */

static struct remote *
find (struct nbdm *v, uint32_t disk)
{
  return disk != NBDM_LOCAL && disk <= v->nr_remotes ? &v->remotes[disk - 1]
                                                     : NULL;
}

/* The role is fixed, so this needs no lock. */
static int
primary_only (const struct nbdm *v)
{
  return v->secondary ? set_message (-EPERM, "this node is secondary: the "
                                             "primary connects the disks")
                      : 0;
}

#define FIND_OR_RETURN(r, v, disk)                                             \
  struct remote *r = find (v, disk);                                           \
  if (r == NULL)                                                               \
  return set_message (-EINVAL, "disk %u is no remote of this volume", disk)

static void
uuid_words (const struct nbdm *v, char words[2 * sizeof v->uuid + 1])
{
  for (size_t i = 0; i < sizeof v->uuid; i++)
    sprintf (words + 2 * i, "%02x", v->uuid[i]);
}

void
nbdm_chain (const struct nbdm *v, char *words, uint32_t size)
{
  /* Reads only, apart from the lock. */
  pthread_mutex_t *lock = (pthread_mutex_t *)(uintptr_t)&v->lock;
  char uuid[2 * sizeof v->uuid + 1];
  uint32_t n;

  uuid_words (v, uuid);
  n = (uint32_t)snprintf (words, size, VOLUME_CHAIN " %s", uuid);
  LOCK_FOR_SCOPE (lock);
  for (uint32_t i = 0; i < v->nr_remotes && n < size; i++)
    if (v->remotes[i].conn)
      n += (uint32_t)snprintf (words + n, size - n, "%s", v->remotes[i].chain);
}

static int
check_server (const struct nbdm *v, const struct conn_info *info)
{
  char uuid[2 * sizeof v->uuid + 1];

  uuid_words (v, uuid);
  if (strstr (info->description, VOLUME_CHAIN)
      && strstr (info->description, uuid))
    return set_message (-EINVAL, "it leads back to this very volume");
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

/* Only the numbers of volumes: our clients get these words as ours. */
static void
keep_chain (struct remote *r, const char *description)
{
  const char *chain = strstr (description, VOLUME_CHAIN);
  size_t n = 0;

  if (chain) {
    chain += strlen (VOLUME_CHAIN);
    n = strspn (chain, " 0123456789abcdef");
  }
  n = n < sizeof r->chain ? n : sizeof r->chain - 1;
  if (n > 0)
    memcpy (r->chain, chain, n);
  r->chain[n] = '\0';
}

/* The error ends the connection, as any other error does, and resync on the
 * next one sends data.  So the abilities of a connection never change under its
 * users.
 */
void
remote_heed_refusal (struct remote *r, const struct command *cmd)
{
  if (cmd->kind == COMMAND_ZERO
      && (cmd->error == EINVAL || cmd->error == EOPNOTSUPP))
    r->refuses_zeroes = true;
}

int
nbdm_remote_connect (struct nbdm *v, uint32_t disk, const char *uri,
                     uint32_t timeout_ms)
{
  FIND_OR_RETURN (r, v, disk);
  struct conn *conn;
  int rc = primary_only (v);

  if (rc == 0)
    rc = conn_open (uri, timeout_ms, &conn);
  if (rc < 0)
    return rc;
  rc = check_server (v, conn_info (conn));
  pthread_mutex_lock (&v->lock);
  r->remote_size = conn_info (conn)->size;
  keep_chain (r, conn_info (conn)->description);
  if (rc == 0 && v->stopping)
    rc = set_message (-ESHUTDOWN, "the volume is stopping");
  if (rc == 0 && r->conn)
    rc = set_message (-EISCONN, "already connected");
  if (rc == 0)
    rc = remote_address_locked (r, uri);
  if (rc == 0 && r->refuses_zeroes)
    conn_without_zeroes (conn);
  if (rc == 0)
    r->conn = conn_get (conn);
  pthread_mutex_unlock (&v->lock);
  if (rc < 0)
    conn_farewell (conn);
  conn_put (conn);
  return rc;
}

static bool
comparable_locked (const struct remote *r, uint64_t region)
{
  return !bitmap_test (&r->disk.dm.map[MAP_DIRTY], region)
         && !bitmap_test (&r->disk.volume->local.disk.dm.map[MAP_DIRTY],
                          region);
}

static bool
local_is_open_locked (const struct nbdm *v)
{
  return v->local.state != NBDM_LOCAL_FAILED || v->local.attached;
}

/* Lock the region, or the part that no request holds, and take the connection.
 */
static int
compare_begin (struct remote *r, uint64_t region, struct range *range,
               struct conn **conn)
{
  struct nbdm *v = r->disk.volume;

  LOCK_FOR_SCOPE (&v->lock);
  if (r->conn == NULL)
    return set_message (-ENOTCONN, "the connection was lost");
  if (!comparable_locked (r, region))
    return set_message (-EAGAIN, "the region is dirty");
  if (!local_is_open_locked (v))
    return set_message (-EAGAIN, "the local disk is not open");
  if (!rangelock_try_part (&v->ranges, range))
    return set_message (-EBUSY, "requests hold all of the region");
  *conn = conn_get (r->conn);
  local_use (v); /* so that the result belongs to this disk */
  return 0;
}

static int
compare_piece (struct nbdm *v, struct conn *conn, uint64_t offset,
               uint64_t length, uint8_t *ours, uint8_t *theirs)
{
  int rc = conn_pread (conn, theirs, length, offset);

  if (rc < 0)
    return set_message (rc, "it answered a read at %llu with: %s",
                        (unsigned long long)offset, strerror (-rc));
  rc = local_pread_or_pass (v, ours, length, offset);
  if (rc == 0)
    return memcmp (ours, theirs, length) != 0;
  /* A bad local sector proves nothing about the remote, which is needed to
   * rewrite it.  Nor does one that hangs: clients wait for the range.
   */
  if (rc != -ETIMEDOUT)
    local_note_error (v, rc);
  return -ENODATA;
}

/* Compare at least one piece.  Keep the pieces small unless the first came
 * quickly.
 */
static int
compare_bytes (struct nbdm *v, struct conn *conn, const struct range *range,
               uint8_t *buf)
{
  uint64_t start = now_ns (), took = 0, n = COMPARE_FIRST;
  uint64_t offset = range->offset, end = offset + range->length;
  int rc = 0;

  for (; rc == 0 && offset < end && took < COMPARE_NS; offset += n) {
    if (took > 0 && took < COMPARE_NS / 8)
      n = COMPARE_BYTES;
    n = end - offset < n ? end - offset : n;
    rc = compare_piece (v, conn, offset, n, buf, buf + COMPARE_BYTES);
    took = now_ns () - start;
  }
  return rc;
}

/* A server that has answered nothing yet may never answer, and clients must not
 * wait for a range that is compared with it.  So wait for its first answer,
 * with any content, before a range is held.
 */
static void
hear (struct remote *r, uint64_t offset, uint64_t length, uint8_t *buf)
{
  struct nbdm *v = r->disk.volume;
  struct conn *conn;

  pthread_mutex_lock (&v->lock);
  conn = r->conn ? conn_get (r->conn) : NULL;
  pthread_mutex_unlock (&v->lock);
  if (conn && conn_report (conn).answered == 0)
    (void)conn_pread (conn, buf, length < NBDM_SECTOR ? length : NBDM_SECTOR,
                      offset);
  conn_put (conn);
}

/* Data that local has lost proves nothing about the remote, which may be the
 * one disk that has it, and only a flush shows that local has lost it.  1:
 * local has lost nothing.  The caller still uses the disk that it compared.
 */
static int
prove_difference (struct nbdm *v)
{
  bool flushed = atomic_load (&v->local.state) == NBDM_LOCAL_FAILED
                 || flush_local_group (v) == 0;

  LOCK_FOR_SCOPE (&v->lock);
  if (!flushed)
    local_replace_doubted_relock (v);
  if (flushed && !local_doubted (v) && local_is_open_locked (v))
    return 1;
  return set_message (-ENODATA, "the local disk may have lost writes");
}

int
nbdm_remote_compare (struct nbdm *v, uint32_t disk, uint64_t region)
{
  FIND_OR_RETURN (r, v, disk);
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
  buf = malloc (2 * COMPARE_BYTES);
  if (buf == NULL)
    return set_error (-ENOMEM, "compare");
  hear (r, offset, range.length, buf);
  rc = compare_begin (r, region, &range, &conn);
  if (rc == 0) {
    rc = compare_bytes (v, conn, &range, buf);
    pthread_mutex_lock (&v->lock);
    rangelock_remove (&v->ranges, &range);
    pthread_mutex_unlock (&v->lock);
    conn_put (conn);
    if (rc == 1)
      rc = prove_difference (v);
    local_leave ();
  }
  free (buf);
  return rc;
}

uint64_t
nbdm_remote_comparable (struct nbdm *v, uint32_t disk, uint64_t region)
{
  const struct remote *r = find (v, disk);
  const struct bitmap *dirty;

  if (r == NULL)
    return v->nr_regions;
  LOCK_FOR_SCOPE (&v->lock);
  dirty = &r->disk.dm.map[MAP_DIRTY];
  if (!local_is_open_locked (v))
    region = v->nr_regions;
  while (region < v->nr_regions && !comparable_locked (r, region)) {
    region = bitmap_next_clear (dirty, region, v->nr_regions);
    region = bitmap_next_clear (&v->local.disk.dm.map[MAP_DIRTY], region,
                                v->nr_regions);
  }
  return region;
}

int
remote_admit_locked (struct remote *r)
{
  struct nbdm *v = r->disk.volume;

  if (v->stopping)
    return command_gate_locked (v);
  if (r->conn == NULL || conn_dead (r->conn))
    return set_message (-ENOTCONN, "the connection was lost");
  if (r->state == NBDM_FAILED)
    return set_message (-EPERM, "the remote has failed: %s", r->disk.reason);
  if (v->failed)
    return set_message (-EIO, "the volume has failed: %s", v->reason);
  r->admitted = true;
  r->address = r->connected_at;
  /* The unflushed regions became dirty when the connection was lost.  Those
   * that did not have no other source: the waiting threads send a flush now.
   */
  if (!unflushed_any_locked (r))
    r->disk.flush.done = r->disk.flush.asked;
  fault_point ("admitted");
  remote_update_state_locked (r);
  disk_changed_locked (&r->disk, false);
  flusher_admitted_locked (r);
  return 0;
}

int
nbdm_remote_explain (struct nbdm *v, uint32_t disk, const char *reason)
{
  FIND_OR_RETURN (r, v, disk);

  LOCK_FOR_SCOPE (&v->lock);
  if (!r->admitted && r->state != NBDM_FAILED)
    disk_explain_locked (&r->disk, "%s", reason);
  return 0;
}

int
nbdm_remote_fail (struct nbdm *v, uint32_t disk, const char *reason)
{
  FIND_OR_RETURN (r, v, disk);
  int rc;

  LOCK_FOR_SCOPE (&v->lock);
  rc = command_gate_locked (v);
  if (rc == 0)
    rc = primary_only (v);
  if (rc == 0) {
    remote_broken_locked (r, r->conn, reason);
    disk_explain_locked (&r->disk, "%s", reason);
    if (remote_used_locked (r))
      remote_degrade_locked (r); /* it was holding: end the hold as always */
    remote_set_locked (r, NBDM_FAILED, "%s", reason);
    fault_point ("remote_failing");
    rc = volume_persist_locked (v);
  }
  return rc;
}

int
nbdm_remote_reset (struct nbdm *v, uint32_t disk)
{
  FIND_OR_RETURN (r, v, disk);
  int rc;

  LOCK_FOR_SCOPE (&v->lock);
  rc = command_gate_locked (v);
  if (rc == 0)
    rc = primary_only (v);
  if (rc == 0 && r->state == NBDM_FAILED) {
    remote_set_locked (r, NBDM_OUT_OF_SYNC, "an operator resumed it");
    rc = volume_persist_locked (v);
  }
  return rc;
}

int
nbdm_remote_pause (struct nbdm *v, uint32_t disk, int paused)
{
  FIND_OR_RETURN (r, v, disk);
  int rc;

  LOCK_FOR_SCOPE (&v->lock);
  rc = command_gate_locked (v);
  if (rc == 0) {
    r->disk.paused = paused;
    disk_bump_locked (&r->disk);
    rc = volume_persist_locked (v);
  }
  return rc;
}

/* Make every region dirty, in whatever state the remote is: local becomes the
 * only source of all data, so local must not be doubted.
 */
static int
invalidate_locked (struct remote *r)
{
  static const char why[] = "an operator made every region dirty";
  struct nbdm *v = r->disk.volume;

  if (!local_believed (v))
    return set_message (-EBUSY,
                        "the local disk is not ok: %s may be the only copy of "
                        "what it misses",
                        r->disk.name);
  dirty_map_mark (&r->disk.dm, 0, v->nr_regions, false);
  fault_point ("invalidate_marked");
  r->assumed = false;
  if (r->admitted)
    remote_lacks_locked (r, "%s", why);
  else if (!remote_used_locked (r))
    remote_set_locked (r, NBDM_OUT_OF_SYNC, "%s", why);
  /* Otherwise it is holding: waiting requests are sent again, or degrade it. */
  return volume_persist_locked (v);
}

int
nbdm_remote_invalidate (struct nbdm *v, uint32_t disk)
{
  FIND_OR_RETURN (r, v, disk);
  int rc;

  LOCK_FOR_SCOPE (&v->lock);
  rc = command_gate_locked (v);
  if (rc == 0)
    rc = primary_only (v);
  if (rc == 0)
    rc = invalidate_locked (r);
  return rc;
}

int
nbdm_remote_release_late (struct nbdm *v, uint32_t disk)
{
  FIND_OR_RETURN (r, v, disk);

  LOCK_FOR_SCOPE (&v->lock);
  /* Not if the connection was lost in the meantime: then the late regions are
   * newly late.
   */
  if (r->admitted && !v->stopping)
    bitmap_clear_all (&r->disk.dm.map[MAP_LATE]);
  fault_point ("late_released");
  disk_bump_locked (&r->disk);
  return 0;
}
