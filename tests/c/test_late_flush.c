/* SPDX-License-Identifier: BSD-3-Clause */

/* Policy stop, and a remote that loses its cache while a write is under way: a
 * client's flush waits until what was answered and lost is copied again, and
 * not for regions that are only late.
 */

#include "api.h"
#include "schedules.h"

static int
do_resync_first (struct job *job)
{
  struct nbdm_resync batch = { .max_bytes = 64u << 20, .pace.depth = 4 };
  int rc = 0;

  while (rc == 0 && site_status (&site, 0).state == NBDM_RESYNCING
         && site_status (&site, 0).dirty_regions
                > site_status (&site, 0).remote.late_regions) {
    rc = nbdm_disk_resync (site.volume, 1, &batch);
    batch.first_region = batch.next_region;
  }
  (void)job;
  return rc;
}

/* An answered write and one under way are in one region when the server loses
 * its cache. The second is sent again, the first is not: no flush is answered
 * before that region has been copied, though it is late.
 */
static void
lost_in_a_late_region (void)
{
  struct job second = { .offset = SECTOR, .value = 2 }, flush = { 0 };
  struct job copy = { 0 };

  bring_up (1, 10000);
  assert (nbdm_set_policy (site.volume, NBDM_STOP, 0) == 0);
  assert (write_at (0, 1) == 0);
  peer_hold (site.peers[0], PEER_HOLD_ALL);
  start (&second, do_write);
  WAIT_FOR (site_status (&site, 0).remote.outstanding > 0);
  peer_lose_power (site.peers[0], PEER_LOSE_ALL);
  peer_hold (site.peers[0], PEER_GO);
  site_connect (&site, 0);
  assert (end (&second) == 0);
  assert (site_status (&site, 0).dirty_regions == 1);
  start (&flush, do_flush);
  /* No state shows that the flush waits: give a wrong one time to be answered.
   */
  poll (NULL, 0, 100);
  assert (!flush.over);
  /* The region is late to the end. */
  start (&copy, do_resync_first);
  assert (end (&flush) == 0);
  assert (end (&copy) == 0);
  assert (peer_image (site.peers[0])[0] == 1
          && peer_image (site.peers[0])[SECTOR] == 2);
  /* The dead connection's write may still come: the region is copied a second
   * time.
   */
  assert (site_status (&site, 0).remote.late_regions == 1
          && site_status (&site, 0).dirty_regions == 1);
  peer_image (site.peers[0])[SECTOR] = 9;
  site_resync_to_end (&site, 0);
  assert (peer_image (site.peers[0])[SECTOR] == 2);
}

/* The region is late and nothing in it is lost: a flush waits for nothing. */
static void
late_alone_holds_no_flush (void)
{
  struct job second = { .offset = SECTOR, .value = 2 };

  bring_up (1, 10000);
  assert (nbdm_set_policy (site.volume, NBDM_STOP, 0) == 0);
  peer_hold (site.peers[0], PEER_HOLD_ALL);
  start (&second, do_write);
  WAIT_FOR (site_status (&site, 0).remote.outstanding > 0);
  peer_lose_power (site.peers[0], PEER_LOSE_ALL);
  peer_hold (site.peers[0], PEER_GO);
  site_connect (&site, 0);
  assert (end (&second) == 0);
  assert (site_status (&site, 0).remote.late_regions == 1);
  assert (nbdm_flush (site.volume) == 0);
  assert (site_status (&site, 0).dirty_regions == 1);
}

/* The server knows no FUA, and loses its cache over the flush that stands for
 * it: the write is sent again on the next connection.
 */
static void
fua_is_sent_again (void)
{
  struct job job = { .offset = 5 * REGION, .value = 7 };

  site.peer.no_fua = true;
  bring_up (1, 1000 * SITE_DEADLINE_S);
  assert (nbdm_set_policy (site.volume, NBDM_STOP, 0) == 0);
  start (&job, do_write_fua);
  wait_at_gate ();
  peer_lose_power (site.peers[0], PEER_LOSE_ALL);
  site_wait_state (&site, 0, NBDM_HOLDING);
  open_gate ();
  site_connect (&site, 0);
  assert (end (&job) == 0);
  peer_lose_power (site.peers[0], PEER_LOSE_ALL);
  assert (peer_image (site.peers[0])[5 * REGION] == 7);
}

static const struct schedule schedules[] = {
  { "lost_in_a_late_region", NULL, lost_in_a_late_region },
  { "late_alone_holds_no_flush", NULL, late_alone_holds_no_flush },
  { "fua_is_sent_again", "flush_answered:3=wait:gate", fua_is_sent_again },
};

int
main (int argc, char *argv[])
{
  return run_schedules (schedules, sizeof schedules / sizeof schedules[0], argc,
                        argv);
}
