/* SPDX-License-Identifier: BSD-3-Clause */

/* Replace a failed local disk: the calls of the policy threads.  As with a
 * remote, an open disk is not used until it is admitted, because it may be a
 * wrong one.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "api.h"
#include "base/clock.h"
#include "base/error.h"
#include "life/identity_check.h"
#include "life/local_attach.h"
#include "life/local_map.h"
#include "logs/bitmap.h"
#include "logs/dirty_map.h"
#include "logs/layout.h"
#include "volume/identity.h"
#include "volume/local.h"
#include "volume/local_io.h"
#include "volume/local_open.h"
#include "volume/local_state.h"
#include "volume/state.h"
#include "volume/volume.h"

#define PATIENCE_NS NS_PER_S /* for calls that began on the failed disk */

/* Detach the old disk, for which a thread may still wait: the descriptor keeps
 * its number but becomes a directory, so a late call gets EBADF or EISDIR.
 */
static int
release_disk (struct nbdm *v, void *unused)
{
  const struct flock unlock = { .l_type = F_UNLCK, .l_whence = SEEK_SET };

  (void)unused;
  if (v->local.file.fd < 0)
    return 0;
  (void)fcntl (v->local.file.fd, F_OFD_SETLK, &unlock);
  if (dup3 (v->dirfd, v->local.file.fd, O_CLOEXEC) < 0)
    return set_error (-errno, "cannot close the failed local disk");
  return 0;
}

/* The caller closes the rest of `disk` without the lock: a close may wait for
 * the disk.
 */
static int
install_disk_locked (struct nbdm *v, struct local_file *disk)
{
  if (v->local.file.fd >= 0) {
    int fd = disk->fd;

    if (dup3 (fd, v->local.file.fd, O_CLOEXEC) < 0)
      return set_error (-errno, "cannot use the local disk");
    disk->fd = v->local.file.fd;
    v->local.file = *disk;
    disk->fd = fd;
  }
  else {
    v->local.file = *disk;
    disk->fd = -1;
  }
  v->local.attached = true;
  v->local.flush_error = 0;
  atomic_store (&v->local.doubted, false);
  local_io_renew (v);
  return 0;
}

/* The error of a command that no longer waits for a disk. */
static int
answered (int rc)
{
  return rc == LOCAL_GIVEN_UP ? -EIO : rc;
}

/* A call that began on the failed disk would continue on the new one, and its
 * result would count as the new disk's.
 */
static bool
old_disk_in_use_locked (const struct nbdm *v)
{
  const struct request *req;

  LIST_FOREACH (req, &v->requests, link)
    if (req->on_local)
      return true;
  return local_in_use (v);
}

/* Drops the lock.  No call begins on a failed disk, so the wait is short unless
 * the disk hangs.
 */
static bool
await_old_disk_relock (struct nbdm *v)
{
  uint64_t until = now_ns () + PATIENCE_NS;

  while (v->local.state == NBDM_LOCAL_FAILED && old_disk_in_use_locked (v)
         && now_ns () < until) {
    pthread_mutex_unlock (&v->lock);
    poll (NULL, 0, 5);
    pthread_mutex_lock (&v->lock);
  }
  return !old_disk_in_use_locked (v);
}

/* The first region that no remote has and the failed disk may have, or
 * nr_regions.  The disk got that only copy before it failed, in a session that
 * ended; then a start could not open it.  Tests single bits only where all maps
 * have some set.
 */
static uint64_t
only_copy_locked (const struct nbdm *v)
{
  uint64_t nr = v->nr_regions, region = 0, before;

  do {
    before = region;
    region = bitmap_next_clear (&v->local.disk.dm.map[MAP_DIRTY], region, nr);
    for (uint32_t i = 0; i < v->nr_remotes; i++)
      if (v->remotes[i].state != NBDM_FAILED)
        region = bitmap_next_set (&v->remotes[i].disk.dm.map[MAP_DIRTY], region,
                                  nr);
  } while (region != before);
  return region;
}

