/* SPDX-License-Identifier: BSD-3-Clause */

/* What a start believes after killed processes, lost power and failed flushes:
 * the logs are what they should be.
 */

#include "lone_volume.h"

static void
one_late_region (struct nbdm *v)
{
  assert (remote (v).dirty_regions == 1);
  assert (remote (v).remote.late_regions == 1);
}

static void
one_dirty_region (struct nbdm *v)
{
  assert (remote (v).dirty_regions == 1);
}

static void
test_killed_process_replays_exactly_the_open_slot (void)
{
  static const char *const faults[]
      = { "after_log=kill", "after_local=kill", "after_remote=kill",
          "before_retire=kill" };

  for (unsigned i = 0; i < sizeof faults / sizeof faults[0]; i++) {
    make_volume (SIZE, REGION);
    killed_at (faults[i], 7 * REGION);
    check_in_child (one_late_region);
    end_volume ();
  }
}

static void
test_lost_power_makes_active_extents_dirty (void)
{
  make_volume (SIZE, REGION);
  killed_at ("after_mark=kill", 2 * EXTENT);
  reboot ();
  check_in_child (one_dirty_extent);
  end_volume ();
}

static void
test_lost_power_of_last_short_extent (void)
{
  make_volume (SIZE, REGION);
  killed_at ("after_mark=kill", UINT64_C (5) * EXTENT);
  reboot ();
  check_in_child (one_dirty_region);
  end_volume ();
}

static void
test_clean_stop_survives_a_reboot (void)
{
  make_volume (SIZE, REGION);
  struct nbdm *v = open_volume ();
  assert (nbdm_stop (v) == 0);
  nbdm_close (v);
  reboot ();
  v = open_volume ();
  assert (remote (v).dirty_regions == 0);
  assert (remote (v).state == NBDM_HOLDING);
  nbdm_close (v);
  end_volume ();
}

/* Out of sync from the first write on, as nothing answers; the dirty bits
 * and the generation survive a kill.
 */
static void
test_dirty_bits_survive_a_kill (void)
{
  make_volume (SIZE, REGION);
  struct nbdm *v = open_volume ();
  assert (nbdm_start (v) == 0);
  write_at (v, 3 * REGION);
  write_at (v, SIZE - 512);
  assert (remote (v).state == NBDM_OUT_OF_SYNC);
  assert (remote (v).dirty_regions == 2);
  nbdm_close (v);
  v = open_volume ();
  assert (remote (v).state == NBDM_OUT_OF_SYNC);
  assert (remote (v).dirty_regions == 2);
  nbdm_close (v);
  end_volume ();
}

/* In a child with NBDM_FAULT: the second flush of local fails, the first is
 * the start's.
 */
static void
in_child_with_failing_flush (void (*act) (struct nbdm *))
{
  int status;
  pid_t pid = fork ();

  assert (pid >= 0);
  if (pid == 0) {
    setenv ("NBDM_FAULT", "local_flush:2=error", 1);
    struct nbdm *v = open_volume ();
    assert (nbdm_start (v) == 0);
    write_at (v, 2 * EXTENT);
    act (v);
    assert (nbdm_stop (v) == -EIO);
    _exit (0);
  }
  waitpid (pid, &status, 0);
  assert (status == 0);
}

static void
flush_fails_for_good (struct nbdm *v)
{
  assert (nbdm_flush (v) == -EIO);
  assert (nbdm_flush (v) == -EIO);
}

/* An error of FUA may come from another write's page, and the kernel reports it
 * once.
 */
static void
fua_fails_for_good (struct nbdm *v)
{
  static const uint8_t buf[512];

  assert (nbdm_pwrite (v, buf, sizeof buf, 0, NBDM_FUA) == -EIO);
  assert (nbdm_flush (v) == -EIO);
  assert (nbdm_pwrite (v, buf, sizeof buf, 0, 0) == -EIO);
}

static void
extent_is_dirty (struct nbdm *v)
{
  assert (remote (v).dirty_regions >= EXTENT / REGION);
}

