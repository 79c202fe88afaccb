/* SPDX-License-Identifier: BSD-3-Clause */

/* A disk in the place of the local one that failed: what the policy threads
 * call.  As with a remote, an open disk is used for nothing until it is
 * admitted, because it may not be the one that was left.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

#include "internal.h"
#include "volume.h"

/* The old disk, which somebody may still be waiting for: the descriptor's
 * number stays, and what still uses it finds a directory, that is EBADF or
 * EISDIR.
 */
static int
release_disk (struct nbdm *v)
{
  const struct flock unlock = { .l_type = F_UNLCK, .l_whence = SEEK_SET };

  if (v->local.disk.fd < 0)
    return 0;
  (void)fcntl (v->local.disk.fd, F_OFD_SETLK, &unlock);
  if (dup3 (v->dirfd, v->local.disk.fd, O_CLOEXEC) < 0)
    return set_error (-errno, "cannot close the failed local disk");
  return 0;
}

static int
install_disk_locked (struct nbdm *v, struct local_disk *disk)
{
  if (v->local.disk.fd >= 0) {
    if (dup3 (disk->fd, v->local.disk.fd, O_CLOEXEC) < 0)
      return set_error (-errno, "cannot use the local disk");
    close (disk->fd);
    disk->fd = v->local.disk.fd;
  }
  v->local.disk = *disk;
  disk->fd = -1;
  v->local.attached = true;
  v->local.flush_error = 0;
  atomic_store (&v->local.doubted, false);
  return 0;
}

/* A request that began on the failed disk would go on on the new one: it looks
 * at the descriptor's number again with each part of a long write.
 */
static bool
old_disk_in_use_locked (const struct nbdm *v)
{
  for (const struct request *req = v->requests; req; req = req->next)
    if (req->on_local)
      return true;
  return false;
}

static int
begin_attach (struct nbdm *v)
{
  int rc = 0;

  pthread_mutex_lock (&v->lock);
  if (v->local.state != NBDM_LOCAL_FAILED)
    rc = set_message (-EALREADY, "the local disk has not failed");
  else if (v->failed)
    rc = set_message (-EIO, "the volume has failed: %s", v->reason);
  else if (old_disk_in_use_locked (v))
    rc = set_message (-EBUSY, "a request to the failed disk has not ended yet");
  else
    v->local.attached = false;
  pthread_mutex_unlock (&v->lock);
  return rc == 0 ? release_disk (v) : rc;
}

int
nbdm_local_attach (struct nbdm *v, const char *path, int replaced)
{
  struct local_disk disk = { .fd = -1 };
  uint64_t size = 0;
  int rc = begin_attach (v);

  if (rc == 0)
    rc = local_open (&disk, path, &size);
  if (rc == 0 && size < v->size)
    rc = set_message (-ERANGE,
                      "the local disk %s has %llu bytes, the volume %llu", path,
                      (unsigned long long)size, (unsigned long long)v->size);
  pthread_mutex_lock (&v->lock);
  if (rc == 0)
    rc = install_disk_locked (v, &disk);
  if (rc == 0 && replaced) {
    dirty_map_mark (&v->local.dm, 0, v->nr_regions, false);
    rc = volume_persist_locked (v);
  }
  v->local.serial++;
  pthread_mutex_unlock (&v->lock);
  if (disk.fd >= 0)
    close (disk.fd);
  return rc;
}

int
nbdm_local_admit (struct nbdm *v)
{
  int rc = 0;

  pthread_mutex_lock (&v->lock);
  if (v->local.state != NBDM_LOCAL_FAILED || !v->local.attached)
    rc = set_message (-ENODEV, "no local disk is attached");
  else {
    v->local.attached = false;
    snprintf (v->local.reason, sizeof v->local.reason,
              "an operator brought it back");
    local_set_locked (v, NBDM_LOCAL_RESYNCING);
    rc = volume_persist_locked (v);
    local_settle_locked (v);
  }
  pthread_mutex_unlock (&v->lock);
  return rc;
}

int
nbdm_local_drop (struct nbdm *v, const char *reason)
{
  int rc = 0;

  pthread_mutex_lock (&v->lock);
  if (v->local.state == NBDM_LOCAL_FAILED && v->local.attached) {
    v->local.attached = false;
    snprintf (v->local.reason, sizeof v->local.reason, "%s", reason);
    v->local.serial++;
    rc = volume_persist_locked (v);
  }
  else
    rc = set_message (-ENODEV, "no local disk is attached");
  pthread_mutex_unlock (&v->lock);
  return rc == 0 ? release_disk (v) : rc;
}
