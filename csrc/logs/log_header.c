/* SPDX-License-Identifier: BSD-3-Clause */

/* The header of each log's file: which volume and which session it belongs to.
 *
 * The CRC is checked before all that it covers, so that a garbled header is
 * reported as garbled, not as another volume's.
 */

#define _GNU_SOURCE

#include <endian.h>
#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/crc32c.h"
#include "base/error.h"
#include "base/fault.h"
#include "base/file.h"
#include "logs/layout.h"
#include "logs/log_header.h"

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
  /* Checked last: the complete file of a smaller volume is not truncated, it
   * only has another size.
   */
  if ((uint64_t)st.st_size < size)
    return truncated (name, (uint64_t)st.st_size, size);
  *header = h;
  return 0;
}

int
log_header_check_closed (const char *name, const struct disk_log_header *header,
                         const struct disk_superblock *sb)
{
  bool clean = le32toh (header->flags) & LOG_CLEAN;
  bool ahead = le64toh (header->session) > le64toh (sb->session);

  if (clean || ahead || !(le32toh (sb->flags) & SUPERBLOCK_CLEAN))
    return 0;
  return set_message (-EUCLEAN,
                      "%s was in use when the volume was not: an old copy was "
                      "put back",
                      name);
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
