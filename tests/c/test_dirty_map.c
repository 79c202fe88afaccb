/* SPDX-License-Identifier: BSD-3-Clause */

/* The dirty map: what survives a close, a kill and a clean stop, what is
 * refused and why, and how regions become dirty and clean.
 */

#include "base/fault.h"
#include "logs/bitmap.h"
#include "logs/dirty_map.h"
#include "logs/layout.h"
#include "test.h"

#include <endian.h>
#include <signal.h>

#define NR_REGIONS (BITMAP_PAGE_BITS + 1003) /* two pages a map, not full */
#define MAP_BYTES 8192
#define FILE_BYTES (LAYOUT_PAGE + NR_MAPS * MAP_BYTES)
#define REGION_SIZE 65536
#define SESSION 7

static const uint8_t uuid[16] = "0123456789abcdef";

static struct folder
make (bool all_dirty)
{
  struct folder folder = folder_make ();

  assert (dirty_map_create (folder.fd, "dr", uuid, SESSION, NR_REGIONS,
                            REGION_SIZE, all_dirty)
          == 0);
  return folder;
}

static void
drop (struct folder *folder)
{
  folder_remove (folder, FILES ("dirty.dr"));
}

static int
try_open (struct dirty_map *dm, const struct folder *folder, uint64_t session,
          bool *clean)
{
  return dirty_map_open (dm, folder->fd, "dr", uuid, session, NR_REGIONS,
                         REGION_SIZE, clean);
}

static struct dirty_map
reopen (const struct folder *folder, uint64_t session, bool expect_clean)
{
  struct dirty_map dm;
  bool clean;

  assert (try_open (&dm, folder, session, &clean) == 0);
  assert (expect_clean == clean);
  return dm;
}

/* An opened map as the engine has it: stamped with its session. */
static struct dirty_map
begun (const struct folder *folder)
{
  struct dirty_map dm = reopen (folder, SESSION, true);

  assert (dirty_map_begin (&dm, SESSION) == 0);
  return dm;
}

static void
assert_refused (const struct folder *folder, uint64_t session,
                const char *words)
{
  struct dirty_map dm;
  bool clean;

  assert (try_open (&dm, folder, session, &clean) == -EUCLEAN);
  ASSERT_SAYS (words);
}

static void
test_dirty_map_created_is_clean_and_empty (void)
{
  struct folder folder = make (false);
  struct dirty_map dm = reopen (&folder, SESSION, true);

  assert (file_size (&folder, "dirty.dr") == FILE_BYTES);
  for (int i = 0; i < NR_MAPS; i++) {
    assert (dm.map[i].nr_bits == NR_REGIONS && dm.map[i].nr_set == 0);
    assert ((char *)dm.map[i].words
            == (char *)dm.mapping + LAYOUT_PAGE + i * MAP_BYTES);
  }
  assert (dm.copied.nr_set == 0);
  dirty_map_close (&dm);
  drop (&folder);
}

static void
test_dirty_map_created_all_dirty_sets_every_region (void)
{
  struct folder folder = make (true);
  struct dirty_map dm = reopen (&folder, SESSION, true);

  assert (dm.map[MAP_DIRTY].nr_set == NR_REGIONS);
  assert (dm.map[MAP_UNFLUSHED0].nr_set == 0 && dm.map[MAP_LATE].nr_set == 0);
  dirty_map_close (&dm);
  drop (&folder);
}

/* KiB of shared mappings that are the process's own. */
static long
shared_kib (void)
{
  FILE *file = fopen ("/proc/self/status", "r");
  char line[256];
  long file_kib = 0, shmem_kib = 0;

  assert (file);
  while (fgets (line, sizeof line, file)) {
    (void)sscanf (line, "RssFile: %ld kB", &file_kib);
    (void)sscanf (line, "RssShmem: %ld kB", &shmem_kib);
  }
  fclose (file);
  return file_kib + shmem_kib;
}

/* 16 TiB in 64 KiB regions: 128 MiB of maps. */
#define NR_HUGE (UINT64_C (1) << 28)
/* Of them: huge pages of a few places. */
#define FEW_KIB 16384

static struct folder
make_huge (bool all_dirty)
{
  struct folder folder = folder_make ();

  assert (dirty_map_create (folder.fd, "dr", uuid, SESSION, NR_HUGE,
                            REGION_SIZE, all_dirty)
          == 0);
  return folder;
}

