/* SPDX-License-Identifier: BSD-3-Clause */

/* What a start believes: killed processes, lost power, and logs that are not
 * what they should be.  No remote answers here; the dirty maps are the
 * result.  "Killed" is nbdm_close without nbdm_stop, or a child that a fault
 * point killed: the page cache lives in both.
 */

#include <sys/file.h>

#include "api.h"
#include "logs/layout.h"
#include "logs/superblock.h"
#include "volume/volume.h"
#include "test.h"

#define REGION 65536u
#define EXTENT (4u << 20)
#define SIZE (UINT64_C (5) * EXTENT + 3 * 512u)
#define NR_REGIONS ((SIZE - 1) / REGION + 1)

static struct folder site;
static struct nbdm_params params;
static char local[PATH_MAX + 16];

static void
make_volume (uint64_t size, uint32_t region_size)
{
  int fd, status;
  pid_t pid;

  site = folder_make ();
  snprintf (local, sizeof local, "%s/disk", site.path);
  fd = open (local, O_RDWR | O_CREAT, 0600);
  assert (fd >= 0 && ftruncate (fd, (off_t)size) == 0);
  close (fd);
  params = (struct nbdm_params){ .name = "test",
                                 .local = local,
                                 .state_dir = site.path,
                                 .region_size = region_size,
                                 .policy = NBDM_DEGRADE,
                                 .hold_ms = 0,
                                 .nr_remotes = 1 };
  params.remotes[0].name = "dr";
  params.remotes[0].deadline_ms = 1000;
  params.remotes[0].assume_in_sync = 1;
  /* In a child: NBDM_FAULT is read once a process, and not before the one
   * that is to be killed.
   */
  pid = fork ();
  assert (pid >= 0);
  if (pid == 0)
    _exit (nbdm_create (&params, 0) == 0 ? 0 : 1);
  waitpid (pid, &status, 0);
  assert (status == 0);
}

static void
end_volume (void)
{
  char command[PATH_MAX + 16];

  close (site.fd);
  snprintf (command, sizeof command, "rm -rf %s", site.path);
  assert (system (command) == 0);
}

static struct nbdm *
open_volume (void)
{
  struct nbdm *v = NULL;

  if (nbdm_open (&params, &v) < 0) {
    fprintf (stderr, "open: %s\n", nbdm_last_error ());
    abort ();
  }
  return v;
}

static struct nbdm_disk_status
remote (struct nbdm *v)
{
  struct nbdm_disk_status s;

  assert (nbdm_get_disk_status (v, 1, &s) == 0);
  return s;
}

static void
write_at (struct nbdm *v, uint64_t offset)
{
  static const uint8_t buf[4096] = { 1 };

  assert (nbdm_pwrite (v, buf, 512, offset, 0) == 0);
}

/* A child writes, and NBDM_FAULT kills it on the way. */
static void
killed_at (const char *fault, uint64_t offset)
{
  int status;
  pid_t pid = fork ();

  assert (pid >= 0);
  if (pid == 0) {
    setenv ("NBDM_FAULT", fault, 1);
    struct nbdm *v = open_volume ();
    assert (nbdm_start (v) == 0);
    write_at (v, offset);
    _exit (0);
  }
  waitpid (pid, &status, 0);
  assert (WIFSIGNALED (status) && WTERMSIG (status) == SIGKILL);
}

/* The superblock as another boot would find it. */
static void
reboot (void)
{
  struct disk_superblock sb;
  bool torn;
  int fd = openat (site.fd, "superblock", O_RDWR);

  assert (fd >= 0 && superblock_load (fd, &sb, &torn) == 0);
  sb.boot_id[0] ^= 1;
  assert (superblock_store (fd, &sb) == 0);
  close (fd);
}

/* Open in a child too, so that the next test's fault is still to be read. */
static void
check_in_child (void (*check) (struct nbdm *))
{
  int status;
  pid_t pid = fork ();

  assert (pid >= 0);
  if (pid == 0) {
    struct nbdm *v = open_volume ();
    check (v);
    assert (nbdm_stop (v) == 0);
    nbdm_close (v);
    _exit (0);
  }
  waitpid (pid, &status, 0);
  assert (status == 0);
}

static void
one_late_region (struct nbdm *v)
{
  assert (remote (v).dirty_regions == 1);
  assert (remote (v).remote.late_regions == 1);
}

static void
no_dirty_region (struct nbdm *v)
{
  assert (remote (v).dirty_regions == 0);
}

