/* SPDX-License-Identifier: BSD-3-Clause */

/* Remotes leave the configuration, come back, or are new, and so are their
 * names.
 *
 * A remote may not be left out if it may be the only one that has some region;
 * one that was left out counts as empty when it is back.
 */

#include "api.h"
#include "base/file.h"
#include "logs/layout.h"
#include "interrupted.h"

#include <endian.h>

static struct bench bench;
static struct left created;

/* --- left out while local is not ok -------------------------------------- */

static void
local_fails (void *opaque)
{
  (void)opaque;
  assert (bench_open (&bench) == 0);
  bench_connect_all (&bench);
  bench_write (&bench, 7, 1, 1);
  bench_stop (&bench);
}

static void
local_fails_and_resyncs (void *opaque)
{
  (void)opaque;
  assert (bench_open (&bench) == 0);
  bench_connect_all (&bench);
  bench_write (&bench, 7, 1, 1);
  assert (nbdm_local_attach (bench.volume, bench.local, 0) == 0);
  assert (nbdm_disk_admit (bench.volume, NBDM_LOCAL) == 0);
  bench_stop (&bench);
}

static void
is_refused (void *opaque)
{
  (void)opaque;
  assert (bench_open (&bench) == -EINVAL);
  ASSERT_SAYS ("the local disk is not ok");
  ASSERT_SAYS ("remote \"b\"");
  ASSERT_SAYS ("put it back");
}

static void
mends (void *opaque)
{
  (void)opaque;
  bench_open_and_mend (&bench);
}

static void
test_left_out_while_local_is_not_ok_is_refused (void)
{
  void (*const lives[]) (void *) = { local_fails, local_fails_and_resyncs };

  for (unsigned i = 0; i < 2; i++)
    for (unsigned renamed = 0; renamed < 2; renamed++) {
      struct nbdm_params kept = bench.params;
      struct left before, after;

      bench_put (&bench, &created);
      bench_session ("local_write:1=error", lives[i]);
      bench_take (&bench, &before);
      if (renamed)
        bench.params.remotes[1].name = "c";
      else
        bench.params.nr_remotes = 1;
      bench_session (NULL, is_refused);
      bench_session (NULL, is_refused);
      bench_take (&bench, &after); /* not a file was made or changed */
      assert (after.nr_files == before.nr_files);
      bench_free (&before);
      bench_free (&after);
      bench.params = kept;
      bench_session (NULL, mends);
      bench_check_disks (&bench);
    }
}

/* --- left out while local is ok ------------------------------------------- */

static void
writes (void *opaque)
{
  (void)opaque;
  assert (bench_open (&bench) == 0);
  bench_connect_all (&bench);
  bench_write (&bench, 3, 4, 2);
  assert (nbdm_flush (bench.volume) == 0);
  bench_stop (&bench);
}

static void
writes_alone (void *opaque)
{
  (void)opaque;
  assert (bench_open (&bench) == 0);
  bench_connect_all (&bench);
  bench_write (&bench, 4, 2, 3);
  bench_stop (&bench);
}

static void
may_write_alone (void *opaque)
{
  (void)opaque;
  if (bench_open (&bench) < 0)
    return;
  bench_connect_all (&bench);
  bench_write (&bench, 4, 2, 3);
}

/* The remote comes back: whatever its old map says, all of it is dirty and
 * late.
 */
static void
is_all_dirty (void *opaque)
{
  struct nbdm_disk_status status;

  (void)opaque;
  assert (bench_open (&bench) == 0);
  assert (nbdm_get_disk_status (bench.volume, 2, &status) == 0);
  assert (status.state == NBDM_OUT_OF_SYNC && !status.remote.paused);
  assert (status.dirty_regions == BENCH_REGIONS);
  assert (status.remote.late_regions == BENCH_REGIONS);
  assert (bench.board->found.dirty[0] == 0);
  bench_connect_all (&bench);
  bench_mend (&bench);
}

static void
is_paused (void *opaque)
{
  (void)opaque;
  assert (bench_open (&bench) == 0);
  assert (nbdm_remote_pause (bench.volume, 2, 1) == 0);
  bench_stop (&bench);
}

