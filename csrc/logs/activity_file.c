/* SPDX-License-Identifier: BSD-3-Clause */

/* The activity log's file: a header and sectors of 62 extents each.
 *
 * The CRC of a sector shows a torn write: then nothing in the file is believed
 * (rule 9).
 *
 * Several sectors of one write may reach the disk in any order.  So an extent
 * that lost its place and got another before either was written may, after lost
 * power, stand in two sectors.  That is valid.  The same extent twice in one
 * sector is damage, since the set holds every extent once.
 *
 * A zeroed sector is not an empty one, as its CRC is wrong: if a file system
 * loses the file's contents but keeps its size, the file must not look like an
 * empty set.
 */

#define _GNU_SOURCE

#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <unistd.h>

#include "base/crc32c.h"
#include "base/error.h"
#include "base/fault.h"
#include "base/file.h"
#include "logs/activity.h"
#include "logs/activity_set.h"
#include "logs/layout.h"
#include "logs/log_header.h"

#define FILE_NAME "activity"

static uint64_t
sector_offset (uint32_t index)
{
  return LAYOUT_PAGE + (uint64_t)index * LAYOUT_SECTOR;
}

void
activity_seal_sector (struct disk_activity_sector *sector)
{
  sector->crc = 0;
  sector->crc = htole32 (crc32c (0, sector, sizeof *sector));
}

struct fill {
  struct disk_log_header header;
  uint32_t nr_sectors;
};

static int
fill_file (int fd, const void *opaque)
{
  const struct fill *fill = opaque;
  int r = full_pwrite (fd, &fill->header, sizeof fill->header, 0);

  for (uint32_t i = 0; i < fill->nr_sectors && r == 0; i++) {
    struct disk_activity_sector sector = { .index = htole32 (i) };

    activity_seal_sector (&sector);
    r = full_pwrite (fd, &sector, sizeof sector, sector_offset (i));
  }
  return r;
}

int
activity_create (int dirfd, const uint8_t *uuid, uint64_t session,
                 uint32_t nr_entries, uint32_t extent_size)
{
  struct fill fill = { .nr_sectors = activity_sectors (nr_entries) };

  assert (nr_entries > 0);
  log_header_init (&fill.header, ACTIVITY_MAGIC, "", uuid, session, nr_entries,
                   extent_size);
  fill.header.flags = htole32 (LOG_CLEAN);
  log_header_seal (&fill.header);
  return file_make_filled (dirfd, FILE_NAME, sector_offset (fill.nr_sectors),
                           fill_file, &fill);
}

static int
garbled (uint32_t index, const char *why)
{
  return set_message (-EUCLEAN, "%s is garbled: sector %" PRIu32 ": %s",
                      FILE_NAME, index, why);
}

static int
load_sector (struct activity *act, uint32_t index)
{
  struct disk_activity_sector sealed = act->sectors[index];

  activity_seal_sector (&sealed);
  if (sealed.crc != act->sectors[index].crc)
    return garbled (index, "CRC");
  if (le32toh (sealed.index) != index)
    return garbled (index, "it is another sector");

  for (uint32_t i = 0; i < ACTIVITY_PER_SECTOR; i++) {
    const uint64_t number = (uint64_t)index * ACTIVITY_PER_SECTOR + i;
    const char *why = NULL;

    if (number < act->nr_entries)
      why = activity_set_load (act, (uint32_t)number);
    else if (sealed.extent[i] != 0)
      why = "more extents than the log holds";
    if (why)
      return garbled (index, why);
  }
  return 0;
}

static int
load_sectors (struct activity *act)
{
  int r
      = full_pread (act->fd, act->sectors,
                    (size_t)act->nr_sectors * LAYOUT_SECTOR, sector_offset (0));

  if (r < 0)
    return set_error (r, "cannot read %s", FILE_NAME);
  for (uint32_t i = 0; i < act->nr_sectors; i++) {
    r = load_sector (act, i);
    if (r < 0)
      return r;
  }
  activity_set_loaded (act);
  return 0;
}

