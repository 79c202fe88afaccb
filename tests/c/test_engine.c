/* SPDX-License-Identifier: BSD-3-Clause */

/* The engine with real threads and a real nbdkit as its remote, for the
 * sanitizers: what the end-to-end tests show of behaviour, this shows of
 * races and lifetimes.
 */

#include "api.h"
#include "engine_site.h"

/* --- tests ----------------------------------------------------------- */

static void
test_kill_under_load_catches_up (void)
{
  make_site (NBDM_DEGRADE, 200, 5000);
  connect_remote ();
  resync_to_end ();
  start_load ();
  for (unsigned round = 0; round < 6; round++) {
    wait_requests (150);
    kill_server ();
    if (round % 2) /* out of sync, and clients go on alone */
      wait_state (NBDM_OUT_OF_SYNC);
    start_server ();
    connect_remote ();
    resync_to_end ();
  }
  wait_requests (100);
  stop_load ();
  assert (nbdm_stop (volume) == 0);
  assert_images_equal ();
  end_site ();
}

/* The race at the end of a resync: a write to the region whose bit is about
 * to be cleared.
 */
static void
test_resync_end_under_load_loses_nothing (void)
{
  make_site (NBDM_DEGRADE, 200, 5000);
  connect_remote ();
  resync_to_end ();
  start_load ();
  for (unsigned round = 0; round < 40; round++) {
    assert (nbdm_remote_invalidate (volume, 1) == 0);
    resync_to_end ();
  }
  stop_load ();
  assert (nbdm_stop (volume) == 0);
  assert_images_equal ();
  end_site ();
}

static void
test_hung_remote_is_bounded (void)
{
  uint8_t buf[4096] = { 1 };
  time_t start;

  /* A hold as long as the test: a deadline that passed is not held. */
  make_site (NBDM_DEGRADE, 2 * DEADLINE_S * 1000, 300);
  connect_remote ();
  resync_to_end ();
  freeze_server ();
  start = time (NULL);
  assert (nbdm_pwrite (volume, buf, sizeof buf, 0, 0) == 0);
  assert (nbdm_flush (volume) == 0);
  assert (time (NULL) - start < DEADLINE_S / 2);
  assert (status ().state == NBDM_OUT_OF_SYNC);
  assert (strstr (status ().reason, "not answered within 0.3 s"));
  assert (status ().dirty_regions == 1 && status ().remote.late_regions == 1);
  kill (server, SIGCONT);
  end_site ();
}

static void *
one_batch (void *rc)
{
  struct nbdm_resync batch = { .max_bytes = 1u << 20, .pace.depth = 4 };

  *(int *)rc = nbdm_disk_resync (volume, 1, &batch);
  return NULL;
}

/* An unanswered copy may arrive after the next one of the same region. */
static void
test_unanswered_resync_copies_are_late (void)
{
  time_t until = time (NULL) + DEADLINE_S;
  pthread_t thread;
  int rc = 0;

  make_site (NBDM_DEGRADE, 100, 30000);
  connect_remote ();
  freeze_server ();
  assert (pthread_create (&thread, NULL, one_batch, &rc) == 0);
  while (status ().remote.outstanding == 0
         || status ().remote.late_regions == 0) {
    assert (time (NULL) < until);
    pause_ms (2);
  }
  kill_server ();
  pthread_join (thread, NULL);
  assert (rc == -ENOTCONN);
  assert (status ().remote.late_regions > 0);
  start_server ();
  connect_remote ();
  resync_to_end ();
  assert (status ().remote.late_regions == 0);
  assert (nbdm_stop (volume) == 0);
  assert_images_equal ();
  end_site ();
}

static void
test_hold_in_time_never_degrades (void)
{
  make_site (NBDM_DEGRADE, 30000, 5000);
  connect_remote ();
  resync_to_end ();
  start_load ();
  wait_requests (100);
  kill_server ();
  wait_state (NBDM_HOLDING);
  start_server ();
  connect_remote ();
  assert (status ().state == NBDM_RESYNCING);
  wait_requests (100);
  resync_to_end ();
  stop_load ();
  assert (nbdm_stop (volume) == 0);
  assert_images_equal ();
  end_site ();
}

/* What was connected and not admitted does not end the hold it was to save. */
static void
test_unadmitted_connection_dropped_keeps_the_hold (void)
{
  char uri[160];

  make_site (NBDM_DEGRADE, 2 * DEADLINE_S * 1000, 5000);
  connect_remote ();
  resync_to_end ();
  kill_server ();
  wait_state (NBDM_HOLDING);
  start_server ();
  snprintf (uri, sizeof uri, "nbd+unix:///?socket=%s", path ("sock"));
  assert (nbdm_remote_connect (volume, 1, uri, 5000) == 0);
  nbdm_disk_drop (volume, 1, "the sample could not be read");
  assert (status ().state == NBDM_HOLDING);
  connect_remote ();
  assert (status ().state == NBDM_IN_SYNC);
  end_site ();
}

static void *
one_flush (void *rc)
{
  *(int *)rc = nbdm_flush (volume);
  return NULL;
}

/* A server back within the hold may have lost what it answered: a flush waits
 * until that has been copied.
 */