static struct dirty_map
open_huge (const struct folder *folder)
{
  struct dirty_map dm;
  bool clean;

  assert (dirty_map_open (&dm, folder->fd, "dr", uuid, SESSION, NR_HUGE,
                          REGION_SIZE, &clean)
          == 0);
  assert (clean);
  return dm;
}

/* The pages of a map that was full do not stay when it is empty. */
static void
test_dirty_map_emptied_is_let_go (void)
{
  struct folder folder = make_huge (true);
  struct dirty_map dm = open_huge (&folder);
  long full;

  assert (dirty_map_begin (&dm, SESSION) == 0);
  bitmap_set (&dm.copied, 0, dm.copied.nr_bits);
  assert (dirty_map_clean (&dm, 0, NR_HUGE - 1) == NR_HUGE - 1);
  assert (dirty_map_persist (&dm) == 0);
  full = shared_kib ();
  assert (dirty_map_clean (&dm, NR_HUGE - 1, 1) == 1);
  assert (dirty_map_persist (&dm) == 0);
  assert (full - shared_kib () > FEW_KIB);
  assert (dirty_map_finish (&dm) == 0);
  dirty_map_close (&dm);
  dm = open_huge (&folder);
  assert (dm.map[MAP_DIRTY].nr_set == 0);
  dirty_map_close (&dm);
  drop (&folder);
}

/* In sync few pages of the maps are ever looked at. */
static void
test_dirty_map_in_sync_takes_no_memory (void)
{
  struct folder folder = make_huge (false);
  long before = shared_kib ();
  struct dirty_map dm = open_huge (&folder);

  assert (dirty_map_begin (&dm, SESSION) == 0);
  dirty_map_mark (&dm, NR_HUGE - 1, 1, true);
  assert (dirty_map_finish (&dm) == 0);
  assert (shared_kib () - before < FEW_KIB);
  assert (dm.map[MAP_DIRTY].nr_set == 1 && dm.map[MAP_LATE].nr_set == 1);
  dirty_map_close (&dm);
  drop (&folder);
}

/* Around the sizes of a byte, a page and the buffer it is filled from. */
static void
test_dirty_map_created_all_dirty_of_any_size_is_whole (void)
{
  static const uint64_t sizes[]
      = { 1, 7, 8, 9, 32767, 32768, 32769, 524287, 524288, 524289, 1100001 };

  for (unsigned i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
    struct folder folder = folder_make ();
    struct dirty_map dm;
    bool clean;

    assert (dirty_map_create (folder.fd, "dr", uuid, 1, sizes[i], 4096, true)
            == 0);
    assert (
        dirty_map_open (&dm, folder.fd, "dr", uuid, 1, sizes[i], 4096, &clean)
        == 0);
    assert (clean && dm.map[MAP_DIRTY].nr_set == sizes[i]);
    dirty_map_close (&dm);
    drop (&folder);
  }
}

static void
test_dirty_map_bad_remote_name_is_refused (void)
{
  struct folder folder = folder_make ();
  char longest[65];

  memset (longest, 'n', sizeof longest - 1);
  longest[64] = '\0';
  assert (dirty_map_create (folder.fd, "", uuid, 1, 9, 4096, 0) == -EINVAL);
  assert (dirty_map_create (folder.fd, "../x", uuid, 1, 9, 4096, 0) == -EINVAL);
  assert (dirty_map_create (folder.fd, longest, uuid, 1, 9, 4096, 0)
          == -EINVAL);
  longest[63] = '\0';
  assert (dirty_map_create (folder.fd, longest, uuid, 1, 9, 4096, 0) == 0);
  char file[80];
  snprintf (file, sizeof file, "dirty.%s", longest);
  folder_remove (&folder, FILES (file));
}

static void
test_dirty_map_missing_is_enoent (void)
{
  struct folder folder = folder_make ();
  struct dirty_map dm;
  bool clean;

  assert (try_open (&dm, &folder, SESSION, &clean) == -ENOENT);
  ASSERT_SAYS ("dirty.dr");
  folder_remove (&folder, NO_FILES);
}

static void
test_dirty_map_of_another_session_is_refused (void)
{
  struct folder folder = make (false);
  struct dirty_map dm = reopen (&folder, SESSION - 1, true);

  dirty_map_close (&dm);
  assert_refused (&folder, SESSION + 1,
                  "dirty.dr is of session 7, the volume is at 8: an old copy "
                  "of it was put back");
  assert_refused (&folder, SESSION - 2, "an old copy of the superblock");
  drop (&folder);
}

