/* SPDX-License-Identifier: BSD-3-Clause */

/* Files of the state directory: made whole or not at all, read and written in
 * full.
 *
 * A file is created under a temporary name, its space allocated, its contents
 * made durable, and only then renamed.  So a crash, a full disk or an error on
 * the way leaves the old file or none, never half of one.  The temporary name
 * is fixed ("dirty.dr~new"), so that the next try replaces the remains of a
 * crash and they do not pile up; the volume's lock excludes a second process.
 * No remote has a "~" in its name, so the temporary file cannot be another
 * remote's.
 */

#define _GNU_SOURCE

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/error.h"
#include "base/fault.h"
#include "base/file.h"

int
full_pread (int fd, void *buf, size_t count, uint64_t offset)
{
  char *p = buf;

  while (count > 0) {
    ssize_t n = pread (fd, p, count, (off_t)offset);

    if (n == -1 && errno == EINTR)
      continue;
    if (n == -1)
      return -errno;
    if (n == 0) /* the file ends here: it is too short */
      return -EIO;
    p += n;
    count -= (size_t)n;
    offset += (uint64_t)n;
  }
  return 0;
}

int
full_pwrite (int fd, const void *buf, size_t count, uint64_t offset)
{
  const char *p = buf;

  while (count > 0) {
    ssize_t n = pwrite (fd, p, count, (off_t)offset);

    if (n == -1 && errno == EINTR)
      continue;
    if (n == -1)
      return -errno;
    if (n == 0) /* otherwise this would loop forever */
      return -EIO;
    p += n;
    count -= (size_t)n;
    offset += (uint64_t)n;
  }
  return 0;
}

bool
all_zero (const uint8_t *buf, uint64_t length)
{
  return buf[0] == 0 && memcmp (buf, buf + 1, length - 1) == 0;
}

static void
format_size (char *text, size_t max, uint64_t size)
{
  static const char *const units[] = { "KiB", "MiB", "GiB", "TiB", "PiB" };
  double value = (double)size / 1024;
  size_t i = 0;

  while (value >= 1024 && i + 1 < sizeof units / sizeof units[0]) {
    value /= 1024;
    i++;
  }
  snprintf (text, max, "%.1f %s", value, units[i]);
}

static int
no_room (int err, const char *name, uint64_t size)
{
  char text[32];

  format_size (text, sizeof text, size);
  if (err == -EDQUOT)
    return set_error (err, "no room for %s (%s) in the state directory", name,
                      text);
  return set_message (err, "no room for %s (%s) in the state directory", name,
                      text);
}

/* Allocate rather than write zeroes: an allocated extent reads as zero and
 * stays ours, and creating 8 GiB of maps writes nothing.  Without either, a
 * store into the mapping on a full file system would raise SIGBUS.
 * posix_fallocate and not fallocate: it writes where the file system does not
 * support allocation, so its success always means that the space exists.
 *
 * XXX A copy-on-write file system (btrfs after a snapshot, zfs) still takes new
 * space for every store: when it is full the server dies of SIGBUS, and
 * recovers at its next start as after any crash.
 */
static int
allocate (int fd, uint64_t size)
{
  int r;

  do
    r = posix_fallocate (fd, 0, (off_t)size);
  while (r == EINTR);
  return -r;
}

static int
fill_and_sync (int fd, const char *name, uint64_t size, file_fill fill,
               const void *opaque)
{
  int r = fault_point ("file_allocate");

  if (r == 0)
    r = allocate (fd, size);
  if (r == 0)
    r = fill (fd, opaque);
  if (r == 0)
    r = fault_point ("file_sync");
  if (r == 0 && fdatasync (fd) == -1)
    r = -errno;
  if (r == -ENOSPC || r == -EDQUOT)
    return no_room (r, name, size);
  if (r < 0)
    return set_error (r, "cannot write %s in the state directory", name);
  return 0;
}

static int
rename_durably (int dirfd, const char *temporary, const char *name)
{
  int r = fault_point ("file_rename");

  if (r == 0 && renameat (dirfd, temporary, dirfd, name) == -1)
    r = -errno;
  if (r < 0) {
    unlinkat (dirfd, temporary, 0);
    return set_error (r, "cannot rename %s to %s in the state directory",
                      temporary, name);
  }
  r = fault_point ("file_rename_sync");
  if (r == 0 && fsync (dirfd) == -1)
    r = -errno;
  if (r < 0)
    return set_error (r, "cannot make %s durable: fsync of the state directory",
                      name);
  return 0;
}

int
file_make_filled (int dirfd, const char *name, uint64_t size, file_fill fill,
                  const void *opaque)
{
  char temporary[256];
  int fd, r;

  if (snprintf (temporary, sizeof temporary, "%s~new", name)
      >= (int)sizeof temporary)
    return set_error (-ENAMETOOLONG, "%s", name);
  if (unlinkat (dirfd, temporary, 0) == -1 && errno != ENOENT)
    return set_error (-errno, "cannot replace %s in the state directory",
                      temporary);
  fd = openat (dirfd, temporary, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (fd == -1)
    return set_error (-errno, "cannot make %s in the state directory", name);

  r = fill_and_sync (fd, name, size, fill, opaque);
  if (close (fd) == -1 && r == 0)
    r = set_error (-errno, "cannot write %s in the state directory", name);
  if (r == 0)
    r = rename_durably (dirfd, temporary, name);
  else
    unlinkat (dirfd, temporary, 0);
  return r;
}