static void
test_left_out_while_local_is_ok_begins_anew (void)
{
  struct nbdm_params kept = bench.params;
  struct left stale;

  for (unsigned put_back = 0; put_back < 2; put_back++) {
    bench_put (&bench, &created);
    bench_session (NULL, writes);
    bench_session (NULL, is_paused);
    bench_take (&bench, &stale);
    bench.params.nr_remotes = 1;
    bench_session (NULL, writes_alone);
    assert (faccessat (bench.dirfd, "dirty.b", F_OK, 0) < 0);
    bench.params = kept;
    /* Its map of the earlier life as a leftover: a crash, or a backup. */
    for (unsigned i = 0; put_back && i < stale.nr_files; i++)
      if (strcmp (stale.file[i].name, "dirty.b") == 0) {
        int fd = openat (bench.dirfd, "dirty.b", O_RDWR | O_CREAT, 0600);

        assert (fd >= 0
                && full_pwrite (fd, stale.file[i].bytes, stale.file[i].size, 0)
                       == 0);
        close (fd);
      }
    bench_free (&stale);
    bench_session (NULL, is_all_dirty);
    bench_check_disks (&bench);
  }
}

/* The start that leaves the remote out ends early, at each step: the next start
 * either finds the remote as it was, or begins with a new one.
 */
static void
test_left_out_by_a_start_that_does_not_end (void)
{
  static const char *const faults[]
      = { "open_recovered=kill",   "begin_set=kill",
          "begin_maps=kill",       "superblock_write=error",
          "superblock_sync=error", "superblock_synced=kill",
          "begin_superblock=kill", "open_begun=kill" };
  struct nbdm_params kept = bench.params;

  for (unsigned i = 0; i < sizeof faults / sizeof faults[0]; i++) {
    bench_put (&bench, &created);
    bench_session (NULL, writes);
    bench.params.nr_remotes = 1;
    (void)in_child (faults[i], may_write_alone, NULL);
    bench.params = kept;
    bench_session (NULL, mends);
    bench_check_disks (&bench);
  }
}

/* --- names ------------------------------------------------------------------
 */

static void
creates_named (void *opaque)
{
  (void)opaque;
  assert (nbdm_create (&bench.params, 1) == 0);
}

/* The first one's map was lost; the start ends early, or goes through. */
static void
second_is_clean (void *opaque)
{
  (void)opaque;
  assert (bench_open (&bench) == 0);
  assert (bench.board->found.dirty[0] == BENCH_REGIONS);
  assert (bench.board->found.dirty[1] == 0);
}

static void
both_are_clean (void *opaque)
{
  (void)opaque;
  assert (bench_open (&bench) == 0);
  assert (bench.board->found.dirty[0] == 0);
  assert (bench.board->found.dirty[1] == 0);
  bench_stop (&bench);
}

/* A remote's name may look like the end of a leftover's: no file of one remote
 * is ever made, or set aside, over another's map.
 */
static void
test_names_that_look_like_leftovers (void)
{
  static const char *const pairs[][2]
      = { { "a", "a.new" }, { "a", "a.bad" }, { "a.new", "a" } };
  struct nbdm_params kept = bench.params;
  struct folder folder = { .fd = bench.dirfd };
  char first[80];

  for (unsigned i = 0; i < sizeof pairs / sizeof pairs[0]; i++) {
    bench_put (&bench, &created);
    for (unsigned k = 0; k < 2; k++)
      bench.params.remotes[k].name = pairs[i][k];
    bench_session (NULL, creates_named);
    bench_session (NULL, both_are_clean);
    snprintf (first, sizeof first, "dirty.%s", pairs[i][0]);
    garble (&folder, first, 40);
    bench_session (NULL, second_is_clean);
    bench_session (NULL, second_is_clean);
    bench.params = kept;
  }
}

/* --- late --------------------------------------------------------------------
 */

static void
is_killed_writing (void *opaque)
{
  writes (opaque);
}

static void
fails_to_open (void *opaque)
{
  (void)opaque;
  assert (bench_open (&bench) == -EIO);
}

static void
b_is_all_late (void *opaque)
{
  (void)opaque;
  assert (bench_open (&bench) == 0);
  assert (bench.board->found.dirty[1] == BENCH_REGIONS);
  assert (bench.board->found.late[1] == BENCH_REGIONS);
  bench_stop (&bench);
}

/* A map that is lost is late as well as dirty, also if the start that finds it
 * lost does not end: what the process before it had sent may still come.
 */