static void
test_dirty_map_of_another_volume_or_size_is_refused (void)
{
  struct folder folder = make (false);
  struct dirty_map dm;
  bool clean;

  assert (dirty_map_open (&dm, folder.fd, "dr",
                          (const uint8_t *)"another volume!!", SESSION,
                          NR_REGIONS, REGION_SIZE, &clean)
          == -EUCLEAN);
  ASSERT_SAYS ("dirty.dr belongs to another volume");
  assert (dirty_map_open (&dm, folder.fd, "dr", uuid, SESSION, NR_REGIONS + 1,
                          REGION_SIZE, &clean)
          == -EUCLEAN);
  ASSERT_SAYS ("dirty.dr is of another size");
  assert (dirty_map_open (&dm, folder.fd, "dr", uuid, SESSION, NR_REGIONS,
                          REGION_SIZE / 2, &clean)
          == -EUCLEAN);
  drop (&folder);
}

static void
test_dirty_map_truncated_is_refused_longer_is_not (void)
{
  struct folder folder = make (true);
  int fd = openat (folder.fd, "dirty.dr", O_RDWR | O_CLOEXEC);

  assert (ftruncate (fd, FILE_BYTES + 1) == 0);
  struct dirty_map dm = reopen (&folder, SESSION, true);
  dirty_map_close (&dm);
  assert (ftruncate (fd, FILE_BYTES - 1) == 0);
  assert_refused (&folder, SESSION, "truncated: 36863 of 36864 bytes");
  assert (ftruncate (fd, 0) == 0);
  assert_refused (&folder, SESSION, "truncated: 0 of 36864 bytes");
  close (fd);
  drop (&folder);
}

static void
test_dirty_map_clean_but_garbled_is_refused (void)
{
  static const off_t places[]
      = { LAYOUT_PAGE, LAYOUT_PAGE + MAP_BYTES - 1, FILE_BYTES - 1 };
  struct folder folder = make (true);
  struct dirty_map dm;

  for (unsigned i = 0; i < sizeof places / sizeof places[0]; i++) {
    garble (&folder, "dirty.dr", places[i]);
    /* Look twice, because the first look must not repair it. */
    assert_refused (&folder, SESSION, "dirty.dr is garbled (CRC of the maps)");
    assert_refused (&folder, SESSION, "dirty.dr is garbled (CRC of the maps)");
    garble (&folder, "dirty.dr", places[i]);
  }
  dm = reopen (&folder, SESSION, true);
  dirty_map_close (&dm);
  garble (&folder, "dirty.dr", 200);
  assert_refused (&folder, SESSION, "dirty.dr is garbled (CRC)");
  drop (&folder);
}

/* After a crash nothing vouches for the bits: set ones are dirty regions, and
 * those that stand for none are cleared.
 */
static void
test_dirty_map_not_clean_with_padding_set_is_cleared (void)
{
  struct folder folder = make (false);
  struct dirty_map dm = begun (&folder);

  dirty_map_close (&dm);
  garble (&folder, "dirty.dr", LAYOUT_PAGE + 3);
  garble (&folder, "dirty.dr", LAYOUT_PAGE + MAP_BYTES - 1);
  dm = reopen (&folder, SESSION, false);
  assert (dm.map[MAP_DIRTY].nr_set == 8);
  assert (bitmap_next_set (&dm.map[MAP_DIRTY], 0, NR_REGIONS) == 24);
  assert (((uint8_t *)dm.map[MAP_DIRTY].words)[MAP_BYTES - 1] == 0);
  dirty_map_close (&dm);
  drop (&folder);
}

static void
test_dirty_map_begun_is_not_clean_and_stamped (void)
{
  struct folder folder = make (true);
  struct dirty_map dm = reopen (&folder, SESSION, true);

  assert (dirty_map_begin (&dm, SESSION + 1) == 0);
  dirty_map_close (&dm);
  /* The superblock may still be at the session before. */
  dm = reopen (&folder, SESSION, false);
  dirty_map_close (&dm);
  dm = reopen (&folder, SESSION + 1, false);
  assert (le64toh (dm.header.session) == SESSION + 1);
  assert (dm.map[MAP_DIRTY].nr_set == NR_REGIONS);
  dirty_map_close (&dm);
  drop (&folder);
}

