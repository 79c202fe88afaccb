/* SPDX-License-Identifier: BSD-3-Clause */

/* The activity log: holds and their durability, writes that overlap with
 * newcomers, going cold and coming back, and what of the file is believed.
 */

#include "test.h"

#include <endian.h>

#define ENTRIES 100u /* two sectors, the second not full */
#define EXTENT_SIZE 4096u
#define NR_EXTENTS 1000u
#define SESSION 5
#define SECTOR(index) (LAYOUT_PAGE + (index) * (off_t)LAYOUT_SECTOR)

static const uint8_t uuid[16] = "0123456789abcde";

static struct folder
log_make (void)
{
  struct folder folder = folder_make ();

  assert (activity_create (folder.fd, uuid, SESSION, ENTRIES, EXTENT_SIZE)
          == 0);
  return folder;
}

static int
try_open (const struct folder *folder, struct activity *act, bool *clean)
{
  return activity_open (act, folder->fd, uuid, SESSION, ENTRIES, EXTENT_SIZE,
                        NR_EXTENTS, clean);
}

static struct activity
log_begin (const struct folder *folder)
{
  struct activity act;
  bool clean;

  assert (try_open (folder, &act, &clean) == 0);
  assert (activity_begin (&act, SESSION) == 0);
  return act;
}

static void
write_changes (struct activity *act)
{
  struct activity_batch batch;

  assert (activity_stage (act, &batch) == 1);
  assert (activity_write (act, &batch) == 0);
  activity_written (act, &batch);
  assert (batch.sectors == NULL);
}

/* Active, without users, last used at `now_ns`. */
static void
warm (struct activity *act, uint64_t first, uint64_t last, uint64_t now_ns)
{
  if (activity_hold (act, first, last) == -EINPROGRESS)
    write_changes (act);
  assert (activity_durable (act, first, last));
  activity_release (act, first, last, now_ns);
}

struct seen {
  unsigned nr;
  uint64_t extent[ENTRIES];
};

static void
note (void *opaque, uint64_t extent)
{
  struct seen *seen = opaque;

  assert (seen->nr < ENTRIES);
  seen->extent[seen->nr++] = extent;
}

/* What a start after lost power finds in the file. */
static struct seen
loaded (const struct folder *folder)
{
  struct seen seen = { 0 };
  struct activity act;
  bool clean;

  assert (try_open (folder, &act, &clean) == 0);
  assert (!clean);
  activity_visit (&act, note, &seen);
  activity_close (&act);
  return seen;
}

static bool
has (const struct seen *seen, uint64_t extent)
{
  for (unsigned i = 0; i < seen->nr; i++)
    if (seen->extent[i] == extent)
      return true;
  return false;
}

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
test_activity_new_extent_waits_for_its_write (void)
{
  struct folder folder = log_make ();
  struct activity act = log_begin (&folder);
  struct seen seen;

  assert (activity_hold (&act, 7, 8) == -EINPROGRESS);
  assert (!activity_durable (&act, 7, 8));
  assert (loaded (&folder).nr == 0);
  write_changes (&act);
  assert (activity_durable (&act, 7, 8) && act.persists == 1);
  seen = loaded (&folder);
  assert (seen.nr == 2 && has (&seen, 7) && has (&seen, 8));
  assert (activity_hold (&act, 7, 8) == 0);
  activity_close (&act);
  folder_remove (&folder, FILES ("activity"));
}

static void
test_activity_nothing_changed_stages_nothing (void)
{
  struct folder folder = log_make ();
  struct activity act = log_begin (&folder);
  struct activity_batch batch;

  assert (activity_stage (&act, &batch) == 0);
  warm (&act, 1, 1, 10);
  assert (activity_stage (&act, &batch) == 0);
  activity_close (&act);
  folder_remove (&folder, FILES ("activity"));
}

/* The place is in the very sector that is being written. */
static void
test_activity_put_in_while_writing_waits_for_next_write (void)
{
  struct folder folder = log_make ();
  struct activity act = log_begin (&folder);
  struct activity_batch batch;
  struct seen seen;

  assert (activity_hold (&act, 1, 1) == -EINPROGRESS);
  assert (activity_stage (&act, &batch) == 1 && batch.count == 1);
  assert (activity_hold (&act, 2, 2) == -EINPROGRESS);
  assert (activity_hold (&act, 1, 1) == -EINPROGRESS);
  assert (activity_write (&act, &batch) == 0);
  seen = loaded (&folder);
  assert (has (&seen, 1) && !has (&seen, 2));
  activity_written (&act, &batch);
  assert (activity_durable (&act, 1, 1) && !activity_durable (&act, 2, 2));
  write_changes (&act);
  assert (activity_durable (&act, 1, 2));
  activity_close (&act);
  folder_remove (&folder, FILES ("activity"));
}