static int
load_log (struct activity *act, const uint8_t *uuid, uint64_t session,
          uint32_t extent_size)
{
  struct disk_log_header expect;
  uint64_t is;
  int r;

  log_header_init (&expect, ACTIVITY_MAGIC, "", uuid, session, act->nr_entries,
                   extent_size);
  r = log_header_load (act->fd, FILE_NAME, &expect,
                       sector_offset (activity_sectors (act->nr_entries)),
                       &act->header);
  if (r < 0)
    return r;
  is = le64toh (act->header.session);
  if (is != session && is != session + 1)
    return set_message (
        -EUCLEAN, "%s is of session %" PRIu64 ", the volume is at %" PRIu64,
        FILE_NAME, is, session);
  r = activity_set_init (act);
  if (r == 0)
    r = load_sectors (act);
  if (r < 0)
    return r;
  if (le32toh (act->header.flags) & LOG_CLEAN && activity_count (act) > 0)
    return set_message (-EUCLEAN,
                        "%s is garbled: closed cleanly, but with %" PRIu32
                        " active extents",
                        FILE_NAME, activity_count (act));
  return 0;
}

static void
release (struct activity *act)
{
  activity_set_free (act);
  close (act->fd);
}

int
activity_open (struct activity *act, int dirfd, const uint8_t *uuid,
               uint64_t session, uint32_t nr_entries, uint32_t extent_size,
               uint64_t nr_extents, bool *clean)
{
  struct activity loaded
      = { .nr_entries = nr_entries, .nr_extents = nr_extents };
  int r;

  assert (nr_entries > 0 && nr_extents < UINT64_MAX);
  loaded.fd = openat (dirfd, FILE_NAME, O_RDWR | PLAIN_FILE);
  if (loaded.fd == -1)
    return set_error (-errno, "cannot open %s", FILE_NAME);
  r = load_log (&loaded, uuid, session, extent_size);
  if (r < 0) {
    release (&loaded);
    return r;
  }
  *clean = le32toh (loaded.header.flags) & LOG_CLEAN;
  *act = loaded;
  return 0;
}

static int
write_all (struct activity *act)
{
  int r = fault_point ("activity_set_write");

  activity_set_seal (act);
  if (r == 0)
    r = full_pwrite (act->fd, act->sectors,
                     (size_t)act->nr_sectors * LAYOUT_SECTOR,
                     sector_offset (0));
  if (r < 0)
    return set_error (r, "cannot write %s", FILE_NAME);
  r = fault_point ("activity_set_sync");
  if (r == 0 && fdatasync (act->fd) == -1)
    r = -errno;
  if (r < 0)
    return set_error (r, "cannot make %s durable", FILE_NAME);
  return 0;
}

/* The loaded set counts as durable, so it is written once more: a process that
 * died between a write and its fdatasync, or whose fdatasync failed, left
 * sectors that may exist only in the page cache.
 */
int
activity_begin (struct activity *act, uint64_t session)
{
  int r = write_all (act);

  if (r < 0)
    return r;
  act->header.session = htole64 (session);
  act->header.flags &= ~htole32 (LOG_CLEAN);
  return log_header_store (act->fd, FILE_NAME, &act->header);
}

/* The sectors before the flag: the flag vouches for them. */
int
activity_finish (struct activity *act)
{
  int r = activity_set_clear (act);

  if (r == 0)
    r = write_all (act);
  if (r < 0)
    return r;
  act->header.flags |= htole32 (LOG_CLEAN);
  return log_header_store (act->fd, FILE_NAME, &act->header);
}

void
activity_close (struct activity *act)
{
  if (act->entries == NULL) /* never opened, or closed */
    return;
  release (act);
  memset (act, 0, sizeof *act);
}

int
activity_write (struct activity *act, const struct activity_batch *batch)
{
  int r = fault_point ("activity_write");

  for (uint32_t i = 0; i < batch->count && r == 0; i++)
    r = full_pwrite (act->fd, &batch->sectors[i], LAYOUT_SECTOR,
                     sector_offset (batch->index[i]));
  if (r < 0)
    return set_error (r, "cannot write %s", FILE_NAME);
  r = fault_point ("activity_sync");
  if (r == 0 && fdatasync (act->fd) == -1)
    r = -errno;
  if (r < 0)
    return set_error (r, "cannot make %s durable", FILE_NAME);
  fault_point ("activity_synced");
  return 0;
}
