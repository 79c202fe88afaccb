/* SPDX-License-Identifier: BSD-3-Clause */

/* Files of the state directory: made whole or not at all, read and written in
 * full, and opened by a header that says whose they are.
 *
 * A file is made under another name, its space allocated, its contents made
 * durable, and only then renamed.  So a crash, a full disk or a failure on the
 * way leaves the old file or none, never half of one.  The other name is fixed
 * ("dirty.dr.new"), for what a crash leaves is then replaced by the next try
 * instead of piling up; the volume's lock keeps two makers apart.
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

#include "internal.h"

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
    if (n == 0) /* the file ends here, and all was asked for */
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
    if (n == 0) /* would go round for ever */
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

/* Allocate rather than write zeroes: an allocated extent reads as zero, is
 * ours for good, and 8 GiB of maps are not written just to be made.  Without
 * either, a store into the mapping of a full file system would be a SIGBUS.
 * posix_fallocate and not fallocate: it writes where the file system knows no
 * allocation, so its success means room everywhere.
 *
 * XXX A copy-on-write file system (btrfs after a snapshot, zfs) takes new room
 * for every store all the same: full, it kills the server, which recovers at
 * its next start as after any crash.
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

  if (snprintf (temporary, sizeof temporary, "%s.new", name)
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

static int
fill_header (int fd, const void *header)
{
  return full_pwrite (fd, header, LAYOUT_PAGE, 0);
}

int
file_make (int dirfd, const char *name, const void *header, uint64_t size)
{
  return file_make_filled (dirfd, name, LAYOUT_PAGE + size, fill_header,
                           header);
}

void
log_header_init (struct disk_log_header *header, const char *magic,
                 const char *name, const uint8_t *uuid, uint64_t session,
                 uint64_t entries, uint64_t entry_size)
{
  memset (header, 0, sizeof *header);
  memcpy (header->magic, magic, sizeof header->magic);
  header->version = htole32 (LAYOUT_VERSION);
  memcpy (header->uuid, uuid, sizeof header->uuid);
  memcpy (header->name, name, strnlen (name, sizeof header->name - 1));
  header->session = htole64 (session);
  header->entries = htole64 (entries);
  header->entry_size = htole64 (entry_size);
  log_header_seal (header);
}

void
log_header_seal (struct disk_log_header *header)
{
  header->crc = 0;
  header->crc = htole32 (crc32c (0, header, sizeof *header));
}

/* The CRC is looked at before anything it covers, so that a garbled header is
 * called garbled and not of another volume.
 */
static int
check_header (const char *name, const struct disk_log_header *expect,
              const struct disk_log_header *h)
{
  struct disk_log_header sealed = *h;

  if (memcmp (h->magic, expect->magic, sizeof h->magic) != 0)
    return set_message (-EUCLEAN, "%s is garbled (magic)", name);
  log_header_seal (&sealed);
  if (sealed.crc != h->crc)
    return set_message (-EUCLEAN, "%s is garbled (CRC)", name);
  if (le32toh (h->version) != LAYOUT_VERSION)
    return set_message (-EUCLEAN,
                        "%s has version %" PRIu32 ", this program knows only "
                        "version %d",
                        name, le32toh (h->version), LAYOUT_VERSION);
  if (memcmp (h->uuid, expect->uuid, sizeof h->uuid) != 0)
    return set_message (-EUCLEAN, "%s belongs to another volume", name);
  if (memcmp (h->name, expect->name, sizeof h->name) != 0)
    return set_message (-EUCLEAN, "%s belongs to another remote (%.63s)", name,
                        h->name);
  if (h->entries != expect->entries)
    return set_message (-EUCLEAN,
                        "%s is of another size: %" PRIu64 " entries instead "
                        "of %" PRIu64,
                        name, le64toh (h->entries), le64toh (expect->entries));
  if (h->entry_size != expect->entry_size)
    return set_message (-EUCLEAN,
                        "%s is of another size: entries of %" PRIu64
                        " bytes instead of %" PRIu64,
                        name, le64toh (h->entry_size),
                        le64toh (expect->entry_size));
  return 0;
}

static int
truncated (const char *name, uint64_t is, uint64_t size)
{
  return set_message (-EUCLEAN,
                      "%s is truncated: %" PRIu64 " of %" PRIu64 " bytes", name,
                      is, size);
}

int
log_header_load (int fd, const char *name, const struct disk_log_header *expect,
                 uint64_t size, struct disk_log_header *header)
{
  struct disk_log_header h;
  struct stat st;
  int r;

  if (fstat (fd, &st) == -1)
    return set_error (-errno, "%s", name);
  if (st.st_size < LAYOUT_PAGE)
    return truncated (name, (uint64_t)st.st_size, size);
  r = full_pread (fd, &h, sizeof h, 0);
  if (r < 0)
    return set_error (r, "cannot read %s", name);
  r = check_header (name, expect, &h);
  if (r < 0)
    return r;
  /* Last: a whole file of a smaller volume is of another size, not truncated.
   */
  if ((uint64_t)st.st_size < size)
    return truncated (name, (uint64_t)st.st_size, size);
  *header = h;
  return 0;
}

int
log_header_store (int fd, const char *name, struct disk_log_header *header)
{
  int r = fault_point ("log_header_write");

  log_header_seal (header);
  if (r == 0)
    r = full_pwrite (fd, header, sizeof *header, 0);
  if (r < 0)
    return set_error (r, "cannot write the header of %s", name);
  r = fault_point ("log_header_sync");
  if (r == 0 && fdatasync (fd) == -1)
    r = -errno;
  if (r < 0)
    return set_error (r, "cannot make the header of %s durable", name);
  return 0;
}