static void
test_activity_no_room_holds_nothing (void)
{
  struct folder folder = log_make ();
  struct activity act = log_begin (&folder);

  warm (&act, 0, ENTRIES - 2, 10);
  assert (activity_hold (&act, ENTRIES - 2, ENTRIES) == -EAGAIN);
  assert (activity_count (&act) == ENTRIES - 1);
  assert (activity_pick (&act, ENTRIES, 11) == ENTRIES - 1); /* no users */
  assert (activity_hold (&act, ENTRIES - 2, ENTRIES - 1) == -EINPROGRESS);
  assert (activity_hold (&act, 0, ENTRIES) == -EINVAL);
  ASSERT_SAYS ("101 activity extents");
  activity_close (&act);
  folder_remove (&folder, FILES ("activity"));
}

static void
test_activity_pick_takes_longest_unused_first (void)
{
  struct folder folder = log_make ();
  struct activity act = log_begin (&folder);
  uint64_t extents[ENTRIES];

  warm (&act, 1, 1, 10);
  warm (&act, 2, 2, 20);
  warm (&act, 3, 3, 30);
  warm (&act, 1, 1, 40);
  assert (activity_list (&act, extents, ENTRIES) == 3);
  assert (extents[0] == 1 && extents[1] == 3 && extents[2] == 2);
  assert (activity_list (&act, extents, 2) == 2);
  assert (activity_pick (&act, 1, UINT64_MAX) == 1);
  assert (activity_drop (&act) == 1);
  assert (!activity_durable (&act, 2, 2) && activity_durable (&act, 3, 3));
  assert (activity_pick (&act, 10, 40) == 1); /* not the one used at 40 */
  assert (activity_drop (&act) == 1 && activity_count (&act) == 1);
  activity_close (&act);
  folder_remove (&folder, FILES ("activity"));
}

static void
test_activity_user_calls_off_cooling (void)
{
  struct folder folder = log_make ();
  struct activity act = log_begin (&folder);

  warm (&act, 1, 3, 10);
  assert (activity_hold (&act, 1, 1) == 0);
  assert (activity_pick (&act, 10, UINT64_MAX) == 2);
  assert (activity_hold (&act, 2, 2) == 0);
  activity_release (&act, 2, 2, 11); /* a write came and went */
  assert (activity_drop (&act) == 1);
  assert (activity_durable (&act, 1, 2) && !activity_durable (&act, 3, 3));
  activity_close (&act);
  folder_remove (&folder, FILES ("activity"));
}

static void
test_activity_pick_forgets_the_one_before (void)
{
  struct folder folder = log_make ();
  struct activity act = log_begin (&folder);

  warm (&act, 1, 1, 10);
  warm (&act, 2, 2, 20);
  assert (activity_pick (&act, 10, UINT64_MAX) == 2); /* its flush failed */
  assert (activity_pick (&act, 10, 15) == 1);
  assert (activity_drop (&act) == 1);
  assert (activity_durable (&act, 2, 2));
  activity_close (&act);
  folder_remove (&folder, FILES ("activity"));
}

/* It never left the disk, so it needs no write, and lost power finds it. */
static void
test_activity_cold_extent_comes_back_durable (void)
{
  struct folder folder = log_make ();
  struct activity act = log_begin (&folder);
  struct seen seen;

  warm (&act, 1, 2, 10);
  assert (activity_pick (&act, 10, UINT64_MAX) == 2);
  assert (activity_drop (&act) == 2 && activity_count (&act) == 0);
  seen = loaded (&folder);
  assert (has (&seen, 1) && has (&seen, 2));
  assert (activity_hold (&act, 2, 2) == 0);
  assert (activity_count (&act) == 1 && act.persists == 1);
  activity_close (&act);
  folder_remove (&folder, FILES ("activity"));
}

