/* SPDX-License-Identifier: BSD-3-Clause */

/* The policy is switched while requests run: what the old policy promised holds
 * when the new one comes into force, and a fence is durable before any request
 * depends on it.
 */

#include "api.h"
#include "engine_site.h"

static uint8_t block[4096];

static int
write_stamp (uint8_t stamp, uint64_t offset)
{
  memset (block, stamp, sizeof block);
  return nbdm_pwrite (volume, block, sizeof block, offset, 0);
}

static int
read_block (uint64_t offset)
{
  return nbdm_pread (volume, block, sizeof block, offset);
}

static bool
fenced (void)
{
  struct nbdm_status s;

  nbdm_get_status (volume, &s);
  return s.fenced;
}

/* As the superblock has it. */
static bool
fenced_on_disk (void)
{
  struct nbdm_disk_status disks[NBDM_MAX_DISKS];
  char name[NBDM_NAME_LEN];
  struct nbdm_status s;

  assert (nbdm_peek (path ("state"), name, &s, disks, NULL) == 0);
  return s.fenced;
}

static void
lose_remote (void)
{
  kill_server ();
  wait_state (NBDM_OUT_OF_SYNC);
}

static void
bring_remote_back (void)
{
  start_server ();
  connect_remote ();
}

static void
in_sync_site (enum nbdm_policy policy, uint32_t hold_ms)
{
  make_site (policy, hold_ms, 5000);
  connect_remote ();
  resync_to_end ();
}

static void
test_start_is_fenced_durably (void)
{
  make_site (NBDM_STOP, 50, 5000); /* its remote was never copied to */
  assert (fenced () && fenced_on_disk ());
  connect_remote ();
  resync_to_end ();
  assert (!fenced () && !fenced_on_disk ());
  end_site ();
}

static void
test_stop_fences_at_once_and_degrade_lifts (void)
{
  in_sync_site (NBDM_DEGRADE, 50);
  lose_remote ();
  assert (write_stamp (1, 0) == 0 && !fenced_on_disk ());

  assert (nbdm_set_policy (volume, NBDM_STOP, 0) == 0);
  assert (fenced () && fenced_on_disk ());
  assert (write_stamp (2, 0) == -EIO);
  assert (nbdm_trim (volume, 4096, 0, 0) == -EIO);
  assert (nbdm_flush (volume) == -EIO);
  assert (read_block (0) == 0 && block[0] == 1);

  assert (nbdm_set_policy (volume, NBDM_DEGRADE, 0) == 0);
  assert (!fenced () && !fenced_on_disk ());
  assert (status ().state == NBDM_OUT_OF_SYNC && status ().dirty_regions == 1);
  assert (write_stamp (3, REGION) == 0 && nbdm_flush (volume) == 0);
  assert (status ().state == NBDM_OUT_OF_SYNC && status ().dirty_regions == 2);

  /* A remote that is behind is enough: it need not be away. */
  bring_remote_back ();
  assert (status ().state == NBDM_RESYNCING);
  assert (nbdm_set_policy (volume, NBDM_STOP, 0) == 0);
  assert (fenced_on_disk () && write_stamp (4, 0) == -EIO);
  resync_to_end ();
  assert (!fenced_on_disk () && write_stamp (5, 0) == 0);
  assert (nbdm_stop (volume) == 0);
  assert_images_equal ();
  end_site ();
}

static void
test_fenced_reads_are_switched_too (void)
{
  struct nbdm_extent extent;

  in_sync_site (NBDM_STOP, 50);
  assert (nbdm_set_policy (volume, NBDM_STOP, 1) == 0);
  assert (write_stamp (1, 0) == 0 && read_block (0) == 0);
  lose_remote ();
  assert (read_block (0) == -EIO);
  assert (nbdm_extents (volume, REGION, 0, &extent, 1) == -EIO);
  assert (nbdm_set_policy (volume, NBDM_STOP, 0) == 0);
  assert (write_stamp (2, 0) == -EIO && read_block (0) == 0 && block[0] == 1);
  assert (nbdm_set_policy (volume, NBDM_STOP, 1) == 0);
  assert (read_block (0) == -EIO);
  bring_remote_back ();
  resync_to_end ();
  assert (read_block (0) == 0);
  /* Only a fence makes reads fail, not an outage. */
  lose_remote ();
  assert (nbdm_set_policy (volume, NBDM_DEGRADE, 1) == 0);
  assert (read_block (0) == 0);
  end_site ();
}