static void
test_policy_stop_flush_waits_for_both (void)
{
  uint8_t buf[4096] = { 3 };
  struct nbdm_status s;
  pthread_t thread;
  int rc = 1;

  make_site (NBDM_STOP, DEADLINE_S * 1000, 5000);
  connect_remote ();
  resync_to_end ();
  assert (nbdm_pwrite (volume, buf, sizeof buf, 0, 0) == 0);
  kill_server ();
  wait_state (NBDM_HOLDING);
  start_server ();
  connect_remote ();
  assert (status ().dirty_regions == 1 && status ().remote.late_regions == 0);
  assert (pthread_create (&thread, NULL, one_flush, &rc) == 0);
  do
    nbdm_get_status (volume, &s);
  while (s.inflight == 0 && s.flushes == 0);
  assert (s.flushes == 0);
  resync_to_end ();
  pthread_join (thread, NULL);
  assert (rc == 0);
  assert (nbdm_stop (volume) == 0);
  assert_images_equal ();
  end_site ();
}

static void *
one_cool (void *rc)
{
  *(int *)rc = nbdm_cool (volume, 0);
  return NULL;
}

static bool
is_cooling (void)
{
  bool cooling;

  pthread_mutex_lock (&volume->lock);
  cooling = volume->cooling;
  pthread_mutex_unlock (&volume->lock);
  return cooling;
}

/* Extents go cold, which a flush of both disks precedes, and the remote is
 * held: a stop does not wait for the hold's end with it.
 */
static void
test_stop_ends_the_hold_of_what_cools (void)
{
  uint8_t buf[4096] = { 8 };
  time_t until = time (NULL) + DEADLINE_S;
  pthread_t thread;
  int rc = 1;

  make_site (NBDM_DEGRADE, 2 * DEADLINE_S * 1000, 5000);
  connect_remote ();
  resync_to_end ();
  assert (nbdm_pwrite (volume, buf, sizeof buf, 0, 0) == 0);
  kill_server ();
  wait_state (NBDM_HOLDING);
  assert (pthread_create (&thread, NULL, one_cool, &rc) == 0);
  while (!is_cooling ())
    pause_ms (1);
  assert (nbdm_stop (volume) == 0);
  assert (time (NULL) < until);
  pthread_join (thread, NULL);
  assert (rc == 0);
  end_site ();
}

static void
test_policy_stop_fences_until_in_sync (void)
{
  uint8_t buf[4096] = { 7 }, read[4096];

  make_site (NBDM_STOP, 50, 1000);
  assert (nbdm_pwrite (volume, buf, sizeof buf, 0, 0) == -EIO);
  connect_remote ();
  resync_to_end ();
  assert (nbdm_pwrite (volume, buf, sizeof buf, 0, 0) == 0);
  kill_server ();
  assert (nbdm_pwrite (volume, buf, sizeof buf, REGION, 0) == -EIO);
  assert (status ().state == NBDM_OUT_OF_SYNC);
  assert (nbdm_pwrite (volume, buf, sizeof buf, 0, 0) == -EIO);
  assert (nbdm_pread (volume, read, sizeof read, 0) == 0 && read[0] == 7);
  start_server ();
  connect_remote ();
  resync_to_end ();
  assert (nbdm_pwrite (volume, buf, sizeof buf, REGION, NBDM_FUA) == 0);
  assert (nbdm_stop (volume) == 0);
  assert_images_equal ();
  end_site ();
}

static void
test_superblock_failure_is_final (void)
{
  uint8_t buf[4096] = { 12 };
  struct nbdm_status s;

  /* Stores so far: the open, resyncing, in_sync; the next is out_of_sync. */
  setenv ("NBDM_FAULT", "superblock_sync:4=error", 1);
  make_site (NBDM_DEGRADE, 50, 1000);
  connect_remote ();
  resync_to_end ();
  kill_server ();
  assert (nbdm_pwrite (volume, buf, sizeof buf, 0, 0) == -EIO);
  nbdm_get_status (volume, &s);
  assert (s.failed && s.reason[0]);
  assert (nbdm_pwrite (volume, buf, sizeof buf, 0, 0) == -EIO);
  assert (nbdm_pread (volume, buf, sizeof buf, 0) == 0);
  assert (nbdm_stop (volume) == -EIO);
  nbdm_close (volume);
  remove_site ();
}

static void
test_clean_restart_copies_nothing (void)
{
  uint8_t buf[4096] = { 13 };

  make_site (NBDM_DEGRADE, 5000, 5000);
  connect_remote ();
  resync_to_end ();
  assert (nbdm_pwrite (volume, buf, sizeof buf, 5 * REGION, 0) == 0);
  assert (nbdm_stop (volume) == 0);
  nbdm_close (volume);
  assert (nbdm_open (&params, &volume) == 0);
  assert (nbdm_start (volume) == 0);
  assert (status ().state == NBDM_HOLDING && status ().dirty_regions == 0);
  connect_remote ();
  assert (status ().state == NBDM_IN_SYNC && status ().copied_bytes == 0);
  end_site ();
}

static const struct engine_test tests[] = {
  TEST (test_kill_under_load_catches_up),
  TEST (test_resync_end_under_load_loses_nothing),
  TEST (test_hung_remote_is_bounded),
  TEST (test_unanswered_resync_copies_are_late),
  TEST (test_hold_in_time_never_degrades),
  TEST (test_unadmitted_connection_dropped_keeps_the_hold),
  TEST (test_policy_stop_flush_waits_for_both),
  TEST (test_stop_ends_the_hold_of_what_cools),
  TEST (test_policy_stop_fences_until_in_sync),
  TEST (test_superblock_failure_is_final),
  TEST (test_clean_restart_copies_nothing),
};

int
main (int argc, char *argv[])
{
  return run_tests (tests, sizeof tests / sizeof tests[0], argc, argv);
}
