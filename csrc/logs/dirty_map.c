/* SPDX-License-Identifier: BSD-3-Clause */

/* The file dirty.<remote>: which regions may differ on that remote.
 *
 * The bits lie in a shared mapping, so a killed process loses none of them: the
 * page cache holds every store.  After lost power only bits that msync made
 * durable are left; the activity log covers the rest.  The header is written
 * with pwrite and fdatasync, and LOG_CLEAN in it always after the bits it
 * vouches for, so a crash between the two leaves a file that is not clean.
 *
 * This module never decides "all dirty": it returns an error with the cause for
 * a file that cannot be trusted, and the caller acts on it (rule 9).
 */

#define _GNU_SOURCE

#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/crc32c.h"
#include "base/error.h"
#include "base/fault.h"
#include "base/file.h"
#include "logs/bitmap.h"
#include "logs/dirty_map.h"
#include "logs/layout.h"
#include "logs/log_header.h"

#define FILL_SIZE 65536
#define NR_VOLATILE 4 /* maps in memory alone */

static int
file_name (char *file, size_t max, const char *remote)
{
  struct disk_log_header h;

  if (*remote == '\0' || strlen (remote) >= sizeof h.name
      || strchr (remote, '/'))
    return set_message (-EINVAL, "\"%s\" is no name for a remote", remote);
  snprintf (file, max, "dirty.%s", remote);
  return 0;
}

static uint64_t
file_bytes (int nr_maps, uint64_t nr_regions)
{
  return LAYOUT_PAGE + (uint64_t)nr_maps * bitmap_bytes (nr_regions);
}

/* What dirty_map_create writes. */
struct contents {
  struct disk_log_header header;
  int nr_maps;
  bool full[NR_NODE_MAPS]; /* every region is in this map */
};

/* Write one map, whose first `nr_set` bits are ones, and add it to the CRC; the
 * zeroes after them are in the file already.
 */
static int
fill_map (int fd, uint64_t offset, uint64_t nr_set, uint64_t size,
          uint32_t *crc)
{
  uint8_t buf[FILL_SIZE];

  for (uint64_t done = 0; done < size;) {
    size_t n = size - done < sizeof buf ? size - done : sizeof buf;
    uint64_t left = nr_set / 8 > done ? nr_set / 8 - done : 0;
    size_t ones = left < n ? left : n;

    memset (buf, 0xff, ones);
    memset (buf + ones, 0, n - ones);
    if (nr_set % 8 && nr_set / 8 >= done && nr_set / 8 < done + n)
      buf[ones++] = (uint8_t)((1U << nr_set % 8) - 1);
    int r = full_pwrite (fd, buf, ones, offset + done);
    if (r < 0)
      return r;
    *crc = crc32c (*crc, buf, n);
    done += n;
  }
  return 0;
}

static int
fill (int fd, const void *opaque)
{
  const struct contents *contents = opaque;
  struct disk_log_header header = contents->header;
  uint64_t nr_regions = le64toh (header.entries);
  uint64_t size = bitmap_bytes (nr_regions);
  uint32_t crc = 0;

  for (int i = 0; i < contents->nr_maps; i++) {
    int r = fill_map (fd, LAYOUT_PAGE + (uint64_t)i * size,
                      contents->full[i] ? nr_regions : 0, size, &crc);
    if (r < 0)
      return r;
  }
  header.flags |= htole32 (LOG_CLEAN);
  header.bits_crc = htole32 (crc);
  log_header_seal (&header);
  return full_pwrite (fd, &header, sizeof header, 0);
}

int
dirty_map_create (int dirfd, const char *remote, const uint8_t *uuid,
                  uint64_t session, uint64_t nr_regions, uint32_t region_size,
                  unsigned contents)
{
  struct contents new
      = { .nr_maps = contents & NEW_MAP_NODE ? NR_NODE_MAPS : NR_MAPS,
          .full[MAP_DIRTY] = contents & NEW_MAP_DIRTY,
          .full[MAP_LATE] = contents & NEW_MAP_LATE,
          .full[MAP_DOUBTS] = contents & NEW_MAP_DOUBTED };
  char file[sizeof ((struct dirty_map *)0)->file];
  int r;

  r = file_name (file, sizeof file, remote);
  if (r < 0)
    return r;
  log_header_init (&new.header, DIRTY_MAGIC, remote, uuid, session, nr_regions,
                   region_size);
  new.header.flags = htole32 ((contents & NEW_MAP_RENEWED ? LOG_RENEWED : 0)
                              | (contents & NEW_MAP_NODE ? LOG_DOUBTS : 0));
  return file_make_filled (dirfd, file, file_bytes (new.nr_maps, nr_regions),
                           fill, &new);
}