static void
test_lost_map_stays_late_over_starts_that_do_not_end (void)
{
  static const char *const faults[]
      = { "log_set_aside=kill",  "file_rename_sync=kill", "maps_renewed=kill",
          "maps_unsealed=kill",  "open_recovered=kill",   "begin_slots=kill",
          "dirty_map_sync=kill", "begin_superblock=kill" };
  struct folder folder = { .fd = bench.dirfd };

  for (unsigned i = 0; i < sizeof faults / sizeof faults[0]; i++) {
    bench_put (&bench, &created);
    assert (killed (in_child ("after_issue:2=kill", is_killed_writing, NULL)));
    garble (&folder, "dirty.b", 40);
    assert (killed (in_child (faults[i], writes_alone, NULL)));
    assert (killed (in_child (faults[i], writes_alone, NULL))
            || strcmp (faults[i], "log_set_aside=kill") != 0);
    bench_session (NULL, b_is_all_late);
  }
  bench_put (&bench, &created);
  assert (killed (in_child ("after_issue:2=kill", is_killed_writing, NULL)));
  garble (&folder, "dirty.b", 40);
  bench_session ("file_rename_sync=error", fails_to_open);
  bench_session (NULL, b_is_all_late);
}

static void
creates_again (void *opaque)
{
  struct nbdm_params params = bench.params;

  (void)opaque;
  params.remotes[0].assume_in_sync = params.remotes[1].assume_in_sync = 0;
  assert (nbdm_create (&params, 1) == 0);
}

/* Made anew over a volume that was killed, perhaps by a create that was killed
 * as well.
 */
static void
test_created_over_a_killed_volume_is_late (void)
{
  static const char *const faults[]
      = { NULL, "create_erased=kill", "create_logs_made=kill",
          "file_rename:1=kill", "file_rename:3=kill" };

  for (unsigned i = 0; i < sizeof faults / sizeof faults[0]; i++) {
    bench_put (&bench, &created);
    assert (killed (in_child ("after_issue:2=kill", is_killed_writing, NULL)));
    if (faults[i])
      assert (killed (in_child (faults[i], creates_again, NULL)));
    bench_session (NULL, creates_again);
    bench_session (NULL, b_is_all_late);
  }
}

static void
is_written (void *opaque)
{
  (void)opaque;
  assert (bench_open (&bench) == 0);
  bench_connect_all (&bench);
  bench_write (&bench, 3, 4, 2);
  assert (nbdm_flush (bench.volume) == 0);
}

static void
is_written_and_cooled (void *opaque)
{
  struct nbdm_status status;

  (void)opaque;
  assert (bench_open (&bench) == 0);
  bench_write (&bench, 4, 2, 3);
  assert (nbdm_cool (bench.volume, 0) == 0);
  nbdm_get_status (bench.volume, &status);
  assert (status.active_extents == 0);
}

static void
put_file_back (const struct left *left, const char *name)
{
  int fd = openat (bench.dirfd, name, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);

  assert (fd >= 0);
  for (unsigned i = 0; i < left->nr_files; i++)
    if (strcmp (left->file[i].name, name) == 0)
      assert (full_pwrite (fd, left->file[i].bytes, left->file[i].size, 0)
              == 0);
  close (fd);
}

static void
garble_newest_slot (void)
{
  struct folder folder = { .fd = bench.dirfd };
  struct disk_superblock slot[2];
  int fd = openat (bench.dirfd, "superblock", O_RDONLY | O_CLOEXEC);

  assert (fd >= 0 && full_pread (fd, slot, sizeof slot, 0) == 0);
  close (fd);
  garble (&folder, "superblock",
          100
              + (le64toh (slot[1].sequence) > le64toh (slot[0].sequence)
                     ? LAYOUT_PAGE
                     : 0));
}

/* Lost power brings back the maps of remotes that were left out, whose removal
 * was not durable, and the newest slot of the superblock is bad: the other one
 * must not know the remotes any more.
 */
static void
test_left_out_and_the_newest_slot_is_lost (void)
{
  struct nbdm_params kept = bench.params;
  struct left before;

  bench_put (&bench, &created);
  bench_session (NULL, is_written);
  bench_take (&bench, &before);
  bench.params.nr_remotes = 0;
  bench_session (NULL, is_written_and_cooled);
  bench.params = kept;
  put_file_back (&before, "dirty.a");
  put_file_back (&before, "dirty.b");
  bench_free (&before);
  bench_reboot (&bench);
  garble_newest_slot ();
  bench_session (NULL, mends);
  bench_check_disks (&bench);
}

int
main (void)
{
  alarm (150); /* nothing here may hang */
  bench_make (&bench);
  bench_take (&bench, &created);
  RUN (test_left_out_while_local_is_not_ok_is_refused);
  RUN (test_left_out_while_local_is_ok_begins_anew);
  RUN (test_left_out_by_a_start_that_does_not_end);
  RUN (test_left_out_and_the_newest_slot_is_lost);
  RUN (test_names_that_look_like_leftovers);
  RUN (test_lost_map_stays_late_over_starts_that_do_not_end);
  RUN (test_created_over_a_killed_volume_is_late);
  bench_free (&created);
  bench_remove (&bench);
  return 0;
}
