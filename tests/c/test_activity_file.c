/* SPDX-License-Identifier: BSD-3-Clause */

/* The activity log's file: its life from create to clean stop, what of it is
 * believed, and writes that fail or never end.
 */

#include "base/crc32c.h"
#include "base/fault.h"
#include "base/file.h"
#include "logs/activity.h"
#include "logs/layout.h"
#include "activity_log.h"

#include <endian.h>

static void
test_activity_created_opens_clean_and_empty (void)
{
  struct folder folder = log_make ();
  struct activity act;
  bool clean = false;

  assert (try_open (&folder, &act, &clean) == 0);
  assert (clean && activity_count (&act) == 0);
  assert (file_size (&folder, "activity") == SECTOR (2));
  activity_close (&act);
  activity_close (&act); /* no effect */
  folder_remove (&folder, FILES ("activity"));
}

static void
test_activity_missing_is_enoent (void)
{
  struct folder folder = folder_make ();
  struct activity act;
  bool clean;

  assert (try_open (&folder, &act, &clean) == -ENOENT);
  ASSERT_SAYS ("cannot open activity");
  folder_remove (&folder, NO_FILES);
}

static void
test_activity_finish_leaves_clean_and_empty (void)
{
  struct folder folder = log_make ();
  struct activity act = log_begin (&folder);
  bool clean = false;

  warm (&act, 0, ENTRIES - 1, 10);
  assert (activity_hold (&act, 3, 3) == 0);
  assert (activity_finish (&act) == -EBUSY);
  ASSERT_SAYS ("extent 3 is in use");
  activity_release (&act, 3, 3, 10);
  assert (activity_finish (&act) == 0);
  assert (activity_count (&act) == 0);
  activity_close (&act);
  assert (try_open (&folder, &act, &clean) == 0);
  assert (clean && activity_count (&act) == 0);
  activity_close (&act);
  folder_remove (&folder, FILES ("activity"));
}

static void
test_activity_session_is_this_or_the_next_only (void)
{
  struct folder folder = log_make ();
  struct activity act = log_begin (&folder);
  bool clean;

  assert (activity_begin (&act, SESSION + 1) == 0);
  activity_close (&act);
  act = log_begin (&folder);
  assert (activity_begin (&act, SESSION + 2) == 0);
  activity_close (&act);
  assert (try_open (&folder, &act, &clean) == -EUCLEAN);
  ASSERT_SAYS ("session 7");
  folder_remove (&folder, FILES ("activity"));
}

/* --- What is not believed -------------------------------------------- */

static void
read_sector (const struct folder *folder, uint32_t index,
             struct disk_activity_sector *sector)
{
  int fd = openat (folder->fd, "activity", O_RDONLY | O_CLOEXEC);

  assert (fd >= 0);
  assert (full_pread (fd, sector, sizeof *sector, (uint64_t)SECTOR (index))
          == 0);
  close (fd);
}

/* With a good CRC. */
static void
write_sector (const struct folder *folder, uint32_t index,
              struct disk_activity_sector *sector)
{
  int fd = openat (folder->fd, "activity", O_WRONLY | O_CLOEXEC);

  assert (fd >= 0);
  sector->crc = 0;
  sector->crc = htole32 (crc32c (0, sector, sizeof *sector));
  assert (full_pwrite (fd, sector, sizeof *sector, (uint64_t)SECTOR (index))
          == 0);
  close (fd);
}

static void
assert_refused (const struct folder *folder, const char *words)
{
  struct activity act;
  bool clean;

  assert (try_open (folder, &act, &clean) == -EUCLEAN);
  ASSERT_SAYS (words);
}

/* A file that was written and not closed cleanly, with 0 to 69 in it. */
static struct folder
log_with_extents (void)
{
  struct folder folder = log_make ();
  struct activity act = log_begin (&folder);

  warm (&act, 0, 69, 10);
  activity_close (&act);
  return folder;
}

static void
test_activity_torn_sector_is_refused (void)
{
  struct folder folder = log_with_extents ();

  garble (&folder, "activity", SECTOR (1) + 300);
  assert_refused (&folder, "sector 1: CRC");
  folder_remove (&folder, FILES ("activity"));
}

static void
test_activity_zeroed_sector_is_refused (void)
{
  struct folder folder = log_with_extents ();
  const uint8_t zeroes[LAYOUT_SECTOR] = { 0 };
  int fd = openat (folder.fd, "activity", O_WRONLY | O_CLOEXEC);

  assert (full_pwrite (fd, zeroes, sizeof zeroes, SECTOR (0)) == 0);
  close (fd);
  assert_refused (&folder, "sector 0: CRC");
  folder_remove (&folder, FILES ("activity"));
}