static void *
bits (const struct dirty_map *dm)
{
  return (char *)dm->mapping + LAYOUT_PAGE;
}

static size_t
bits_size (const struct dirty_map *dm)
{
  return dm->mapping_size - LAYOUT_PAGE;
}

/* Read the maps and compute their CRC; with `count` also count their bits.  It
 * uses pread: a read through the mapping would add every page to the process's
 * memory, a quarter of a GiB at 16 TiB, nearly all zeros that are never read
 * again.
 */
static int
read_maps (struct dirty_map *dm, bool count, uint32_t *crc)
{
  uint64_t nr_pages = dm->copied.nr_pages, size = bits_size (dm);
  uint8_t buf[FILL_SIZE];

  *crc = 0;
  for (uint64_t done = 0; done < size;) {
    size_t n = size - done < sizeof buf ? size - done : sizeof buf;
    int r = full_pread (dm->fd, buf, n, LAYOUT_PAGE + done);

    if (r < 0)
      return set_error (r, "cannot read %s", dm->file);
    *crc = crc32c (*crc, buf, n);
    for (size_t at = 0; count && at < n; at += LAYOUT_PAGE) {
      uint64_t page = (done + at) / LAYOUT_PAGE;

      if (!all_zero (buf + at, LAYOUT_PAGE)) /* nearly all are */
        bitmap_count (&dm->map[page / nr_pages], page % nr_pages, buf + at);
    }
    done += n;
  }
  return 0;
}

/* A session lower than the volume's is an old copy of this file, a higher one
 * an old copy of the superblock.  A session one higher is from a start that was
 * interrupted between stamping this file and storing the superblock: no client
 * wrote in it.  However many starts are interrupted, each stamps this same
 * number (open.c).
 */
static int
check_trust (const struct dirty_map *dm, uint64_t session, uint32_t crc)
{
  uint64_t stamped = le64toh (dm->header.session);
  bool garbled = le32toh (dm->header.flags) & LOG_CLEAN
                 && crc != le32toh (dm->header.bits_crc);

  if (stamped != session && stamped != session + 1)
    return set_message (-EUCLEAN,
                        "%s is of session %" PRIu64
                        ", the volume is at %" PRIu64
                        ": an old copy %s was put back",
                        dm->file, stamped, session,
                        stamped < session ? "of it" : "of the superblock");
  if (garbled)
    return set_message (-EUCLEAN, "%s is garbled (CRC of the maps)", dm->file);
  return 0;
}

/* Map the file, whose size log_header_load has checked: access past the end of
 * a mapped file would raise SIGBUS.
 */