static void
test_dirty_map_finished_is_clean_with_its_bits (void)
{
  struct folder folder = make (false);
  struct dirty_map dm = begun (&folder);

  dirty_map_mark (&dm, 100, 7, false);
  dirty_map_mark (&dm, NR_REGIONS - 1, 1, true);
  bitmap_set (&dm.map[MAP_UNFLUSHED1], 5, 2);
  assert (dirty_map_finish (&dm) == 0);
  assert (!dm.changed);
  dirty_map_close (&dm);
  dm = reopen (&folder, SESSION, true);
  assert (dm.map[MAP_DIRTY].nr_set == 8 && dm.map[MAP_LATE].nr_set == 1);
  assert (dm.map[MAP_UNFLUSHED1].nr_set == 2);
  assert (bitmap_test (&dm.map[MAP_DIRTY], NR_REGIONS - 1));
  dirty_map_close (&dm);
  drop (&folder);
}

static void
mark_and_die (void *opaque)
{
  struct dirty_map dm = begun (opaque);

  dirty_map_mark (&dm, 4000, 3, true);
  bitmap_set (&dm.map[MAP_UNFLUSHED0], 9, 1);
  kill (getpid (), SIGKILL);
}

static void
test_dirty_map_of_killed_process_has_its_bits (void)
{
  struct folder folder = make (false);

  assert (killed (in_child (NULL, mark_and_die, &folder)));
  struct dirty_map dm = reopen (&folder, SESSION, false);
  assert (dm.map[MAP_DIRTY].nr_set == 3 && dm.map[MAP_LATE].nr_set == 3);
  assert (bitmap_test (&dm.map[MAP_UNFLUSHED0], 9));
  dirty_map_close (&dm);
  drop (&folder);
}

static void
test_dirty_map_persist_only_when_changed (void)
{
  struct folder folder = make (false);
  struct dirty_map dm = begun (&folder);

  assert (!dm.changed && dirty_map_persist (&dm) == 0);
  dirty_map_mark (&dm, 1, 1, false);
  assert (dm.changed && dirty_map_persist (&dm) == 0 && !dm.changed);
  dirty_map_close (&dm);
  drop (&folder);
}

static void
persist_with_fault (void *opaque)
{
  struct dirty_map dm = begun (opaque);

  fault_init ();
  assert (dirty_map_persist (&dm) == 0); /* unchanged: no msync, no fault */
  dirty_map_mark (&dm, 1, 1, false);
  assert (dirty_map_persist (&dm) == -EIO);
  ASSERT_SAYS ("cannot make dirty.dr durable");
  assert (dm.changed);
  assert (dirty_map_finish (&dm) == -EIO);
  dirty_map_close (&dm);
}

static void
test_dirty_map_failed_msync_is_an_error_and_not_clean (void)
{
  struct folder folder = make (false);

  assert (
      passed (in_child ("dirty_map_sync=error", persist_with_fault, &folder)));
  struct dirty_map dm = reopen (&folder, SESSION, false);
  assert (dm.map[MAP_DIRTY].nr_set == 1);
  dirty_map_close (&dm);
  drop (&folder);
}

static void
finish_only (void *opaque)
{
  struct dirty_map dm = begun (opaque);

  fault_init ();
  dirty_map_finish (&dm);
}

static void
test_dirty_map_killed_in_finish_is_not_clean (void)
{
  struct folder folder = make (false);

  assert (killed (in_child ("dirty_map_sync=kill", finish_only, &folder)));
  struct dirty_map dm = reopen (&folder, SESSION, false);
  dirty_map_close (&dm);
  drop (&folder);
}

static void
test_dirty_map_mark_forgets_the_copy (void)
{
  struct folder folder = make (false);
  struct dirty_map dm = begun (&folder);

  dirty_map_mark (&dm, 10, 10, false);
  assert (dm.map[MAP_LATE].nr_set == 0);
  bitmap_set (&dm.copied, 10, 10);
  dirty_map_mark (&dm, 12, 2, true);
  assert (dm.map[MAP_DIRTY].nr_set == 10 && dm.map[MAP_LATE].nr_set == 2);
  assert (dm.copied.nr_set == 8 && !bitmap_test (&dm.copied, 13));
  dirty_map_close (&dm);
  drop (&folder);
}

/* Regions 10 to 29 dirty; 12 to 25 copied; 15, 20 and 25 late; 10 to 20 lost.
 * A late one stays dirty, but what it had lost is there again.
 */