static int
begin_attach (struct nbdm *v, bool replaced)
{
  bool ended;
  int rc = 0;

  pthread_mutex_lock (&v->lock);
  ended = await_old_disk_relock (v);
  if (v->stopping)
    rc = command_gate_locked (v);
  else if (v->local.state != NBDM_LOCAL_FAILED)
    rc = set_message (-EALREADY, "the local disk has not failed");
  else if (v->failed)
    rc = set_message (-EIO, "the volume has failed: %s", v->reason);
  else if (!ended)
    rc = set_message (-EBUSY, "a request to the failed disk has not ended yet");
  else if (replaced && only_copy_locked (v) < v->nr_regions)
    rc = set_message (-EBUSY,
                      "the disk that failed has the only copy of something, as "
                      "remotes missed writes that it got: bring it back, and "
                      "resume it");
  else
    v->local.attached = false;
  pthread_mutex_unlock (&v->lock);
  return rc == 0 ? answered (local_call (v, release_disk, NULL, NULL)) : rc;
}

/* A disk that is opened to replace the failed one. */
struct opening {
  char path[PATH_MAX];
  bool replaced, flush_failed;
  struct attached_check check;
  struct local_file disk;
};

/* Open the disk, and check whether it may be the disk of the volume.  Another
 * program may have written it, perhaps as a copy of the failed disk, and no
 * extent or map covers that: it is made durable before the disk is used, as at
 * a start.  A replacement disk is overwritten and flushed anyway.
 */
static int
open_disk (struct nbdm *v, void *opaque)
{
  struct opening *o = opaque;
  uint64_t size = 0;
  int rc = local_open (&o->disk, o->path, &size);

  if (rc == 0)
    rc = local_check_place (&o->disk, v->dirfd, o->path);
  if (rc == 0)
    rc = identity_check_size (v, o->path, size);
  if (rc == 0 && !o->replaced)
    rc = identity_check_attached (v, &o->check, &o->disk, o->path);
  if (rc == 0 && !o->replaced && fdatasync (o->disk.fd) < 0) {
    rc = set_error (-errno,
                    "cannot flush the local disk %s: once it works, all that "
                    "a remote has is copied to it",
                    o->path);
    o->flush_failed = true;
  }
  /* The disk's own error, and not that of a call that does not wait for it. */
  return rc == -ETIMEDOUT || rc == LOCAL_GIVEN_UP ? -EIO : rc;
}

static void
drop_opening (void *opaque)
{
  struct opening *o = opaque;

  if (o->disk.fd >= 0)
    close (o->disk.fd);
  free (o);
}

static int
close_what_is_left (struct nbdm *v, void *opaque)
{
  struct opening *o = opaque;

  (void)v;
  if (o->disk.fd >= 0)
    close (o->disk.fd);
  o->disk.fd = -1;
  return 0;
}

static int
begin_opening (struct nbdm *v, const char *path, bool replaced,
               struct opening **out)
{
  struct opening *o;
  int rc;

  if (strlen (path) >= sizeof o->path)
    return set_message (-ENAMETOOLONG, "the local disk's path is too long");
  o = calloc (1, sizeof *o);
  if (o == NULL)
    return set_error (-ENOMEM, "the local disk");
  o->disk.fd = -1;
  o->replaced = replaced;
  snprintf (o->path, sizeof o->path, "%s", path);
  pthread_mutex_lock (&v->lock);
  rc = command_gate_locked (v);
  if (rc == 0) {
    identity_choose_locked (v, &o->check);
    v->local.nr_opening += !replaced; /* so no thread removes the note */
  }
  pthread_mutex_unlock (&v->lock);
  if (rc < 0)
    free (o);
  else if (!replaced) /* before its flush: a kill would take the report along */
    (void)volume_note (v, UNFLUSHED_FILE);
  *out = o;
  return rc;
}

static void
miss_all_locked (struct nbdm *v)
{
  local_miss_all_locked (v);
  volume_persist_locked (v);
}

/* `opened`: the result of open_disk. */
static int
take_opened_locked (struct nbdm *v, struct opening *o, int opened)
{
  int rc = opened;

  if (rc == -EMEDIUMTYPE) {
    disk_explain_locked (&v->local.disk, "%s", last_error ());
    volume_persist_locked (v);
  }
  if (o->flush_failed && !v->drained)
    miss_all_locked (v);
  if (rc == 0)
    rc = command_gate_locked (v);
  if (rc == 0)
    rc = install_disk_locked (v, &o->disk);
  if (rc == 0)
    v->identity.unproven = o->check.unproven;
  if (rc == 0 && o->replaced) {
    identity_forget_locked (v);
    dirty_map_mark (&v->local.disk.dm, 0, v->nr_regions, false);
    rc = volume_persist_locked (v);
  }
  disk_bump_locked (&v->local.disk);
  return rc;
}