static void
test_activity_sector_in_wrong_place_is_refused (void)
{
  struct folder folder = log_with_extents ();
  struct disk_activity_sector sector;

  read_sector (&folder, 0, &sector);
  write_sector (&folder, 1, &sector);
  assert_refused (&folder, "sector 1: it is another sector");
  folder_remove (&folder, FILES ("activity"));
}

static void
test_activity_impossible_extent_is_refused (void)
{
  struct folder folder = log_with_extents ();
  struct disk_activity_sector good, sector;

  read_sector (&folder, 1, &good);
  sector = good;
  sector.extent[20] = htole64 (NR_EXTENTS + 1);
  write_sector (&folder, 1, &sector);
  assert_refused (&folder, "past the volume's end");
  sector = good;
  sector.extent[20] = sector.extent[0];
  write_sector (&folder, 1, &sector);
  assert_refused (&folder, "stands twice");
  sector = good;
  sector.extent[61] = htole64 (901);
  write_sector (&folder, 1, &sector);
  assert_refused (&folder, "more extents than the log holds");
  sector = good;
  sector.extent[20] = htole64 (NR_EXTENTS);
  write_sector (&folder, 1, &sector);
  assert (loaded (&folder).nr == 71);
  folder_remove (&folder, FILES ("activity"));
}

static void
test_activity_clean_with_extents_is_refused (void)
{
  struct folder folder = log_make ();
  struct disk_activity_sector sector;

  read_sector (&folder, 0, &sector);
  sector.extent[0] = htole64 (1);
  write_sector (&folder, 0, &sector);
  assert_refused (&folder, "closed cleanly");
  folder_remove (&folder, FILES ("activity"));
}

static void
test_activity_of_another_size_is_refused (void)
{
  struct folder folder = log_make ();
  struct activity act;
  bool clean;

  assert (activity_open (&act, folder.fd, uuid, SESSION, ENTRIES - 1,
                         EXTENT_SIZE, NR_EXTENTS, &clean)
          == -EUCLEAN);
  assert (activity_open (&act, folder.fd, uuid, SESSION, ENTRIES,
                         2 * EXTENT_SIZE, NR_EXTENTS, &clean)
          == -EUCLEAN);
  folder_remove (&folder, FILES ("activity"));
}

/* --- Faults ---------------------------------------------------------- */

static void
fail_to_write (void *opaque)
{
  const struct folder *folder = opaque;
  struct activity act = log_begin (folder);
  struct activity_batch batch;

  fault_init ();
  assert (activity_hold (&act, 1, 1) == -EINPROGRESS);
  assert (activity_stage (&act, &batch) == 1);
  assert (activity_write (&act, &batch) == -EIO);
  activity_discard (&batch);
  assert (!activity_durable (&act, 1, 1));
  activity_close (&act);
}

static void
test_activity_failed_write_makes_nothing_active (void)
{
  struct folder folder = log_make ();

  assert (passed (in_child ("activity_write=error", fail_to_write, &folder)));
  assert (loaded (&folder).nr == 0);
  assert (passed (in_child ("activity_sync=error", fail_to_write, &folder)));
  folder_remove (&folder, FILES ("activity"));
}

static void
test_activity_killed_before_write_finds_old_set (void)
{
  struct folder folder = log_make ();

  assert (killed (in_child ("activity_write=kill", fail_to_write, &folder)));
  assert (loaded (&folder).nr == 0);
  assert (killed (in_child ("activity_sync=kill", fail_to_write, &folder)));
  assert (loaded (&folder).nr == 1); /* the page cache has it */
  folder_remove (&folder, FILES ("activity"));
}

int
main (void)
{
  RUN (test_activity_created_opens_clean_and_empty);
  RUN (test_activity_missing_is_enoent);
  RUN (test_activity_finish_leaves_clean_and_empty);
  RUN (test_activity_session_is_this_or_the_next_only);
  RUN (test_activity_torn_sector_is_refused);
  RUN (test_activity_zeroed_sector_is_refused);
  RUN (test_activity_sector_in_wrong_place_is_refused);
  RUN (test_activity_impossible_extent_is_refused);
  RUN (test_activity_clean_with_extents_is_refused);
  RUN (test_activity_of_another_size_is_refused);
  RUN (test_activity_failed_write_makes_nothing_active);
  RUN (test_activity_killed_before_write_finds_old_set);
  return 0;
}
