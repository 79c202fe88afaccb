/* SPDX-License-Identifier: BSD-3-Clause */

/* A remote is about to take local's place, and is lost during the flush that is
 * to make it the only source. It may have lost answered writes, or a command to
 * it may still come late, or it may have the only copy that can be read: so the
 * dirty bits of local and the remote must be exact afterwards.
 */

#define _GNU_SOURCE
#include "api.h"
#include "schedules.h"

#include <poll.h>

static uint32_t
local_state (void)
{
  return local_status ().state;
}

static void
wait_outstanding (uint32_t remote, uint32_t nr)
{
  time_t until = time (NULL) + SITE_DEADLINE_S;

  while (site_status (&site, remote).remote.outstanding < nr) {
    assert (time (NULL) < until);
    poll (NULL, 0, 1);
  }
}

/* --- the schedules ----------------------------------------------------- */

/* Lose the only remote during its flush; the request waits until `open_gate`.
 */
static void
lose_over_the_flush (enum nbdm_remote_state state)
{
  wait_at_gate ();
  peer_cut (site.peers[0], false);
  site_wait_state (&site, 0, state);
}

/* Copy what may be copied now: not what is late. */
static void
resync_what_is_not_late (void)
{
  struct nbdm_resync batch = { .max_bytes = 64u << 20, .pace.depth = 4 };
  struct nbdm_disk_status s = site_status (&site, 0);

  for (; s.state == NBDM_RESYNCING && s.dirty_regions > s.remote.late_regions;
       s = site_status (&site, 0)) {
    assert (nbdm_disk_resync (site.volume, 1, &batch) == 0);
    batch.first_region = batch.next_region;
  }
}

/* A write is sent and not answered when the connection is lost, and sent again
 * on the next: the first one may still be carried out.
 */
static void
late_write_stays_late (void)
{
  struct job failing = { .offset = 40 * REGION, .value = 1 };
  struct job second = { .offset = 7 * REGION, .value = 2 };

  site.peer.shuffle = true; /* or nothing is kept that comes late */
  bring_up (1, 1000 * SITE_DEADLINE_S);
  start (&failing, do_write);
  wait_at_gate ();
  peer_hold (site.peers[0], PEER_HOLD_ALL);
  start (&second, do_write);
  wait_outstanding (0, 1);
  open_gate (); /* the takeover's flush is held as well */
  wait_outstanding (0, 2);
  peer_cut (site.peers[0], true);
  peer_hold (site.peers[0], PEER_GO);
  site_connect (&site, 0);
  assert (end (&failing) == -EIO && end (&second) == 0);
  assert (write_at (7 * REGION, 3) == 0);
  resync_what_is_not_late ();
  assert (peer_apply_late (site.peers[0]) > 0);
  site_resync_to_end (&site, 0);
  assert (peer_image (site.peers[0])[7 * REGION] == 3);
  assert (memcmp (peer_image (site.peers[0]), site.image, SIZE) == 0);
}

/* Local has a bad sector, and the remote has the only copy of it. */
static void
bad_sector_keeps_its_copy (void)
{
  struct job reader = { .offset = 5 * REGION };

  bring_up (1, 1000 * SITE_DEADLINE_S);
  assert (write_at (5 * REGION, 7) == 0);
  assert (nbdm_flush (site.volume) == 0);
  start (&reader, do_read);
  lose_over_the_flush (NBDM_HOLDING);
  open_gate ();
  site_connect (&site, 0);
  assert (end (&reader) == 7);
  assert (site_status (&site, 0).state == NBDM_IN_SYNC);
  assert (read_at (5 * REGION) == 7);
}

static int
do_look (struct job *job)
{
  (void)job;
  return nbdm_cool (site.volume, 60000);
}

/* Local has lost bytes, and the remote alone has any: at the next look at
 * local's size it takes local's place.
 */
static void
cut_disk_leaves_the_remote_well (void)
{
  struct job look = { 0 };

  bring_up (1, 1000 * SITE_DEADLINE_S);
  assert (write_at (5 * REGION, 7) == 0);
  assert (nbdm_flush (site.volume) == 0);
  assert (truncate (site.local, SIZE / 2) == 0);
  start (&look, do_look);
  lose_over_the_flush (NBDM_HOLDING);
  open_gate ();
  site_connect (&site, 0);
  assert (end (&look) == 0 && local_state () == NBDM_LOCAL_OK);
  assert (nbdm_cool (site.volume, 60000) == 0);
  assert (local_state () == NBDM_LOCAL_FAILED && read_at (5 * REGION) == 7);
}

