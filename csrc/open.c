/* SPDX-License-Identifier: BSD-3-Clause */

/* Open a volume: lock, load, check, recover (recover.c), begin a session.
 *
 * Order at the start: the logs are stamped with the next session first, the
 * superblock last.  Between them nothing is written, so logs one session
 * ahead of their superblock are as good as level.
 */

#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"
#include "volume.h"

int
state_lock (int dirfd, const char *state_dir, int *lock_fd)
{
  char pid[32] = "";
  int fd = openat (dirfd, "lock", O_RDWR | O_CREAT | O_CLOEXEC, 0600);

  if (fd < 0)
    return set_error (-errno, "cannot open the lock in %s", state_dir);
  if (flock (fd, LOCK_EX | LOCK_NB) < 0) {
    int err = errno;
    if (pread (fd, pid, sizeof pid - 1, 0) < 0)
      pid[0] = '\0';
    close (fd);
    if (err != EWOULDBLOCK)
      return set_error (-err, "cannot lock %s", state_dir);
    pid[strcspn (pid, "\n")] = '\0';
    return set_message (-EBUSY, "%s is in use by process %s", state_dir,
                        pid[0] ? pid : "(unknown)");
  }
  snprintf (pid, sizeof pid, "%d\n", (int)getpid ());
  /* Only who asks reads it: a failure here loses a number in a message. */
  if (ftruncate (fd, 0) < 0 || pwrite (fd, pid, strlen (pid), 0) < 0)
    (void)0;
  *lock_fd = fd;
  return 0;
}

/* Stamp the logs, then the superblock: in use, of the next session. */
static int
begin_session (struct nbdm *v)
{
  uint64_t session = volume_next_session (v);
  int rc = activity_begin (&v->activity, session);
  fault_point ("begin_set");

  if (rc == 0)
    rc = inflight_begin (&v->inflight, session);
  if (rc == 0)
    rc = dirty_map_begin (&v->local.dm, session);
  fault_point ("begin_slots");
  for (uint32_t i = 0; i < v->nr_remotes && rc == 0; i++)
    rc = dirty_map_begin (&v->remotes[i].dm, session);
  fault_point ("begin_maps");
  if (rc < 0)
    return rc;
  v->sb.session = htole64 (session);
  memcpy (v->sb.boot_id, v->boot_id, sizeof v->boot_id);
  memcpy (v->sb.mount_id, v->mount_id, sizeof v->mount_id);
  rc = volume_persist_locked (v);
  fault_point ("begin_superblock");
  if (rc == 0 && unlinkat (v->dirfd, DISTRUST_FILE, 0) < 0 && errno != ENOENT)
    rc = set_error (-errno, "cannot remove " DISTRUST_FILE);
  return rc;
}

static int
check_params (const struct nbdm *v, const struct nbdm_params *params,
              uint64_t local_size)
{
  if (strncmp (v->sb.name, params->name, sizeof v->sb.name) != 0)
    return set_message (-EINVAL,
                        "%s is the state of volume \"%.63s\", not of \"%s\"",
                        params->state_dir, v->sb.name, params->name);
  if (params->size && params->size != v->size)
    return set_message (-EINVAL,
                        "size is %llu, but the volume was made with %llu "
                        "bytes",
                        (unsigned long long)params->size,
                        (unsigned long long)v->size);
  if (params->region_size != v->region_size)
    return set_message (-EINVAL,
                        "region_size is %u, but the volume was made with %u "
                        "bytes",
                        params->region_size, v->region_size);
  if (v->local.disk.fd >= 0 && local_size < v->size)
    return set_message (-ERANGE,
                        "the local disk %s has %llu bytes, the volume %llu",
                        params->local, (unsigned long long)local_size,
                        (unsigned long long)v->size);
  return 0;
}

static int
load_superblock (struct nbdm *v, const char *state_dir)
{
  bool torn;
  int rc;

  v->sb_fd = openat (v->dirfd, "superblock", O_RDWR | O_CLOEXEC);
  if (v->sb_fd < 0)
    return errno == ENOENT
               ? set_message (-ENOENT, "there is no volume in %s", state_dir)
               : set_error (-errno, "cannot open the superblock in %s",
                            state_dir);
  rc = superblock_load (v->sb_fd, &v->sb, &torn);
  if (rc < 0)
    return rc;
  if (torn) {
    /* The lost slot may be the newer one, which said: in use. */
    v->sb.flags &= htole32 (~(uint32_t)SUPERBLOCK_CLEAN);
    snprintf (
        v->reason, sizeof v->reason,
        "one of the two slots of superblock is garbled: the other counts");
  }
  memcpy (v->uuid, v->sb.uuid, sizeof v->uuid);
  v->size = le64toh (v->sb.size);
  v->region_size = le32toh (v->sb.region_size);
  v->generation = le64toh (v->sb.generation);
  if (v->size == 0 || v->region_size == 0
      || le32toh (v->sb.ring_slots) != RING_SLOTS
      || le32toh (v->sb.activity_slots) != ACTIVITY_EXTENTS
      || le32toh (v->sb.extent_size) != EXTENT_SIZE)
    return set_message (-EUCLEAN, "the superblock in %s is garbled", state_dir);
  v->nr_regions = (v->size - 1) / v->region_size + 1;
  v->local.state = le32toh (v->sb.local_state);
  if (v->local.state < NBDM_LOCAL_OK || v->local.state > NBDM_LOCAL_RESYNCING)
    v->local.state = NBDM_LOCAL_FAILED;
  v->local.since = (int64_t)le64toh ((uint64_t)v->sb.local_since);
  snprintf (v->local.reason, sizeof v->local.reason, "%.159s",
            v->sb.local_reason);
  return superblock_identity (v->dirfd, v->boot_id, v->mount_id);
}

