/* SPDX-License-Identifier: BSD-3-Clause */

/* Clients never flush: the engine does, so little is copied again when a remote
 * is lost.
 */

#include "api.h"
#include "engine_site.h"

#define HOUR_MS 3600000u

static int
write_region (uint64_t region)
{
  static uint8_t block[4096];

  memset (block, (int)region + 1, sizeof block);
  return nbdm_pwrite (volume, block, sizeof block, region * REGION, 0);
}

static void
wait_flushed (void)
{
  time_t until = time (NULL) + DEADLINE_S;

  while (status ().remote.unflushed_regions > 0) {
    assert (time (NULL) < until);
    pause_ms (2);
  }
}

static void
in_sync_site (uint32_t hold_ms, uint32_t deadline_ms)
{
  make_site (NBDM_DEGRADE, hold_ms, deadline_ms);
  connect_remote ();
  resync_to_end ();
}

static void
test_old_is_flushed_and_idle_sends_nothing (void)
{
  uint64_t commands;

  flush_ms = 200;
  in_sync_site (50, 5000);
  for (unsigned round = 0; round < 3; round++) {
    commands = status ().remote.commands;
    for (uint64_t region = 0; region < 5; region++)
      assert (write_region (region) == 0);
    wait_flushed ();
    assert (status ().remote.commands > commands + 5);
  }
  commands = status ().remote.commands;
  pause_ms (6 * flush_ms);
  assert (status ().remote.commands == commands);
  end_site ();
}

static void
test_many_are_flushed_at_once (void)
{
  uint64_t commands;

  flush_bytes = 4 * REGION;
  flush_ms = HOUR_MS;
  in_sync_site (50, 5000);
  for (unsigned round = 0; round < 15; round++) {
    assert (status ().remote.unflushed_regions == 0);
    commands = status ().remote.commands;
    for (uint64_t i = 0; i < 3; i++)
      assert (write_region (4 * round + i) == 0);
    assert (status ().remote.unflushed_regions == 3);
    assert (status ().remote.commands == commands + 3);
    assert (write_region (4 * round + 3) == 0);
    wait_flushed ();
  }
  end_site ();
}

static void
test_lost_remote_misses_only_what_came_since (void)
{
  flush_bytes = 20 * REGION;
  flush_ms = HOUR_MS;
  in_sync_site (0, 5000);
  for (uint64_t region = 0; region < 20; region++)
    assert (write_region (region) == 0);
  wait_flushed ();
  assert (write_region (3) == 0 && write_region (30) == 0);
  kill_server ();
  wait_state (NBDM_OUT_OF_SYNC);
  assert (status ().dirty_regions == 2
          && status ().remote.unflushed_regions == 0);
  start_server ();
  connect_remote ();
  resync_to_end ();
  assert (nbdm_stop (volume) == 0);
  assert_images_equal ();
  end_site ();
}

/* The engine's own flush is a command like any other: if it hangs, the deadline
 * finds it, also when no client waits.
 */
static void
test_hung_remote_is_found (void)
{
  flush_ms = 200;
  in_sync_site (2 * DEADLINE_S * 1000, 400);
  assert (write_region (1) == 0);
  freeze_server ();
  wait_state (NBDM_OUT_OF_SYNC);
  assert (strstr (status ().reason, "not answered within 0.4 s"));
  assert (status ().dirty_regions == 1 && status ().remote.late_regions == 0);
  kill (server, SIGCONT);
  end_site ();
}

/* Leave a flush unanswered, unless it was faster than our signal. */
static void
hang_flush (void)
{
  time_t until = time (NULL) + DEADLINE_S;

  flush_ms = 50;
  in_sync_site (1000, 1000);
  assert (write_region (1) == 0);
  freeze_server ();
  while (status ().remote.outstanding == 0
         && status ().remote.unflushed_regions > 0) {
    assert (time (NULL) < until);
    pause_ms (2);
  }
}

static void
test_stop_while_a_flush_hangs (void)
{
  hang_flush ();
  end_site ();
}

static void
test_close_while_a_flush_hangs (void)
{
  hang_flush ();
  nbdm_close (volume);
  kill_server ();
  remove_site ();
}

/* Beside clients' own flushes and FUA, and while remotes come and go. */
static void
test_under_load_loses_nothing (void)
{
  flush_ms = 1;
  in_sync_site (100, 5000);
  start_load ();
  for (unsigned round = 0; round < 6; round++) {
    wait_requests (150);
    kill_server ();
    if (round % 2)
      wait_state (NBDM_OUT_OF_SYNC);
    start_server ();
    connect_remote ();
    resync_to_end ();
  }
  stop_load ();
  wait_flushed ();
  kill_server ();
  wait_state (NBDM_OUT_OF_SYNC);
  assert (status ().dirty_regions == 0);
  assert_images_equal ();
  start_server ();
  connect_remote ();
  end_site ();
}

static const struct engine_test tests[] = {
  TEST (test_old_is_flushed_and_idle_sends_nothing),
  TEST (test_many_are_flushed_at_once),
  TEST (test_lost_remote_misses_only_what_came_since),
  TEST (test_hung_remote_is_found),
  TEST (test_stop_while_a_flush_hangs),
  TEST (test_close_while_a_flush_hangs),
  TEST (test_under_load_loses_nothing),
};

int
main (int argc, char *argv[])
{
  return run_tests (tests, sizeof tests / sizeof tests[0], argc, argv);
}