/* The fault point waits until this file is there. */
static char gate[64];

static void
set_gate (const char *point)
{
  char fault[128];

  snprintf (gate, sizeof gate, "/tmp/nbdm-gate-%d", (int)getpid ());
  snprintf (fault, sizeof fault, "%s=wait:%s", point, gate);
  setenv ("NBDM_FAULT", fault, 1);
}

static void
await_gate (void)
{
  time_t until = time (NULL) + DEADLINE_S;
  char reached[80];

  snprintf (reached, sizeof reached, "%s.reached", gate);
  while (access (reached, F_OK) < 0) {
    assert (time (NULL) < until);
    pause_ms (2);
  }
  unlink (reached);
}

static void
open_gate (void)
{
  close (open (gate, O_WRONLY | O_CREAT, 0600));
}

static void *
one_write (void *rc)
{
  uint8_t buf[4096] = { 1 };

  *(int *)rc = nbdm_pwrite (volume, buf, sizeof buf, 0, 0);
  return NULL;
}

static void *
one_flush (void *rc)
{
  *(int *)rc = nbdm_flush (volume);
  return NULL;
}

/* The write began under degrade, when the remote did not need to have it. */
static void
test_write_under_way_when_stop_begins_is_not_acknowledged (void)
{
  pthread_t thread;
  int rc = 1;

  set_gate ("after_local");
  in_sync_site (NBDM_DEGRADE, 50);
  lose_remote ();
  assert (pthread_create (&thread, NULL, one_write, &rc) == 0);
  await_gate ();
  assert (nbdm_set_policy (volume, NBDM_STOP, 0) == 0);
  /* Even when the remote is back, the write's range is still to be copied. */
  bring_remote_back ();
  open_gate ();
  pthread_join (thread, NULL);
  assert (rc == -EIO);
  resync_to_end ();
  assert (!fenced ());
  unlink (gate);
  assert (nbdm_stop (volume) == 0);
  assert_images_equal ();
  end_site ();
}

static void
test_write_under_way_when_degrade_begins_is_acknowledged (void)
{
  pthread_t thread;
  int rc = 1;

  set_gate ("after_local");
  in_sync_site (NBDM_STOP, 50);
  assert (pthread_create (&thread, NULL, one_write, &rc) == 0);
  await_gate ();
  lose_remote ();
  assert (fenced ());
  assert (nbdm_set_policy (volume, NBDM_DEGRADE, 0) == 0);
  open_gate ();
  pthread_join (thread, NULL);
  assert (rc == 0 && status ().dirty_regions == 1);
  unlink (gate);
  end_site ();
}

/* A flush that waits under stop for a copy does not wait under degrade. */
static void
test_degrade_ends_a_flush_that_waits (void)
{
  time_t until = time (NULL) + DEADLINE_S;
  struct nbdm_status s;
  pthread_t thread;
  uint64_t commands;
  int rc = 1;

  in_sync_site (NBDM_STOP, DEADLINE_S * 1000);
  assert (write_stamp (1, 0) == 0);
  kill_server ();
  wait_state (NBDM_HOLDING);
  /* A hold is no fence yet. */
  assert (nbdm_set_policy (volume, NBDM_STOP, 0) == 0 && !fenced ());
  bring_remote_back ();
  commands = status ().remote.commands;
  assert (pthread_create (&thread, NULL, one_flush, &rc) == 0);
  while (status ().remote.commands == commands) {
    assert (time (NULL) < until);
    pause_ms (2);
  }
  pause_ms (50); /* no state shows that it waits: give it time */
  nbdm_get_status (volume, &s);
  assert (s.flushes == 0);
  assert (nbdm_set_policy (volume, NBDM_DEGRADE, 0) == 0);
  pthread_join (thread, NULL);
  assert (rc == 0 && status ().dirty_regions == 1);
  end_site ();
}