/* Local is being mended, and has all but one region.  It is the source of them
 * for as long as no remote has taken its place.
 */
static void
mended_disk_keeps_what_it_has (void)
{
  struct job failing = { .offset = 40 * REGION, .value = 1 };

  bring_up (1, 100);
  assert (write_at (5 * REGION, 7) == 0 && write_at (9 * REGION, 9) == 0);
  assert (nbdm_flush (site.volume) == 0);
  assert (read_at (9 * REGION) == 9);
  assert (local_state () == NBDM_LOCAL_RESYNCING);
  start (&failing, do_write);
  lose_over_the_flush (NBDM_OUT_OF_SYNC);
  open_gate ();
  assert (end (&failing) == -EIO);
  assert (local_state () == NBDM_LOCAL_RESYNCING);
  assert (read_at (5 * REGION) == 7 && read_at (9 * REGION) == -EIO);
  assert (write_at (5 * REGION, 8) == 0 && read_at (5 * REGION) == 8);
  site_connect (&site, 0);
  assert (read_at (9 * REGION) == 9);
}

/* The first remote misses a region, and the takeover's flush of it takes long;
 * the second remote is lost during that flush.
 */
static void
begin_a_long_takeover (struct job *failing)
{
  nbdm_disk_drop (site.volume, 1, "for the test");
  assert (write_at (5 * REGION, 7) == 0);
  site_connect (&site, 0);
  assert (site_status (&site, 0).state == NBDM_RESYNCING);
  start (failing, do_write);
  wait_at_gate ();
  shut_flush_gate (true);
  peer_hold (site.peers[1], PEER_HOLD_ALL);
  open_gate ();
  wait_for_flush ();
  wait_outstanding (1, 1);
  peer_lose_power (site.peers[1], PEER_LOSE_ALL);
  peer_hold (site.peers[1], PEER_GO);
}

static void
end_a_long_takeover (struct job *failing)
{
  shut_flush_gate (false);
  assert (end (failing) == -EIO);
  assert (local_state () == NBDM_LOCAL_OK);
}

static void
assert_all_equal (void)
{
  for (uint32_t i = 0; i < site.nr_peers; i++) {
    site_resync_to_end (&site, i);
    assert (memcmp (peer_image (site.peers[i]), site.image, SIZE) == 0);
  }
}

/* The second remote is back and has lost what it answered: no read goes to it.
 */
static void
successor_that_lost_its_cache (void)
{
  struct job failing = { .offset = 40 * REGION, .value = 1 };
  struct job reader = { .offset = 5 * REGION };

  bring_up (2, 1000 * SITE_DEADLINE_S);
  begin_a_long_takeover (&failing);
  site_wait_state (&site, 1, NBDM_HOLDING);
  site_connect (&site, 1);
  start (&reader, do_read);
  for (unsigned i = 0; i < 300 && !reader.over; i++)
    poll (NULL, 0, 1);
  end_a_long_takeover (&failing);
  assert (end (&reader) == 7);
  assert_all_equal ();
}

/* The second remote stays away: reads and writes wait for the end of the
 * takeover, and then local has all of it.
 */
static void
successor_that_stays_away (void)
{
  struct job failing = { .offset = 40 * REGION, .value = 1 };
  struct job reader = { .offset = 5 * REGION };
  struct job writer = { .offset = 5 * REGION + SECTOR, .value = 8 };

  bring_up (2, 100);
  begin_a_long_takeover (&failing);
  site_wait_state (&site, 1, NBDM_OUT_OF_SYNC);
  start (&reader, do_read);
  start (&writer, do_write);
  for (unsigned i = 0; i < 300 && !(reader.over && writer.over); i++)
    poll (NULL, 0, 1);
  end_a_long_takeover (&failing);
  assert (end (&reader) == 7);
  assert (end (&writer) == 0);
  site_connect (&site, 1);
  assert_all_equal ();
}

/* No request waits for the commands of the remote's lost connection: local goes
 * on at once, not when the remote's hold is over.
 */