/* Durable with the session: nobody is to find it open, however this ends. */
static void
begin_fence (struct nbdm *v)
{
  bool behind = v->local.state != NBDM_LOCAL_OK;

  for (uint32_t i = 0; i < v->nr_remotes; i++)
    behind = behind || v->remotes[i].state != NBDM_IN_SYNC;
  v->fenced = behind && v->policy == NBDM_STOP;
}

/* In sync and not connected yet is holding: early writes wait for the first
 * connection as for a lost one.
 */
static void
begin_states (struct nbdm *v)
{
  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    struct remote *r = &v->remotes[i];

    if (r->state != NBDM_IN_SYNC) {
      if (r->state != NBDM_FAILED)
        r->state = NBDM_OUT_OF_SYNC;
      continue;
    }
    r->state = NBDM_HOLDING;
    r->hold_until_ns = now_ns () + v->hold_ms * UINT64_C (1000000);
    snprintf (r->reason, sizeof r->reason, "not connected yet");
  }
}

/* A disk that has failed stays away until an operator brings one back; one
 * that was being caught up and is not to be had has failed again.
 */
static int
open_local (struct nbdm *v, const char *path, uint64_t *size)
{
  int rc;

  if (v->local.state == NBDM_LOCAL_FAILED)
    return 0;
  rc = local_open (&v->local.disk, path, size);
  if (rc == 0 && *size < v->size && v->local.state != NBDM_LOCAL_OK)
    rc = set_message (-ERANGE, "the local disk %s has become too small", path);
  /* What was written to it before us is in no extent: not durable, it would
   * be lost with the power, and no map would know.
   */
  if (rc == 0)
    rc = local_flush (v);
  if (rc == 0 || rc == -EBUSY || v->local.state == NBDM_LOCAL_OK)
    return rc;
  if (v->local.disk.fd >= 0)
    close (v->local.disk.fd);
  v->local.disk.fd = -1;
  v->local.state = NBDM_LOCAL_FAILED;
  snprintf (v->local.reason, sizeof v->local.reason, "%s", last_error ());
  return 0;
}

static int
load (struct nbdm *v, const struct nbdm_params *params)
{
  uint64_t local_size = 0;
  int rc;

  v->dirfd = open (params->state_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (v->dirfd < 0)
    return errno == ENOENT
               ? set_message (-ENOENT, "the state directory %s does not exist",
                              params->state_dir)
               : set_error (-errno, "cannot open the state directory %s",
                            params->state_dir);
  rc = state_lock (v->dirfd, params->state_dir, &v->lock_fd);
  if (rc == 0)
    rc = load_superblock (v, params->state_dir);
  fault_point ("open_loaded");
  if (rc == 0)
    rc = open_local (v, params->local, &local_size);
  if (rc == 0)
    rc = check_params (v, params, local_size);
  fault_point ("open_local_flushed");
  if (rc == 0)
    rc = local_map_open (v);
  for (uint32_t i = 0; i < v->nr_remotes && rc == 0; i++)
    rc = remote_load (v, &params->remotes[i], i);
  if (rc == 0)
    rc = volume_recover (v);
  fault_point ("open_recovered");
  if (rc == 0) {
    begin_fence (v);
    rc = begin_session (v);
  }
  fault_point ("open_begun");
  if (rc == 0)
    begin_states (v);
  return rc;
}

static void
init_sync (struct nbdm *v)
{
  pthread_condattr_t attr;

  pthread_mutex_init (&v->lock, NULL);
  pthread_cond_init (&v->changed, NULL);
  pthread_condattr_init (&attr);
  pthread_condattr_setclock (&attr, CLOCK_MONOTONIC);
  pthread_cond_init (&v->events, &attr);
  pthread_cond_init (&v->ticking, &attr);
  pthread_condattr_destroy (&attr);
}

int
nbdm_open (const struct nbdm_params *params, struct nbdm **volume)
{
  struct nbdm *v = calloc (1, sizeof *v);
  int rc;

  fault_init ();
  if (v == NULL)
    return set_error (-ENOMEM, "open");
  v->dirfd = v->lock_fd = v->sb_fd = v->local.disk.fd = v->local.dm.fd = -1;
  v->activity.fd = v->inflight.fd = -1;
  v->policy = params->policy;
  v->fail_fenced_reads = params->fail_fenced_reads != 0;
  v->hold_ms = params->hold_ms;
  v->nr_remotes = params->nr_remotes;
  for (uint32_t i = 0; i < NBDM_MAX_REMOTES; i++)
    v->remotes[i] = (struct remote){ .volume = v, .dm.fd = -1 };
  snprintf (v->name, sizeof v->name, "%s", params->name);
  init_sync (v);
  flushers_init (v, params);
  if (params->nr_remotes > NBDM_MAX_REMOTES)
    rc = set_message (-EINVAL, "at most %d remotes", NBDM_MAX_REMOTES);
  else
    rc = load (v, params);
  if (rc < 0) {
    nbdm_close (v);
    return rc;
  }
  *volume = v;
  return 0;
}
