/* SPDX-License-Identifier: BSD-3-Clause */

/* Open a volume: lock, load, check, recover (recover.c), begin a session.
 *
 * Sessions.  S is the session that the superblock says.  The invariant:
 *
 *   At every instant, also after lost power, each log of the volume is of
 *   session S or S + 1.  One of S + 1 was stamped by a start that has not
 *   ended, and no client has written under it.
 *
 * A start may end early at any step, because it is killed or because a write or
 * a sync fails, and any number of starts may do so one after the other.  What
 * each step leaves, and why the next start finds the invariant:
 *
 *   step                                superblock   logs
 *   0  (the last session)               S            S
 *   1  the superblock that was read     S            S, S + 1
 *      is written once more
 *   2  a lost log is made anew          S            S, S + 1
 *   3  maps about to change are         S            S, S + 1
 *      unsealed, and stamped S + 1
 *   4  recovery changes the maps        S            S, S + 1
 *   5  every log is stamped S + 1       S            S, S + 1
 *   6  the superblock is stored         S or S + 1   S + 1
 *
 * If a start ends in step 2, the next one treats the new map as still lost
 * (LOG_RENEWED).  If it ends in step 3, the next one sees that the last session
 * was not closed.  In step 4: the next one makes the same changes again, as
 * each change only adds bits.  In step 5: it stamps the same S + 1.  In step 6:
 * either number is right.
 *
 * So no start stamps a number above S + 1.  If starts stamped a number above
 * every stamp they found, as an earlier version did, S would fall behind: after
 * two starts that end in step 5 the third believes no log.
 *
 * Step 1 is for a superblock whose fdatasync failed: it may exist only in the
 * page cache, and logs that continue from it must not outlive it.  The slot is
 * written in its own place: the same bytes cannot tear, and the other slot,
 * which is certainly durable, stays.  Step 6 writes into the other slot: if
 * that write tears, the slot with S is still valid.
 *
 * If one slot is damaged, S may be one too low, and a session number is used
 * twice.  FORMAT.md says what that costs: an old copy of a log from the same
 * session looks like the one in use.
 *
 * A start that fails after step 2 records that the page cache must not be
 * believed (give_up): a failed msync may have dropped bits that are on no disk.
 */

#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "api.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/fault.h"
#include "base/file.h"
#include "life/identity_check.h"
#include "life/local_map.h"
#include "life/node_open.h"
#include "life/open.h"
#include "life/recover.h"
#include "life/remote_address.h"
#include "logs/activity.h"
#include "logs/dirty_map.h"
#include "logs/inflight.h"
#include "logs/layout.h"
#include "logs/superblock.h"
#include "volume/flusher.h"
#include "volume/identity.h"
#include "volume/local.h"
#include "volume/local_open.h"
#include "volume/state.h"
#include "volume/volume.h"

#define LOCK_PATIENCE_NS NS_PER_S
#define LOCK_RETRY_NS (10 * NS_PER_MS)