static void
takeover_waits_for_no_hold (void)
{
  struct job failing = { .offset = 40 * REGION, .value = 1 };

  bring_up (1, 1000 * SITE_DEADLINE_S * 2);
  assert (write_at (5 * REGION, 7) == 0);
  start (&failing, do_write);
  lose_over_the_flush (NBDM_HOLDING);
  open_gate ();
  assert (end (&failing) == -EIO);
  assert (site_status (&site, 0).state == NBDM_HOLDING);
  assert (local_state () == NBDM_LOCAL_OK && read_at (5 * REGION) == 7);
  site_connect (&site, 0);
  assert_all_equal ();
}

/* The remote has taken local's place, and is lost over the flush of a write
 * that it was sent before that was known; it is back within its hold.
 */
static void
write_is_sent_again (void)
{
  struct job failing = { .offset = 40 * REGION, .value = 1 };

  bring_up (1, 1000 * SITE_DEADLINE_S);
  start (&failing, do_write);
  wait_at_gate ();
  assert (local_state () == NBDM_LOCAL_FAILED);
  peer_lose_power (site.peers[0], PEER_LOSE_ALL);
  site_wait_state (&site, 0, NBDM_HOLDING);
  open_gate ();
  site_connect (&site, 0);
  assert (end (&failing) == 0);
  assert (site_status (&site, 0).state == NBDM_IN_SYNC);
  peer_lose_power (site.peers[0], PEER_LOSE_ALL);
  assert (peer_image (site.peers[0])[40 * REGION] == 1);
}

/* Local fails again while a remote flushes a write, and that remote is lost.
 * Only local has the write, but the takeover marks it as missing on local while
 * the other remote flushes.
 */
static void
write_of_a_mended_disk (void)
{
  struct job writer = { .offset = 5 * REGION, .value = 7 };
  struct job failing = { .offset = 40 * REGION, .value = 1 };

  bring_up (2, 100);
  nbdm_disk_drop (site.volume, 1, "for the test");
  start (&writer, do_write);
  wait_at_gate ();
  assert (read_at (9 * REGION) == 0);
  assert (local_state () == NBDM_LOCAL_RESYNCING);
  site_connect (&site, 0);
  start (&failing, do_write);
  wait_at ("failing");
  shut_flush_gate (true);
  peer_hold (site.peers[1], PEER_HOLD_ALL);
  open_gate ();
  wait_outstanding (1, 1); /* the writer's flush */
  open_at ("failing");
  wait_for_flush ();
  peer_cut (site.peers[1], false);
  peer_hold (site.peers[1], PEER_GO);
  site_wait_state (&site, 1, NBDM_OUT_OF_SYNC);
  for (unsigned i = 0; i < 300 && !writer.over; i++)
    poll (NULL, 0, 1);
  shut_flush_gate (false);
  assert (end (&failing) == -EIO);
  assert (end (&writer) == 0);
  assert (read_at (5 * REGION) == 7);
}

/* The first remote alone has a region beside local, and loses it with its
 * cache. During the takeover the region is copied to the second one, which then
 * takes local's place.
 */
static void
copied_to_is_no_successor (void)
{
  struct job copy = { 0 }, failing = { .offset = 40 * REGION, .value = 1 };

  bring_up (3, 1000 * SITE_DEADLINE_S);
  nbdm_disk_drop (site.volume, 2, "for the test");
  nbdm_disk_drop (site.volume, 3, "for the test");
  assert (write_at (5 * REGION, 7) == 0);
  site_connect (&site, 1);
  site_connect (&site, 2);
  start (&copy, do_resync_second);
  wait_at ("copy");
  start (&failing, do_write);
  wait_at_gate ();
  peer_hold (site.peers[0], PEER_HOLD_ALL);
  peer_hold (site.peers[2], PEER_HOLD_ALL);
  open_gate ();
  wait_outstanding (0, 1);
  wait_outstanding (2, 1);
  peer_lose_power (site.peers[0], PEER_LOSE_ALL);
  peer_hold (site.peers[0], PEER_GO);
  site_wait_state (&site, 0, NBDM_HOLDING);
  open_at ("copy");
  WAIT_FOR (site_status (&site, 1).remote.answered_bytes > 0);
  peer_hold (site.peers[2], PEER_GO);
  assert (end (&failing) == -EIO);
  assert (local_state () == NBDM_LOCAL_OK);
  end (&copy);
  site_connect (&site, 0);
  for (uint32_t i = 0; i < site.nr_peers; i++) {
    site_resync_to_end (&site, i);
    assert (memcmp (site.image, peer_image (site.peers[i]), SIZE) == 0);
  }
  assert (read_at (5 * REGION) == 7);
}