static int
map_file (struct dirty_map *dm, uint64_t nr_regions)
{
  dm->mapping = mmap (NULL, dm->mapping_size, PROT_READ | PROT_WRITE,
                      MAP_SHARED, dm->fd, 0);
  if (dm->mapping == MAP_FAILED) {
    dm->mapping = NULL;
    return set_error (-errno, "cannot map %s", dm->file);
  }
  /* Without a reservation of memory: few regions are between copy and flush at
   * a time.
   */
  dm->volatile_words = mmap (
      NULL, NR_VOLATILE * bitmap_bytes (nr_regions), PROT_READ | PROT_WRITE,
      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (dm->volatile_words == MAP_FAILED) {
    dm->volatile_words = NULL;
    return set_error (-errno, "no memory for the maps of %s", dm->file);
  }
  return 0;
}

static int
init_bitmaps (struct dirty_map *dm, uint64_t nr_regions)
{
  struct bitmap *in_memory[NR_VOLATILE]
      = { &dm->copied, &dm->lost, &dm->owed, &dm->owed_late };
  char *words = bits (dm);
  int r = 0;

  for (int i = 0; i < dm->nr_maps && r == 0; i++) {
    r = bitmap_init (&dm->map[i], words, nr_regions);
    words += bitmap_bytes (nr_regions);
  }
  words = dm->volatile_words;
  for (int i = 0; i < NR_VOLATILE && r == 0; i++) {
    r = bitmap_init (in_memory[i], words, nr_regions);
    words += bitmap_bytes (nr_regions);
  }
  return r;
}

/* The header says how many maps follow, and log_header_load checks that the
 * file has room for them.
 */
static int
load_header (struct dirty_map *dm, const struct disk_log_header *expect,
             uint64_t nr_regions)
{
  uint64_t size = file_bytes (NR_MAPS, nr_regions);
  int r = log_header_load (dm->fd, dm->file, expect, size, &dm->header);

  dm->nr_maps = NR_MAPS;
  if (r == 0 && le32toh (dm->header.flags) & LOG_DOUBTS) {
    dm->nr_maps = NR_NODE_MAPS;
    size = file_bytes (NR_NODE_MAPS, nr_regions);
    r = log_header_load (dm->fd, dm->file, expect, size, &dm->header);
  }
  dm->mapping_size = size;
  return r;
}

/* Open the file and check its header; nothing is mapped yet. */
static int
open_file (struct dirty_map *dm, int dirfd, int access, const char *remote,
           const uint8_t *uuid, uint64_t session, uint64_t nr_regions,
           uint32_t region_size)
{
  struct disk_log_header expect;
  int r = file_name (dm->file, sizeof dm->file, remote);

  if (r < 0)
    return r;
  log_header_init (&expect, DIRTY_MAGIC, remote, uuid, session, nr_regions,
                   region_size);
  dm->fd = openat (dirfd, dm->file, access | PLAIN_FILE);
  if (dm->fd == -1)
    return set_error (-errno, "cannot open %s", dm->file);
  r = load_header (dm, &expect, nr_regions);
  if (r < 0)
    close (dm->fd);
  return r;
}

/* Has a server stored another header since this one was read? */
static bool
header_changed (const struct dirty_map *dm)
{
  struct disk_log_header now;

  return full_pread (dm->fd, &now, sizeof now, 0) == 0
         && memcmp (&now, &dm->header, sizeof now) != 0;
}

int
dirty_map_check (int dirfd, const char *remote, const uint8_t *uuid,
                 uint64_t session, uint64_t nr_regions, uint32_t region_size,
                 struct disk_log_header *header)
{
  struct dirty_map map = { .fd = -1 };
  uint32_t crc = 0;
  int r = open_file (&map, dirfd, O_RDONLY, remote, uuid, session, nr_regions,
                     region_size);

  if (r < 0)
    return r;
  if (le32toh (map.header.flags) & LOG_CLEAN)
    r = read_maps (&map, false, &crc);
  if (r == 0)
    r = check_trust (&map, session, crc);
  if (r == -EUCLEAN && header_changed (&map))
    r = 0;
  close (map.fd);
  *header = map.header;
  return r;
}

int
dirty_map_open (struct dirty_map *dm, int dirfd, const char *remote,
                const uint8_t *uuid, uint64_t session, uint64_t nr_regions,
                uint32_t region_size, bool *clean)
{
  struct dirty_map map = { .fd = -1 };
  uint32_t crc = 0;
  int r = open_file (&map, dirfd, O_RDWR, remote, uuid, session, nr_regions,
                     region_size);

  if (r < 0)
    return r;
  r = map_file (&map, nr_regions);
  if (r == 0)
    r = init_bitmaps (&map, nr_regions);
  if (r == 0)
    r = read_maps (&map, true, &crc);
  if (r == 0)
    r = check_trust (&map, session, crc);
  if (r < 0) {
    dirty_map_close (&map);
    return r;
  }
  /* Only once the file is trusted: a file that is not stays unchanged. */
  for (int i = 0; i < map.nr_maps; i++)
    bitmap_clear_padding (&map.map[i]);
  *dm = map;
  *clean = le32toh (map.header.flags) & LOG_CLEAN;
  return 0;
}

static int
store_header (struct dirty_map *dm, uint64_t session, uint32_t flags,
              uint32_t crc)
{
  struct disk_log_header header = dm->header;
  int r;

  header.session = htole64 (session);
  header.flags = htole32 (flags) | (dm->header.flags & htole32 (LOG_DOUBTS));
  header.bits_crc = htole32 (crc);
  r = log_header_store (dm->fd, dm->file, &header);
  if (r == 0)
    dm->header = header;
  return r;
}

/* A first sync has cleared this map bit by bit, so all its pages are in the
 * process's memory.  Give them back: no page is read while its count is 0, and
 * the file has the content.  Locked pages stay.
 */
static void
let_go_of_empty (const struct bitmap *map)
{
  if (map->nr_set == 0)
    (void)madvise (map->words, map->nr_pages * LAYOUT_PAGE, MADV_DONTNEED);
}

/* msync even if nothing changed. */
static int
sync_bits (struct dirty_map *dm)
{
  int r;

  /* Before the msync: a bit set while it runs must be seen as a change. */
  dm->changed = false;
  r = fault_point ("dirty_map_sync");
  if (r == 0 && msync (bits (dm), bits_size (dm), MS_SYNC) == -1)
    r = -errno;
  if (r == 0) {
    dm->persists++;
    let_go_of_empty (&dm->map[MAP_DIRTY]);
    fault_point ("dirty_map_synced");
    return 0;
  }
  dm->changed = true;
  return set_error (r, "cannot make %s durable", dm->file);
}

/* Make the kernel treat every page that has a bit set as changed. */
static void
touch_pages (struct bitmap *map)
{
  for (uint64_t page = 0; page < map->nr_pages; page++)
    if (map->page_set[page] > 0) {
      volatile uint64_t *word
          = &map->words[page * (LAYOUT_PAGE / sizeof *map->words)];
      *word = *word;
    }
}

int
dirty_map_unseal (struct dirty_map *dm, uint64_t session)
{
  uint32_t flags = le32toh (dm->header.flags);

  if (!(flags & LOG_CLEAN))
    return 0;
  return store_header (dm, session, flags & ~(uint32_t)LOG_CLEAN, 0);
}

/* The loaded maps count as durable from here on, so they are written once more:
 * after a failed msync the kernel may treat pages as clean that never reached
 * the disk, and the process that got the error is gone.
 */
int
dirty_map_begin (struct dirty_map *dm, uint64_t session)
{
  int r;

  for (int i = 0; i < dm->nr_maps; i++)
    touch_pages (&dm->map[i]);
  r = sync_bits (dm);
  return r < 0 ? r : store_header (dm, session, 0, 0);
}

int
dirty_map_persist (struct dirty_map *dm)
{
  return dm->changed ? sync_bits (dm) : 0;
}

int
dirty_map_finish (struct dirty_map *dm)
{
  uint32_t crc;
  int r;

  /* Always: the unflushed maps change without `changed` being set, as only
   * the dirty map's own bits must outlive a power loss.
   */
  r = sync_bits (dm);
  if (r == 0)
    r = read_maps (dm, false, &crc);
  if (r < 0)
    return r;
  return store_header (dm, le64toh (dm->header.session), LOG_CLEAN, crc);
}

void
dirty_map_close (struct dirty_map *dm)
{
  for (int i = 0; i < dm->nr_maps; i++)
    bitmap_free (&dm->map[i]);
  bitmap_free (&dm->copied);
  bitmap_free (&dm->lost);
  bitmap_free (&dm->owed);
  bitmap_free (&dm->owed_late);
  if (dm->volatile_words)
    munmap (dm->volatile_words,
            NR_VOLATILE
                * ((dm->mapping_size - LAYOUT_PAGE) / (size_t)dm->nr_maps));
  if (dm->mapping)
    munmap (dm->mapping, dm->mapping_size);
  if (dm->file[0]) /* a struct never opened is all zero, and fd 0 is not ours */
    close (dm->fd);
  *dm = (struct dirty_map){ .fd = -1 };
}

void
dirty_map_mark_lost (struct dirty_map *dm, uint64_t first, uint64_t count)
{
  const struct bitmap *dirty = &dm->map[MAP_DIRTY];
  uint64_t end = first + count, stop;

  while ((first = bitmap_next_set (dirty, first, end)) < end) {
    stop = bitmap_next_clear (dirty, first, end);
    bitmap_set (&dm->lost, first, stop - first);
    first = stop;
  }
}

void
dirty_map_mark (struct dirty_map *dm, uint64_t first, uint64_t count, bool late)
{
  bitmap_set (&dm->map[MAP_DIRTY], first, count);
  if (late)
    bitmap_set (&dm->map[MAP_LATE], first, count);
  bitmap_clear (&dm->copied, first, count);
  dm->changed = true;
}

void
dirty_map_doubt (struct dirty_map *dm, uint64_t first, uint64_t count)
{
  assert (dm->nr_maps == NR_NODE_MAPS);
  bitmap_set (&dm->map[MAP_DOUBTS], first, count);
  dm->changed = true;
}

void
dirty_map_owe (struct dirty_map *dm, uint64_t region, bool late)
{
  bitmap_set (&dm->owed, region, 1);
  if (late)
    bitmap_set (&dm->owed_late, region, 1);
}

/* The map cannot tell a lost answered write from one under way any more, so
 * each region counts as both.
 */
void
dirty_map_pay (struct dirty_map *dm, uint64_t region)
{
  if (!bitmap_test (&dm->owed, region))
    return;
  dirty_map_mark (dm, region, 1, bitmap_test (&dm->owed_late, region));
  dirty_map_mark_lost (dm, region, 1);
}

/* Take what is dirty of the regions [first, end) out of an unflushed map. */
static void
settle_run (struct dirty_map *dm, enum dirty_map_index unflushed,
            uint64_t first, uint64_t end)
{
  const struct bitmap *dirty = &dm->map[MAP_DIRTY];
  uint64_t stop;

  while ((first = bitmap_next_set (dirty, first, end)) < end) {
    stop = bitmap_next_clear (dirty, first, end);
    bitmap_clear (&dm->map[unflushed], first, stop - first);
    first = stop;
  }
}

/* The mark has replaced the region's unflushed bits, where it was made.  Where
 * it was not, the remote is still the only source.
 */
void
dirty_map_forgive (struct dirty_map *dm)
{
  uint64_t nr = dm->owed.nr_bits, region = 0, end;

  for (; (region = bitmap_next_set (&dm->owed, region, nr)) < nr;
       region = end) {
    end = bitmap_next_clear (&dm->owed, region, nr);
    settle_run (dm, MAP_UNFLUSHED0, region, end);
    settle_run (dm, MAP_UNFLUSHED1, region, end);
  }
  bitmap_clear_all (&dm->owed);
  bitmap_clear_all (&dm->owed_late);
}

void
dirty_map_empty (struct dirty_map *dm, enum dirty_map_index unflushed)
{
  struct bitmap *map = &dm->map[unflushed];
  uint64_t nr = map->nr_bits, first = 0, kept;

  if (dm->owed.nr_set == 0) {
    bitmap_clear_all (map); /* costs no more on a large volume */
    return;
  }
  for (; (first = bitmap_next_set (map, first, nr)) < nr; first = kept) {
    if (bitmap_test (&dm->owed, first))
      kept = first + 1;
    else {
      kept = bitmap_next_set (&dm->owed, first, nr);
      bitmap_clear (map, first, kept - first);
    }
  }
}

void
dirty_map_settle (struct dirty_map *dm, enum dirty_map_index unflushed)
{
  const struct bitmap *map = &dm->map[unflushed];
  uint64_t nr = map->nr_bits, first = 0, end;

  for (; (first = bitmap_next_set (map, first, nr)) < nr; first = end) {
    end = bitmap_next_clear (map, first, nr);
    settle_run (dm, unflushed, first, end);
  }
}

uint64_t
dirty_map_clean (struct dirty_map *dm, uint64_t first, uint64_t count)
{
  uint64_t end = first + count;
  uint64_t total = 0;

  assert (first <= dm->copied.nr_bits && count <= dm->copied.nr_bits - first);
  /* Clear runs that are copied and not late. */
  for (uint64_t region = bitmap_next_set (&dm->copied, first, end);
       region < end; region = bitmap_next_set (&dm->copied, region, end)) {
    uint64_t stop = bitmap_next_clear (&dm->copied, region, end);
    uint64_t late = bitmap_next_set (&dm->map[MAP_LATE], region, stop);

    if (late > region) {
      total += bitmap_clear (&dm->map[MAP_DIRTY], region, late - region);
      if (dm->nr_maps == NR_NODE_MAPS)
        bitmap_clear (&dm->map[MAP_DOUBTS], region, late - region);
      bitmap_clear (&dm->copied, region, late - region);
      bitmap_clear (&dm->lost, region, late - region);
    }
    region = bitmap_next_clear (&dm->map[MAP_LATE], late, stop);
    /* Nothing is lost there any more, but resync copies these regions once
     * more.
     */
    bitmap_clear (&dm->copied, late, region - late);
    bitmap_clear (&dm->lost, late, region - late);
  }
  if (total > 0)
    dm->changed = true;
  return total;
}

void
dirty_map_lost (struct dirty_map *dm)
{
  static const enum dirty_map_index unflushed[]
      = { MAP_UNFLUSHED0, MAP_UNFLUSHED1 };

  for (unsigned i = 0; i < sizeof unflushed / sizeof unflushed[0]; i++) {
    bitmap_merge (&dm->map[MAP_DIRTY], &dm->map[unflushed[i]]);
    bitmap_merge (&dm->lost, &dm->map[unflushed[i]]);
    /* After a kill between the two the bits must be in both maps, never in
     * neither: so the compiler may not reorder the stores.
     */
    atomic_signal_fence (memory_order_seq_cst);
    fault_point ("lost_merged");
    bitmap_clear_all (&dm->map[unflushed[i]]);
  }
  bitmap_clear_all (&dm->copied);
  dm->changed = true;
}