static void
test_hold_ends_by_the_policy_of_its_end (void)
{
  pthread_t thread;
  int rc = 1;

  in_sync_site (NBDM_DEGRADE, 1000);
  kill_server ();
  wait_state (NBDM_HOLDING);
  assert (pthread_create (&thread, NULL, one_write, &rc) == 0);
  assert (nbdm_set_policy (volume, NBDM_STOP, 0) == 0);
  assert (!fenced () || status ().state == NBDM_OUT_OF_SYNC);
  pthread_join (thread, NULL);
  assert (rc == -EIO && fenced_on_disk ());
  end_site ();
}

static void
test_refused_when_it_could_not_be_kept (void)
{
  /* Stores so far: the open, resyncing, in_sync, out_of_sync. */
  setenv ("NBDM_FAULT", "superblock_sync:5=error", 1);
  in_sync_site (NBDM_DEGRADE, 50);
  assert (nbdm_set_policy (volume, 3, 0) == -EINVAL);
  lose_remote ();
  assert (nbdm_set_policy (volume, NBDM_STOP, 0) == -EIO);
  assert (write_stamp (1, 0) == -EIO);
  assert (nbdm_set_policy (volume, NBDM_DEGRADE, 0) == -EIO);
  assert (write_stamp (1, 0) == -EIO);
  assert (nbdm_stop (volume) == -EIO);
  assert (nbdm_set_policy (volume, NBDM_DEGRADE, 0) == -ESHUTDOWN);
  nbdm_close (volume);
  remove_site ();
}

/* Read a byte of the remote's disk itself, past the mirror. */
static uint8_t
remote_byte (uint64_t offset)
{
  int fd = open (path ("remote"), O_RDONLY | O_CLOEXEC);
  uint8_t byte;

  assert (fd >= 0 && pread (fd, &byte, 1, (off_t)offset) == 1);
  close (fd);
  return byte;
}

/* Under stop what is answered is on both; under degrade all is answered. */
static void
check_promise (enum nbdm_policy policy, uint8_t stamp)
{
  int rc = write_stamp (stamp, load_size);

  if (policy == NBDM_DEGRADE)
    assert (rc == 0);
  else
    assert (rc == 0 ? remote_byte (load_size) == stamp : rc == -EIO);
}

static void
test_switched_under_load (void)
{
  unsigned seed = 7;
  bool up = true;

  load_size = 63 * REGION;
  load_may_fail = true;
  in_sync_site (NBDM_DEGRADE, 20);
  start_load ();
  for (unsigned round = 0; round < 120; round++) {
    enum nbdm_policy policy = rand_r (&seed) % 2 ? NBDM_STOP : NBDM_DEGRADE;

    if (round % 6 == 2)
      kill_server ();
    if (round % 6 == 5)
      bring_remote_back ();
    up = round % 6 < 2 || round % 6 == 5;
    assert (nbdm_set_policy (volume, policy, rand_r (&seed) % 2) == 0);
    check_promise (policy, (uint8_t)(round + 1));
    wait_requests (20);
    if (up && status ().state == NBDM_RESYNCING && rand_r (&seed) % 2)
      resync_to_end ();
  }
  assert (up);
  assert (nbdm_set_policy (volume, NBDM_DEGRADE, 0) == 0);
  resync_to_end ();
  stop_load ();
  assert (load_errors > 0);
  assert (nbdm_stop (volume) == 0);
  assert_images_equal ();
  end_site ();
}

static const struct engine_test tests[] = {
  TEST (test_start_is_fenced_durably),
  TEST (test_stop_fences_at_once_and_degrade_lifts),
  TEST (test_fenced_reads_are_switched_too),
  TEST (test_write_under_way_when_stop_begins_is_not_acknowledged),
  TEST (test_write_under_way_when_degrade_begins_is_acknowledged),
  TEST (test_degrade_ends_a_flush_that_waits),
  TEST (test_hold_ends_by_the_policy_of_its_end),
  TEST (test_refused_when_it_could_not_be_kept),
  TEST (test_switched_under_load),
};

int
main (int argc, char *argv[])
{
  return run_tests (tests, sizeof tests / sizeof tests[0], argc, argv);
}