static void
one_dirty_extent (struct nbdm *v)
{
  assert (remote (v).dirty_regions == EXTENT / REGION);
  assert (remote (v).remote.late_regions == EXTENT / REGION);
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

static void
flip (const char *file, off_t offset)
{
  uint8_t byte;
  int fd = openat (site.fd, file, O_RDWR);

  assert (fd >= 0 && pread (fd, &byte, 1, offset) == 1);
  byte ^= 0x10;
  assert (pwrite (fd, &byte, 1, offset) == 1);
  close (fd);
}

static void
cut (const char *file, off_t length)
{
  int fd = openat (site.fd, file, O_RDWR);

  assert (fd >= 0 && ftruncate (fd, length) == 0);
  close (fd);
}

static void
drop (const char *file, off_t unused)
{
  (void)unused;
  assert (unlinkat (site.fd, file, 0) == 0);
}

static void drop (const char *file, off_t unused);
static void flip (const char *file, off_t offset);

static void
all_dirty (struct nbdm *v)
{
  assert (remote (v).dirty_regions == NR_REGIONS);
}

/* The start that finds a log lost dies once the fresh one is there. */
static void
test_start_killed_after_renewing_a_log_is_still_all_dirty (void)
{
  static const char *const files[] = { "activity", "inflight" };

  for (unsigned i = 0; i < 2; i++) {
    make_volume (SIZE, REGION);
    check_in_child (no_dirty_region);
    drop (files[i], 0);
    killed_at ("log_renewed=kill", 0);
    check_in_child (all_dirty);
    end_volume ();
  }
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

/* An error of FUA may be that of another write's page, and is told once. */
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

/* What the kernel could not write it may have dropped: no exact page cache. */
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
  assert (nbdm_peek (site.path, name, &s, disks) == 0);
  assert (!s.clean);
  end_volume ();
}

/* Torn slots after lost power are no lost log: the extents cover them. */
static void
test_lost_power_ignores_torn_slots (void)
{
  make_volume (SIZE, REGION);
  killed_at ("after_log=kill", 2 * EXTENT);
  flip ("inflight", 4096 + 20);
  reboot ();
  check_in_child (one_dirty_extent);
  end_volume ();
}

/* Rule 9, for every log and every kind of loss: all dirty, and said. */
static void
test_lost_log_means_all_dirty (void)
{
  static const struct {
    const char *file;
    void (*harm) (const char *, off_t);
    off_t where;
  } cases[] = {
    { "activity", flip, 40 },      { "activity", flip, 4096 + 100 },
    { "activity", cut, 4096 },     { "activity", drop, 0 },
    { "inflight", flip, 40 },      { "inflight", cut, 5000 },
    { "inflight", drop, 0 },       { "dirty.dr", flip, 40 },
    { "dirty.dr", flip, 4096 },    { "dirty.dr", flip, 3 * 4096 + 17 },
    { "dirty.dr", cut, 2 * 4096 }, { "dirty.dr", drop, 0 },
  };

  for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    char bad[80];
    struct nbdm_status s;

    make_volume (SIZE, REGION);
    cases[i].harm (cases[i].file, cases[i].where);
    struct nbdm *v = open_volume ();
    assert (remote (v).dirty_regions == NR_REGIONS);
    assert (remote (v).remote.late_regions == NR_REGIONS);
    assert (!remote (v).remote.assumed);
    nbdm_get_status (v, &s);
    assert (strstr (s.reason, cases[i].file));
    assert (strstr (s.reason, "everything is copied again"));
    snprintf (bad, sizeof bad, "%s~bad", cases[i].file);
    assert ((cases[i].harm == drop) == (faccessat (site.fd, bad, F_OK, 0) < 0));
    assert (nbdm_stop (v) == 0);
    nbdm_close (v);
    end_volume ();
  }
}

static void
copy_file (const char *from, const char *to)
{
  char command[3 * PATH_MAX];

  snprintf (command, sizeof command, "cp %s/%s %s/%s", site.path, from,
            site.path, to);
  assert (system (command) == 0);
}

static void
test_old_copy_of_a_log_means_all_dirty (void)
{
  static const char *const files[] = { "activity", "inflight", "dirty.dr" };

  for (unsigned i = 0; i < 3; i++) {
    make_volume (SIZE, REGION);
    copy_file (files[i], "old");
    for (unsigned session = 0; session < 2; session++) {
      struct nbdm *v = open_volume ();
      assert (nbdm_stop (v) == 0);
      nbdm_close (v);
    }
    copy_file ("old", files[i]);
    struct nbdm *v = open_volume ();
    assert (remote (v).dirty_regions == NR_REGIONS);
    nbdm_close (v);
    end_volume ();
  }
}

/* A copy taken while the volume was in use, put back after a clean stop of
 * the same session.
 */