static void
test_dirty_map_clean_takes_copied_not_late (void)
{
  struct folder folder = make (false);
  struct dirty_map dm = begun (&folder);

  dirty_map_mark (&dm, 10, 20, false);
  bitmap_set (&dm.copied, 12, 14);
  for (uint64_t region = 15; region <= 25; region += 5)
    bitmap_set (&dm.map[MAP_LATE], region, 1);
  dirty_map_mark_lost (&dm, 5, 16);
  assert (dm.lost.nr_set == 11);
  assert (dirty_map_persist (&dm) == 0);

  assert (dirty_map_clean (&dm, 0, 14) == 2);
  assert (dm.changed);
  assert (dirty_map_clean (&dm, 0, NR_REGIONS) == 9);
  for (uint64_t region = 0; region < 40; region++) {
    bool late = region == 15 || region == 20 || region == 25;
    bool dirty = late || (region >= 10 && region < 12)
                 || (region >= 26 && region < 30);

    assert (dirty == bitmap_test (&dm.map[MAP_DIRTY], region));
    assert (!bitmap_test (&dm.copied, region));
    assert ((region == 10 || region == 11) == bitmap_test (&dm.lost, region));
    assert (late == bitmap_test (&dm.map[MAP_LATE], region));
  }
  assert (dirty_map_persist (&dm) == 0);
  assert (dirty_map_clean (&dm, 0, NR_REGIONS) == 0 && !dm.changed);
  dirty_map_close (&dm);
  drop (&folder);
}

static void
test_dirty_map_lost_makes_unflushed_dirty (void)
{
  struct folder folder = make (false);
  struct dirty_map dm = begun (&folder);

  dirty_map_mark (&dm, 0, 3, false);
  bitmap_set (&dm.copied, 0, 3);
  bitmap_set (&dm.map[MAP_UNFLUSHED0], 2, 5);
  bitmap_set (&dm.map[MAP_UNFLUSHED1], NR_REGIONS - 4, 4);
  assert (dirty_map_persist (&dm) == 0);
  dirty_map_lost (&dm);
  assert (dm.map[MAP_DIRTY].nr_set == 11 && dm.copied.nr_set == 0);
  assert (dm.map[MAP_UNFLUSHED0].nr_set == 0);
  assert (dm.map[MAP_UNFLUSHED1].nr_set == 0);
  assert (dm.map[MAP_LATE].nr_set == 0 && dm.changed);
  assert (dirty_map_clean (&dm, 0, NR_REGIONS) == 0);
  dirty_map_close (&dm);
  drop (&folder);
}

/* Closing what was never opened, or twice, closes no other file's descriptor.
 */
static void
test_dirty_map_close_of_unopened_does_nothing (void)
{
  struct folder folder = make (false);
  struct dirty_map dm = { 0 };
  struct stat st;

  dirty_map_close (&dm);
  assert (fstat (0, &st) == 0);
  dm = reopen (&folder, SESSION, true);
  dirty_map_close (&dm);
  dirty_map_close (&dm);
  drop (&folder);
}

int
main (void)
{
  RUN (test_dirty_map_created_is_clean_and_empty);
  RUN (test_dirty_map_created_all_dirty_sets_every_region);
  RUN (test_dirty_map_in_sync_takes_no_memory);
  RUN (test_dirty_map_emptied_is_let_go);
  RUN (test_dirty_map_created_all_dirty_of_any_size_is_whole);
  RUN (test_dirty_map_bad_remote_name_is_refused);
  RUN (test_dirty_map_missing_is_enoent);
  RUN (test_dirty_map_of_another_session_is_refused);
  RUN (test_dirty_map_of_another_volume_or_size_is_refused);
  RUN (test_dirty_map_truncated_is_refused_longer_is_not);
  RUN (test_dirty_map_clean_but_garbled_is_refused);
  RUN (test_dirty_map_not_clean_with_padding_set_is_cleared);
  RUN (test_dirty_map_begun_is_not_clean_and_stamped);
  RUN (test_dirty_map_finished_is_clean_with_its_bits);
  RUN (test_dirty_map_of_killed_process_has_its_bits);
  RUN (test_dirty_map_persist_only_when_changed);
  RUN (test_dirty_map_failed_msync_is_an_error_and_not_clean);
  RUN (test_dirty_map_killed_in_finish_is_not_clean);
  RUN (test_dirty_map_mark_forgets_the_copy);
  RUN (test_dirty_map_clean_takes_copied_not_late);
  RUN (test_dirty_map_lost_makes_unflushed_dirty);
  RUN (test_dirty_map_close_of_unopened_does_nothing);
  return 0;
}