static void
test_activity_place_taken_removes_cold_extent (void)
{
  struct folder folder = log_make ();
  struct activity act = log_begin (&folder);
  struct seen seen;

  warm (&act, 0, ENTRIES - 1, 10);
  assert (activity_pick (&act, 1, UINT64_MAX) == 1);
  assert (activity_drop (&act) == 1);
  assert (activity_hold (&act, 500, 500) == -EINPROGRESS);
  write_changes (&act);
  seen = loaded (&folder);
  assert (seen.nr == ENTRIES && has (&seen, 500) && !has (&seen, 0));
  assert (!activity_durable (&act, 0, 0));
  assert (activity_hold (&act, 0, 0) == -EAGAIN);
  assert (activity_pick (&act, 1, UINT64_MAX) == 1); /* 1 */
  assert (activity_drop (&act) == 1);
  assert (activity_hold (&act, 0, 0) == -EINPROGRESS);
  assert (activity_hold (&act, 0, 0) == -EINPROGRESS);
  activity_close (&act);
  folder_remove (&folder, FILES ("activity"));
}

/* A range of which one is cold and one is new: the new one must not take the
 * place of the cold one.
 */
static void
test_activity_range_keeps_its_own_cold_extent (void)
{
  struct folder folder = log_make ();
  struct activity act = log_begin (&folder);

  warm (&act, 10, 9 + ENTRIES, 10);
  assert (activity_pick (&act, 2, UINT64_MAX) == 2);
  assert (activity_drop (&act) == 2);
  assert (activity_hold (&act, 9, 10) == -EINPROGRESS);
  assert (activity_durable (&act, 10, 10) && !activity_durable (&act, 9, 9));
  activity_close (&act);
  folder_remove (&folder, FILES ("activity"));
}

/* Places in both sectors change hands before either is written: extent 0
 * loses its place in sector 0 and gets one in sector 1.
 */
static struct activity_batch
stage_a_move (struct activity *act)
{
  struct activity_batch batch;

  warm (act, 0, ENTRIES - 1, 10);
  warm (act, 99, 99, 20);
  warm (act, 0, 0, 5);
  assert (activity_pick (act, 1, 6) == 1); /* 0, in sector 0 */
  assert (activity_drop (act) == 1);
  for (unsigned i = 1; i < 99; i++)
    assert (activity_hold (act, i, i) == 0);
  assert (activity_pick (act, 1, UINT64_MAX) == 1); /* 99, in sector 1 */
  assert (activity_drop (act) == 1);
  assert (activity_hold (act, 500, 500) == -EINPROGRESS);
  assert (activity_hold (act, 0, 0) == -EINPROGRESS);
  assert (activity_stage (act, &batch) == 1);
  assert (batch.count == 2 && batch.index[1] == 1);
  return batch;
}

static void
test_activity_power_lost_between_sectors_is_no_damage (void)
{
  struct folder folder = log_make ();
  struct activity act = log_begin (&folder);
  struct activity_batch batch = stage_a_move (&act);
  struct activity_batch half = { &batch.sectors[1], &batch.index[1], 1 };
  struct seen seen;

  assert (activity_write (&act, &half) == 0);
  activity_discard (&batch);
  activity_close (&act);
  seen = loaded (&folder); /* 0 stands in both sectors */
  assert (seen.nr == ENTRIES - 1);
  for (unsigned i = 0; i < 99; i++)
    assert (has (&seen, i));

  act = log_begin (&folder); /* tidies */
  assert (activity_stage (&act, &batch) == 0);
  assert (activity_count (&act) == ENTRIES - 1);
  warm (&act, 600, 600, 10);
  activity_close (&act);
  seen = loaded (&folder);
  assert (seen.nr == ENTRIES && has (&seen, 600));
  folder_remove (&folder, FILES ("activity"));
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

static void
run_set_tests (void)
{
  RUN (test_activity_created_opens_clean_and_empty);
  RUN (test_activity_missing_is_enoent);
  RUN (test_activity_new_extent_waits_for_its_write);
  RUN (test_activity_nothing_changed_stages_nothing);
  RUN (test_activity_put_in_while_writing_waits_for_next_write);
  RUN (test_activity_no_room_holds_nothing);
  RUN (test_activity_pick_takes_longest_unused_first);
  RUN (test_activity_user_calls_off_cooling);
  RUN (test_activity_pick_forgets_the_one_before);
  RUN (test_activity_cold_extent_comes_back_durable);
  RUN (test_activity_place_taken_removes_cold_extent);
  RUN (test_activity_range_keeps_its_own_cold_extent);
  RUN (test_activity_power_lost_between_sectors_is_no_damage);
}

int
main (void)
{
  run_set_tests ();
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