/* The kernel may have dropped the pages that it could not write, so the page
 * cache is not exact.
 */
static void
test_failed_flush_is_final_and_recovered_as_lost_power (void)
{
  void (*const acts[]) (struct nbdm *)
      = { flush_fails_for_good, fua_fails_for_good };

  for (unsigned i = 0; i < 2; i++) {
    make_volume (SIZE, REGION);
    in_child_with_failing_flush (acts[i]);
    check_in_child (extent_is_dirty);
    end_volume ();
  }
}

/* The last store of a stop fails: it is not clean, whatever is stored later. */
static void
test_stop_that_failed_to_persist_is_not_clean (void)
{
  struct nbdm_disk_status disks[NBDM_MAX_DISKS];
  struct nbdm_status s;
  char name[NBDM_NAME_LEN];
  int status;
  pid_t pid;

  make_volume (SIZE, REGION);
  pid = fork ();
  assert (pid >= 0);
  if (pid == 0) {
    setenv ("NBDM_FAULT", "superblock_sync:2=error", 1); /* 1: the open's */
    struct nbdm *v = open_volume ();
    assert (nbdm_stop (v) == -EIO);
    _exit (0);
  }
  waitpid (pid, &status, 0);
  assert (status == 0);
  assert (nbdm_peek (site.path, name, &s, disks, NULL) == 0);
  assert (!s.clean);
  end_volume ();
}

/* A pebibyte by the format: the last sector's region, the maps' sizes, and
 * the last extent are right.  On a file system that has such files.
 */
static void
test_one_pebibyte_volume_tracks_its_last_region (void)
{
  const uint64_t size = UINT64_C (1) << 50;

  setenv ("TMPDIR", "/dev/shm", 1);
  make_volume (size, 4u << 20);
  struct nbdm *v = open_volume ();
  assert (nbdm_start (v) == 0);
  write_at (v, size - 512);
  assert (remote (v).dirty_regions == 1);
  nbdm_close (v);
  reboot ();
  v = open_volume ();
  assert (remote (v).dirty_regions == 1);
  assert (nbdm_stop (v) == 0);
  nbdm_close (v);
  end_volume ();
  unsetenv ("TMPDIR");
}

/* More extents hot than the log holds: the coldest go, after a flush. */
static void
test_more_extents_than_the_log_holds (void)
{
  const uint64_t size = UINT64_C (1500) * EXTENT;
  struct nbdm_status s;

  make_volume (size, REGION);
  struct nbdm *v = open_volume ();
  assert (nbdm_start (v) == 0);
  for (uint64_t extent = 0; extent < 1500; extent++)
    write_at (v, extent * EXTENT);
  nbdm_get_status (v, &s);
  assert (s.active_extents <= 1024);
  assert (remote (v).dirty_regions == 1500);
  /* Trims and zeroes longer than the log covers at once. */
  assert (nbdm_zero (v, size, 0, NBDM_MAY_TRIM) == 0);
  assert (nbdm_cool (v, 0) == 0);
  nbdm_get_status (v, &s);
  assert (s.active_extents == 0);
  nbdm_close (v);
  /* What went cold while idle is gone from the disk too. */
  reboot ();
  v = open_volume ();
  nbdm_get_status (v, &s);
  assert (s.active_extents == 0);
  assert (nbdm_stop (v) == 0);
  nbdm_close (v);
  end_volume ();
}

int
main (void)
{
  alarm (100); /* nothing here may hang */
  RUN (test_killed_process_replays_exactly_the_open_slot);
  RUN (test_lost_power_makes_active_extents_dirty);
  RUN (test_lost_power_of_last_short_extent);
  RUN (test_failed_flush_is_final_and_recovered_as_lost_power);
  RUN (test_stop_that_failed_to_persist_is_not_clean);
  RUN (test_clean_stop_survives_a_reboot);
  RUN (test_dirty_bits_survive_a_kill);
  RUN (test_one_pebibyte_volume_tracks_its_last_region);
  RUN (test_more_extents_than_the_log_holds);
  return 0;
}