static void
test_log_in_use_under_a_clean_superblock_means_all_dirty (void)
{
  make_volume (SIZE, REGION);
  struct nbdm *v = open_volume ();
  copy_file ("dirty.dr", "old");
  assert (nbdm_stop (v) == 0);
  nbdm_close (v);
  copy_file ("old", "dirty.dr");
  v = open_volume ();
  assert (remote (v).dirty_regions == NR_REGIONS);
  nbdm_close (v);
  end_volume ();
}

static void
test_one_torn_superblock_slot_goes_on (void)
{
  make_volume (SIZE, REGION);
  struct nbdm *v = open_volume ();
  assert (nbdm_start (v) == 0);
  write_at (v, 0);
  nbdm_close (v);
  /* Whichever is the newer, what either slot says has to be enough. */
  for (off_t slot = 0; slot < 2; slot++) {
    copy_file ("superblock", "kept");
    flip ("superblock", slot * 4096 + 300);
    v = open_volume ();
    assert (remote (v).dirty_regions >= 1);
    nbdm_close (v);
    copy_file ("kept", "superblock");
  }
  flip ("superblock", 300);
  flip ("superblock", 4096 + 300);
  assert (nbdm_open (&params, &v) == -EUCLEAN);
  end_volume ();
}

static void
test_volume_is_opened_once (void)
{
  struct nbdm *second = NULL;

  make_volume (SIZE, REGION);
  struct nbdm *v = open_volume ();
  assert (nbdm_open (&params, &second) == -EBUSY);
  ASSERT_SAYS ("is in use by process");
  assert (nbdm_create (&params, 1) == -EBUSY);
  nbdm_close (v);
  end_volume ();
}

/* Another start holds the lock for a moment, to put serve.log aside. */
static void
test_lock_of_a_moment_is_waited_for (void)
{
  int ready[2], status;
  char byte;

  make_volume (SIZE, REGION);
  assert (pipe (ready) == 0);
  pid_t pid = fork ();
  assert (pid >= 0);
  if (pid == 0) {
    int fd = openat (site.fd, "lock", O_RDWR);

    if (fd < 0 || flock (fd, LOCK_EX | LOCK_NB) < 0
        || write (ready[1], "", 1) != 1)
      _exit (1);
    usleep (100000);
    _exit (0);
  }
  assert (read (ready[0], &byte, 1) == 1);
  nbdm_close (open_volume ());
  waitpid (pid, &status, 0);
  assert (status == 0);
  close (ready[0]);
  close (ready[1]);
  end_volume ();
}

/* While local has failed nothing locks it. */
static void
test_volume_whose_lock_was_removed_is_opened_once (void)
{
  struct nbdm *second = NULL;

  make_volume (SIZE, REGION);
  params.local_choice = NBDM_LOCAL_LOST;
  struct nbdm *v = open_volume ();
  assert (unlinkat (site.fd, "lock", 0) == 0);
  assert (nbdm_open (&params, &second) == -EBUSY);
  ASSERT_SAYS ("is in use by another process");
  assert (nbdm_create (&params, 1) == -EBUSY);
  nbdm_close (v);
  v = open_volume ();
  nbdm_close (v);
  params.local_choice = NBDM_LOCAL_CHECKED;
  end_volume ();
}

static void
test_other_parameters_are_refused (void)
{
  struct nbdm *v = NULL;

  make_volume (SIZE, REGION);
  params.region_size = 2 * REGION;
  assert (nbdm_open (&params, &v) == -EINVAL);
  ASSERT_SAYS ("region_size");
  params.region_size = REGION;
  params.size = SIZE - 512;
  assert (nbdm_open (&params, &v) == -EINVAL);
  params.size = 0;
  params.name = "other";
  assert (nbdm_open (&params, &v) == -EINVAL);
  ASSERT_SAYS ("the state of volume \"test\"");
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
  RUN (test_lost_power_ignores_torn_slots);
  RUN (test_start_killed_after_renewing_a_log_is_still_all_dirty);
  RUN (test_failed_flush_is_final_and_recovered_as_lost_power);
  RUN (test_stop_that_failed_to_persist_is_not_clean);
  RUN (test_clean_stop_survives_a_reboot);
  RUN (test_dirty_bits_survive_a_kill);
  RUN (test_lost_log_means_all_dirty);
  RUN (test_old_copy_of_a_log_means_all_dirty);
  RUN (test_log_in_use_under_a_clean_superblock_means_all_dirty);
  RUN (test_one_torn_superblock_slot_goes_on);
  RUN (test_volume_is_opened_once);
  RUN (test_lock_of_a_moment_is_waited_for);
  RUN (test_volume_whose_lock_was_removed_is_opened_once);
  RUN (test_other_parameters_are_refused);
  RUN (test_one_pebibyte_volume_tracks_its_last_region);
  RUN (test_more_extents_than_the_log_holds);
  return 0;
}