int
state_dir_open (const char *path)
{
  struct stat st;
  int rc = 0, fd = open (path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

  if (fd < 0)
    return errno == ENOENT
               ? set_message (-ENOENT, "the state directory %s does not exist",
                              path)
               : set_error (-errno, "cannot open the state directory %s", path);
  if (fstat (fd, &st) < 0)
    rc = set_error (-errno, "cannot look at the state directory %s", path);
  else if (st.st_uid != geteuid ())
    rc = set_message (-EPERM,
                      "the state directory %s belongs to user %u, and this is "
                      "user %u: nothing in it is touched",
                      path, (unsigned)st.st_uid, (unsigned)geteuid ());
  else if (st.st_mode & (S_IWGRP | S_IWOTH))
    rc = set_message (-EPERM,
                      "other users may write in the state directory %s: its "
                      "files cannot be trusted",
                      path);
  if (rc < 0)
    close (fd);
  return rc < 0 ? rc : fd;
}

/* Another start holds the first lock for a moment to set serve.log aside, and a
 * server that ends releases its locks one after the other: the first one, the
 * superblock's, the local disk's.  Neither is a reason to refuse.
 */
static int
lock_patiently (int fd)
{
  uint64_t until = now_ns () + LOCK_PATIENCE_NS;

  while (flock (fd, LOCK_EX | LOCK_NB) < 0) {
    if (errno != EWOULDBLOCK || now_ns () >= until)
      return -errno;
    sleep_ns (LOCK_RETRY_NS);
  }
  return 0;
}

int
local_open_patiently (struct local_file *disk, const char *path, uint64_t *size)
{
  uint64_t until = now_ns () + LOCK_PATIENCE_NS;
  int rc;

  while ((rc = local_open (disk, path, size)) == -EBUSY && now_ns () < until) {
    if (disk->fd >= 0)
      close (disk->fd);
    disk->fd = -1;
    sleep_ns (LOCK_RETRY_NS);
  }
  return rc;
}

int
state_lock (int dirfd, const char *state_dir, int *lock_fd)
{
  char pid[32] = "";
  int fd = openat (dirfd, "lock", O_RDWR | O_CREAT | PLAIN_FILE, 0600);
  struct stat st;
  int rc;

  if (fd < 0)
    return set_error (-errno, "cannot open the lock in %s", state_dir);
  if (fstat (fd, &st) < 0 || !S_ISREG (st.st_mode) || st.st_nlink != 1) {
    close (fd);
    return set_message (
        -EPERM, "the lock in %s is a link or no file: remove it", state_dir);
  }
  rc = lock_patiently (fd);
  if (rc < 0) {
    if (pread (fd, pid, sizeof pid - 1, 0) < 0)
      pid[0] = '\0';
    close (fd);
    if (rc != -EWOULDBLOCK)
      return set_error (rc, "cannot lock %s", state_dir);
    pid[strcspn (pid, "\n")] = '\0';
    return set_message (-EBUSY, "%s is in use by process %s", state_dir,
                        pid[0] ? pid : "(unknown)");
  }
  snprintf (pid, sizeof pid, "%d\n", (int)getpid ());
  /* The number is only for a message, so a failure here does no harm. */
  if (ftruncate (fd, 0) < 0 || pwrite (fd, pid, strlen (pid), 0) < 0)
    (void)0;
  *lock_fd = fd;
  return 0;
}

int
superblock_lock (int fd, const char *state_dir)
{
  int rc = lock_patiently (fd);

  if (rc == 0)
    return 0;
  if (rc != -EWOULDBLOCK)
    return set_error (rc, "cannot lock the superblock in %s", state_dir);
  return set_message (-EBUSY,
                      "%s is in use by another process, though its file `lock` "
                      "was removed: stop that process first",
                      state_dir);
}

static int
stamp_logs (struct nbdm *v, uint64_t session)
{
  int rc = activity_begin (&v->activity, session);
  fault_point ("begin_set");

  if (rc == 0)
    rc = inflight_begin (&v->inflight, session);
  fault_point ("begin_slots");
  FOR_EACH_DISK (d, v)
    if (rc == 0)
      rc = dirty_map_begin (&d->dm, session);
  fault_point ("begin_maps");
  /* Sync the names as well: an earlier start may have failed to make a new
   * log's name durable, and used the log all the same.
   */
  if (rc == 0) {
    rc = fault_point ("begin_names_sync");
    if (rc == 0 && fsync (v->dirfd) < 0)
      rc = -errno;
    if (rc < 0)
      set_error (rc, "cannot make the names in the state directory durable");
  }
  return rc;
}

/* A remote that has left the configuration begins again if it comes back, so
 * its map is of no use.  Delete it after the superblock no longer names the
 * remote; best effort, and not synced: if the map is back after lost power, the
 * superblock does not name it, so it is not loaded, and a new one replaces it
 * (remote_load and renew_dirty_map in recover.c).
 *
 * So the other slot must not name it either: the newest may go bad, and the map
 * would be believed, which has no bit for what was written meanwhile.
 */
static int
remove_left_out_maps (struct nbdm *v, const struct disk_remote *stored)
{
  bool in_both_slots = false;
  char file[80];
  int rc = 0;

  for (uint32_t i = 0; i < LAYOUT_MAX_REMOTES && rc == 0; i++)
    if (stored[i].name[0] && !volume_has_remote (v, stored[i].name)) {
      if (!in_both_slots)
        rc = volume_persist_locked (v);
      in_both_slots = true;
      snprintf (file, sizeof file, "dirty.%.63s", stored[i].name);
      if (rc == 0)
        (void)unlinkat (v->dirfd, file, 0);
    }
  return rc;
}

/* Stamp the logs, then the superblock, as in use by the next session. */
static int
begin_session (struct nbdm *v)
{
  struct disk_remote stored[LAYOUT_MAX_REMOTES];
  uint64_t session = volume_next_session (v);
  int rc = stamp_logs (v, session);

  if (rc < 0)
    return rc;
  memcpy (stored, v->sb.remotes, sizeof stored);
  remote_addresses_left_out (v);
  v->sb.session = htole64 (session);
  identity_begin (v);
  memcpy (v->sb.boot_id, v->boot_id, sizeof v->boot_id);
  memcpy (v->sb.mount_id, v->mount_id, sizeof v->mount_id);
  rc = node_first_store (v);
  fault_point ("begin_superblock");
  if (rc == 0)
    rc = remove_left_out_maps (v, stored);
  if (rc == 0)
    rc = volume_forget_note (v, DISTRUST_FILE);
  return rc == 0 ? volume_forget_note (v, UNFLUSHED_FILE) : rc;
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
  return v->local.file.fd < 0
             ? 0
             : identity_check_size (v, params->local, local_size);
}

static int
load_superblock (struct nbdm *v, const struct nbdm_params *params)
{
  const char *state_dir = params->state_dir;
  bool torn;
  int rc;

  v->sb_fd = openat (v->dirfd, "superblock", O_RDWR | PLAIN_FILE);
  if (v->sb_fd < 0)
    return errno == ENOENT
               ? set_message (-ENOENT, "there is no volume in %s", state_dir)
               : set_error (-errno, "cannot open the superblock in %s",
                            state_dir);
  rc = superblock_lock (v->sb_fd, state_dir);
  if (rc == 0)
    rc = superblock_load (v->sb_fd, &v->sb, &v->nodes, &torn);
  if (rc == 0)
    rc = node_load (v, params);
  if (rc == 0)
    rc = superblock_settle (v->sb_fd, &v->sb, &v->nodes);
  if (rc < 0)
    return rc;
  v->identity.doubted = torn;
  if (torn) {
    /* The lost slot may be the newer one, which said "in use". */
    v->sb.flags &= htole32 (~(uint32_t)SUPERBLOCK_CLEAN);
    snprintf (
        v->reason, sizeof v->reason,
        "one of the two slots of superblock is garbled: the other is used");
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
  identity_void_outside (v);
  v->local.state = le32toh (v->sb.local_state);
  if (v->local.state < NBDM_LOCAL_OK || v->local.state > NBDM_LOCAL_RESYNCING)
    v->local.state = NBDM_LOCAL_FAILED;
  v->local.disk.since = (int64_t)le64toh ((uint64_t)v->sb.local_since);
  disk_explain_locked (&v->local.disk, "%.159s", v->sb.local_reason);
  return superblock_identity (v->dirfd, v->boot_id, v->mount_id);
}

/* Durable with the session: the next start finds the fence closed, however this
 * one ends.
 */
static void
begin_fence (struct nbdm *v)
{
  bool behind = v->local.state != NBDM_LOCAL_OK;

  for (uint32_t i = 0; i < v->nr_remotes; i++)
    behind = behind || v->remotes[i].state != NBDM_IN_SYNC;
  v->fenced = behind && v->policy == NBDM_STOP; /* never of a secondary */
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
    r->hold_until_ns = now_ns () + v->hold_ms * NS_PER_MS;
    disk_explain_locked (&r->disk, "not connected yet");
  }
}

/* No extent covers what other programs wrote to the disk before: if it is not
 * durable, lost power would lose it, and no map would show that.  If the flush
 * fails, the kernel reports that only once: the next flush succeeds and proves
 * nothing.  So the next start must not treat the disk's page cache as exact.
 */
static int
flush_what_was_left (struct nbdm *v)
{
  bool caught_up = v->local.state != NBDM_LOCAL_OK;
  int rc;

  if (caught_up) /* before a kill during the flush takes the report along */
    (void)volume_note (v, UNFLUSHED_FILE);
  rc = local_flush (v);
  if (rc == 0 && volume_noted (v, DISTRUST_FILE))
    /* The kernel treats the pages that it could not write as clean.  Drop them
     * now: they disappear sooner or later, and reads would change by
     * themselves.
     */
    (void)posix_fadvise (v->local.file.fd, 0, 0, POSIX_FADV_DONTNEED);
  if (rc == 0 && caught_up && !v->local.unflushed)
    (void)volume_forget_note (v, UNFLUSHED_FILE);
  return rc;
}

/* The flush above has failed.  There may be no room for notes, but there is for
 * the superblock, which changes in nothing else: the next start must not treat
 * the disk's page cache as exact, nor use a disk that has failed by that.
 */
static void
remember_failed_flush (struct nbdm *v)
{
  char why[NBDM_REASON_LEN];

  snprintf (why, sizeof why, "%s", last_error ());
  (void)volume_note (v, DISTRUST_FILE);
  if (v->identity.doubted) /* this store replaces the lost slot */
    identity_forget_locked (v);
  memset (v->sb.boot_id, 0, sizeof v->sb.boot_id);
  if (v->local.state == NBDM_LOCAL_FAILED) {
    v->sb.local_state = htole32 (NBDM_LOCAL_FAILED);
    v->sb.local_since = (int64_t)htole64 ((uint64_t)v->local.disk.since);
    snprintf (v->sb.local_reason, sizeof v->sb.local_reason, "%s", why);
  }
  (void)superblock_store (v->sb_fd, &v->sb, &v->nodes);
  set_message (0, "%s", why);
}

/* A disk that was resyncing and cannot be used now has failed again. */
static void
fail_again (struct nbdm *v)
{
  if (v->local.file.fd >= 0)
    close (v->local.file.fd);
  v->local.file.fd = -1;
  v->local.state = NBDM_LOCAL_FAILED;
  v->local.disk.since = (int64_t)time (NULL);
  disk_explain_locked (&v->local.disk, "%s", last_error ());
}

/* A failed local disk is not opened until an operator attaches one. */
static int
open_local (struct nbdm *v, const struct nbdm_params *params, uint64_t *size)
{
  const char *path = params->local;
  int rc;

  v->local.unflushed
      = v->local.state != NBDM_LOCAL_OK && volume_noted (v, UNFLUSHED_FILE);
  if (v->local.state == NBDM_LOCAL_FAILED)
    return 0;
  if (params->local_choice == NBDM_LOCAL_LOST) {
    v->identity.given_up = true;
    v->local.state = NBDM_LOCAL_FAILED;
    v->local.disk.since = (int64_t)time (NULL);
    disk_explain_locked (&v->local.disk, "an operator gave it up");
    return 0;
  }
  rc = local_open_patiently (&v->local.file, path, size);
  if (rc == 0 && *size < v->size && v->local.state != NBDM_LOCAL_OK)
    rc = set_message (-ENOMEDIUM, "the local disk %s has become too small",
                      path);
  if (rc == 0)
    rc = v->local.flush_error = flush_what_was_left (v);
  if (rc < 0 && rc != -EBUSY && v->local.state != NBDM_LOCAL_OK) {
    fail_again (v);
    rc = 0;
  }
  if (v->local.flush_error)
    remember_failed_flush (v);
  return rc;
}

/* Recover, then begin: from here on the files are changed. */
static int
start_session (struct nbdm *v)
{
  int rc = volume_recover (v);

  fault_point ("open_recovered");
  if (rc < 0)
    return rc;
  identity_take_by_force (v);
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    node_begin_state (&v->remotes[i]);
  begin_fence (v);
  rc = begin_session (v);
  return rc == 0 ? node_settle_doubts (v) : rc;
}

/* Make the next start recover as after lost power. */
static int
give_up (struct nbdm *v, int rc)
{
  char why[NBDM_REASON_LEN];

  snprintf (why, sizeof why, "%s", last_error ());
  volume_fail_locked (v, why);
  return set_message (rc, "%s", why);
}

static int
load (struct nbdm *v, const struct nbdm_params *params)
{
  uint64_t local_size = 0;
  int rc;

  v->dirfd = rc = state_dir_open (params->state_dir);
  if (rc < 0)
    return rc;
  rc = state_lock (v->dirfd, params->state_dir, &v->lock_fd);
  if (rc == 0)
    rc = load_superblock (v, params);
  fault_point ("open_loaded");
  if (rc == 0)
    rc = open_local (v, params, &local_size);
  if (rc == 0)
    rc = check_params (v, params, local_size);
  fault_point ("open_local_flushed");
  if (rc == 0)
    rc = local_map_open (v);
  for (uint32_t i = 0; i < v->nr_remotes && rc == 0; i++)
    rc = remote_load (v, &params->remotes[i], i);
  if (rc == 0)
    rc = volume_check_sources (v);
  if (rc == 0)
    rc = identity_check_start (v, params, local_size);
  if (rc == 0)
    rc = identity_give_up_local (v);
  if (rc < 0)
    return rc;
  rc = start_session (v);
  fault_point ("open_begun");
  if (rc < 0)
    return give_up (v, rc);
  begin_states (v);
  return 0;
}

static void
init_sync (struct nbdm *v)
{
  pthread_mutex_init (&v->lock, NULL);
  pthread_cond_init (&v->changed, NULL);
  cond_init (&v->events);
  cond_init (&v->ticking);
}

int
nbdm_open (const struct nbdm_params *params, struct nbdm **volume)
{
  struct nbdm *v = calloc (1, sizeof *v);
  int rc;

  fault_init ();
  if (v == NULL)
    return set_error (-ENOMEM, "open");
  if (params->nr_remotes > NBDM_MAX_REMOTES) {
    free (v);
    return set_message (-EINVAL, "at most %d remotes", NBDM_MAX_REMOTES);
  }
  v->dirfd = v->lock_fd = v->sb_fd = v->local.file.fd = -1;
  v->activity.fd = v->inflight.fd = -1;
  v->policy = params->policy;
  v->fail_fenced_reads = params->fail_fenced_reads != 0;
  v->hold_ms = params->hold_ms;
  v->local.deadline_ms = params->local_deadline_ms;
  v->nr_remotes = params->nr_remotes;
  disk_init (&v->local.disk, v, 0, LOCAL_NAME);
  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    disk_init (&v->remotes[i].disk, v, i + 1, params->remotes[i].name);
    v->remotes[i].disk.is_node = params->remotes[i].is_node != 0;
  }
  snprintf (v->name, sizeof v->name, "%s", params->name);
  init_sync (v);
  flushers_init (v, params);
  rc = load (v, params);
  if (rc < 0) {
    nbdm_close (v);
    return rc;
  }
  *volume = v;
  return 0;
}