/* The disk's flush succeeded, or local misses all that a remote has.  A stop
 * has marked that itself, and has perhaps not stored it yet.
 */
static void
flush_known_locked (const struct nbdm *v, bool replaced)
{
  if (!replaced && v->local.nr_opening == 0 && !v->drained && !v->failed)
    (void)volume_forget_note (v, UNFLUSHED_FILE);
}

/* With a deadline, this thread makes no call that may wait for the disk. */
int
nbdm_local_attach (struct nbdm *v, const char *path, int replaced)
{
  struct opening *o = NULL;
  char words[NBDM_REASON_LEN];
  int rc = begin_attach (v, replaced != 0);

  if (rc == 0)
    rc = begin_opening (v, path, replaced != 0, &o);
  if (rc < 0)
    return rc;
  rc = local_call (v, open_disk, drop_opening, o);
  pthread_mutex_lock (&v->lock);
  v->local.nr_opening -= !replaced;
  if (rc == LOCAL_GIVEN_UP) { /* the carrier owns it now */
    if (!replaced && !v->drained)
      miss_all_locked (v);
    flush_known_locked (v, replaced);
    pthread_mutex_unlock (&v->lock);
    return answered (rc);
  }
  rc = take_opened_locked (v, o, rc);
  flush_known_locked (v, replaced);
  pthread_mutex_unlock (&v->lock);
  snprintf (words, sizeof words, "%s", last_error ());
  if (local_call (v, close_what_is_left, drop_opening, o) == 0)
    drop_opening (o);
  return rc < 0 ? set_message (rc, "%s", words) : rc;
}

static bool
awaits_admission_locked (const struct nbdm *v)
{
  return v->local.state == NBDM_LOCAL_FAILED && v->local.attached;
}

static int
describe (struct nbdm *v, void *opaque)
{
  identity_describe (v, opaque);
  return 0;
}

/* The lock is not held while the disk is queried. */
static int
describe_attached (struct nbdm *v, struct described_disk *disk)
{
  struct described_disk *found;
  bool attached;
  int rc;

  pthread_mutex_lock (&v->lock);
  attached = awaits_admission_locked (v);
  pthread_mutex_unlock (&v->lock);
  if (!attached)
    return set_message (-ENODEV, "no local disk is attached");
  found = malloc (sizeof *found);
  if (found == NULL)
    return set_error (-ENOMEM, "the local disk");
  rc = answered (local_call (v, describe, free, found));
  if (rc < 0)
    return rc;
  *disk = *found;
  free (found);
  return 0;
}

static int
admit_locked (struct nbdm *v, const struct described_disk *disk)
{
  int rc;

  v->local.attached = false;
  identity_adopt_locked (v, disk);
  disk_explain_locked (&v->local.disk, "an operator brought it back");
  local_set_locked (v, NBDM_LOCAL_RESYNCING);
  rc = volume_persist_locked (v);
  local_update_state_locked (v);
  return rc;
}

int
local_admit (struct nbdm *v)
{
  struct described_disk disk;
  int rc;

  local_use (v); /* so the described disk is the admitted one */
  rc = describe_attached (v, &disk);
  pthread_mutex_lock (&v->lock);
  if (v->stopping)
    rc = command_gate_locked (v);
  else if (rc == 0 && !awaits_admission_locked (v))
    rc = set_message (-ENODEV, "no local disk is attached");
  else if (rc == 0)
    rc = admit_locked (v, &disk);
  pthread_mutex_unlock (&v->lock);
  local_leave ();
  return rc;
}

int
local_drop (struct nbdm *v, const char *reason)
{
  int rc = 0;

  pthread_mutex_lock (&v->lock);
  if (v->stopping)
    rc = command_gate_locked (v);
  else if (v->local.state == NBDM_LOCAL_FAILED && v->local.attached) {
    v->local.attached = false;
    disk_explain_locked (&v->local.disk, "%s", reason);
    disk_bump_locked (&v->local.disk);
    rc = volume_persist_locked (v);
    local_io_give_up (v);
  }
  else
    rc = set_message (-ENODEV, "no local disk is attached");
  pthread_mutex_unlock (&v->lock);
  return rc == 0 ? answered (local_call (v, release_disk, NULL, NULL)) : rc;
}