static void
fill_local (uint8_t value)
{
  static uint8_t buf[SIZE];
  int fd = open (site.local, O_WRONLY | O_CLOEXEC);

  memset (buf, value, sizeof buf);
  assert (pwrite (fd, buf, sizeof buf, 0) == (ssize_t)sizeof buf);
  close (fd);
}

/* A flush of local has failed and a remote has taken its place.  A request that
 * both had refused before is answered after that: its client gets an error, and
 * the volume goes on once the remote is back.
 */
static void
request_that_both_refuse (void)
{
  struct job zero = { .offset = 7 * REGION };

  site.peer.refuse_zeroes = ENOSPC;
  make_volume (SIZE, REGION, 1, 300);
  fill_local (7); /* a copy of zeroes is refused */
  open_volume ();
  start (&zero, do_zero);
  wait_at_gate ();
  assert (nbdm_flush (site.volume) == 0);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  open_gate ();
  assert (end (&zero) < 0);
  assert (!volume_status ().failed);
  site_connect (&site, 0);
  assert (write_at (7 * REGION, 3) == 0 && read_at (7 * REGION) == 3);
  assert (nbdm_flush (site.volume) == 0);
}

/* The other way round: the request that both refuse is answered between the
 * failed flush and the takeover.  It must not put out of sync the only remote
 * that can take local's place.
 */
static void
refused_beside_a_failed_flush (void)
{
  struct job flush = { 0 }, zero = { .offset = 7 * REGION };

  site.peer.refuse_zeroes = ENOSPC;
  site.peer.shuffle = true;
  make_volume (SIZE, REGION, 1, 300);
  fill_local (7);
  open_volume ();
  peer_hold_flushes (site.peers[0], true);
  start (&flush, do_flush);
  WAIT_FOR (local_status ().local.errors > 0);
  start (&zero, do_zero);
  for (unsigned i = 0; i < 300 && !zero.over; i++)
    poll (NULL, 0, 1);
  peer_hold_flushes (site.peers[0], false);
  peer_answer_flush (site.peers[0]);
  assert (end (&zero) < 0);
  end (&flush);
  assert (!volume_status ().failed && local_state () == NBDM_LOCAL_FAILED);
}

static const struct schedule schedules[] = {
  { "refused_beside_a_failed_flush", "local_write:1=error,local_flush:2=error",
    refused_beside_a_failed_flush },
  { "request_that_both_refuse",
    "local_write:1=error,after_local:1=wait:gate,local_flush:2=error",
    request_that_both_refuse },
  { "write_of_a_mended_disk",
    "local_read:1=error,local_read:2=error,local_write:2=error,"
    "after_remote:2=wait:failing,after_remote:1=wait:gate",
    write_of_a_mended_disk },
  { "copied_to_is_no_successor",
    "resync_after_read:1=wait:copy,local_write:2=error,"
    "after_remote:2=wait:gate",
    copied_to_is_no_successor },
  { "late_write_stays_late", "local_write:1=error,after_remote:1=wait:gate",
    late_write_stays_late },
  { "bad_sector_keeps_its_copy",
    "local_read:1=error,local_read:2=error,local_read:3=error,"
    "local_read:4=error,flush_answered:4=wait:gate",
    bad_sector_keeps_its_copy },
  { "cut_disk_leaves_the_remote_well", "flush_answered:4=wait:gate",
    cut_disk_leaves_the_remote_well },
  { "mended_disk_keeps_what_it_has",
    "local_read:1=error,local_read:2=error,local_write:3=error,"
    "flush_answered:5=wait:gate",
    mended_disk_keeps_what_it_has },
  { "successor_that_lost_its_cache",
    "local_write:2=error,after_remote:2=wait:gate",
    successor_that_lost_its_cache },
  { "successor_that_stays_away", "local_write:2=error,after_remote:2=wait:gate",
    successor_that_stays_away },
  { "takeover_waits_for_no_hold",
    "local_write:2=error,flush_answered:3=wait:gate",
    takeover_waits_for_no_hold },
  { "write_is_sent_again", "local_write:1=error,flush_answered:4=wait:gate",
    write_is_sent_again },
};

int
main (int argc, char *argv[])
{
  return run_schedules (schedules, sizeof schedules / sizeof schedules[0], argc,
                        argv);
}
