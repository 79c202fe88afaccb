/* SPDX-License-Identifier: BSD-3-Clause */

/* Open the local disk and lock it, so that no other program writes to it.  The
 * caller checks whether it is large enough.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/error.h"
#include "volume/local_open.h"
#include "volume/volume.h"

/* One writer per disk. qemu sees an open-file-description lock, because it
 * locks its images this way, and so does another server of ours.  A block
 * device that is mounted or otherwise claimed refuses O_EXCL.
 */
static int
lock_disk (int fd, const char *path)
{
  struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };

  if (fcntl (fd, F_OFD_SETLK, &lock) == 0)
    return 0;
  if (errno == EAGAIN || errno == EACCES)
    return set_message (-EBUSY,
                        "the local disk %s is in use by another program", path);
  return set_error (-errno, "cannot lock the local disk %s", path);
}

/* Find out which kinds of zeroing the file system supports.  Try them on an
 * unnamed file beside the disk, because trying them on the disk would change
 * it.
 */
static void
probe_zeroing (struct local_file *disk, const char *path)
{
  char *copy = strdup (path);
  int fd
      = copy ? open (dirname (copy), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600) : -1;

  disk->can_punch = disk->can_zero_range = false;
  if (fd >= 0 && ftruncate (fd, 4096) == 0) {
    disk->can_punch
        = fallocate (fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096)
          == 0;
    disk->can_zero_range
        = fallocate (fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, 0, 4096)
          == 0;
  }
  if (fd >= 0)
    close (fd);
  free (copy);
}

static int
check_kind (struct local_file *disk, const char *path)
{
  struct stat st;

  if (stat (path, &st) < 0)
    return errno == ENOENT
               ? set_message (-ENOENT,
                              "the local disk %s does not exist; if it was "
                              "lost, an empty one in its place would read as "
                              "zeroes",
                              path)
               : set_error (-errno, "cannot look at the local disk %s", path);
  if (!S_ISREG (st.st_mode) && !S_ISBLK (st.st_mode))
    return set_message (-EINVAL,
                        "the local disk %s is neither a file nor a block "
                        "device",
                        path);
  disk->is_block = S_ISBLK (st.st_mode);
  return 0;
}

/* A read-only device can be opened for writing, and then fails each write. */
static int
check_writable (const struct local_file *disk, const char *path)
{
  int read_only = 0;

  if (disk->is_block && ioctl (disk->fd, BLKROGET, &read_only) == 0
      && read_only)
    return set_message (-EROFS, "the local disk %s is read-only", path);
  return 0;
}

/* The path of an open file as the kernel knows it, which asks no disk.  False:
 * there is no /proc, or it is too long.
 */
static bool
path_of (int fd, char *path, size_t size)
{
  char link[32];
  ssize_t n;

  snprintf (link, sizeof link, "/proc/self/fd/%d", fd);
  n = readlink (link, path, size);
  if (n < 0 || (size_t)n >= size)
    return false;
  path[n] = '\0';
  return true;
}

int
local_check_place (const struct local_file *disk, int state_fd,
                   const char *path)
{
  char ours[PATH_MAX], state[PATH_MAX];
  size_t n;

  if (!path_of (disk->fd, ours, sizeof ours)
      || !path_of (state_fd, state, sizeof state))
    return 0;
  n = strlen (state);
  if (strncmp (ours, state, n) != 0 || ours[n] != '/')
    return 0;
  return set_message (-EINVAL,
                      "the local disk %s lies in the state directory, from "
                      "which no start takes a disk: it is not used",
                      path);
}

int
local_open (struct local_file *disk, const char *path, uint64_t *size)
{
  off_t end;
  int rc = check_kind (disk, path);

  if (rc < 0)
    return rc;
  disk->fd = open (path, O_RDWR | O_CLOEXEC | (disk->is_block ? O_EXCL : 0));
  if (disk->fd < 0)
    return errno == EBUSY
               ? set_message (-EBUSY,
                              "the local disk %s is in use (mounted, or part "
                              "of another device)",
                              path)
               : set_error (-errno, "cannot open the local disk %s", path);
  rc = check_writable (disk, path);
  if (rc == 0)
    rc = lock_disk (disk->fd, path);
  if (rc < 0)
    return rc;
  end = lseek (disk->fd, 0, SEEK_END);
  if (end < 0)
    return set_error (-errno, "cannot tell the size of %s", path);
  *size = disk->size = (uint64_t)end;
  atomic_store (&disk->shrunk, false);
  if (!disk->is_block)
    probe_zeroing (disk, path);
  return 0;
}
