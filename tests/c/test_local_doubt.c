/* SPDX-License-Identifier: BSD-3-Clause */

/* A disk that may have lost answered writes is not believed. */

#define _GNU_SOURCE
#include "api.h"
#include "base/lock.h"
#include "volume/backlog.h"
#include "volume/flush.h"
#include "no_room.h"
#include "schedules.h"

/* A flush of local has failed, and its page cache has lost a write.  Local now
 * has a hole there, but neither the copy to a remote nor the answer to a client
 * treats the range as a hole.
 */
static void
hole_of_a_doubted_disk (void)
{
  struct nbdm_extent extent;
  struct job flush = { 0 }, copy = { 0 };

  bring_up (2, 100);
  lose (1);
  assert (write_at (5 * REGION, 7) == 0);
  punch_local (5 * REGION);
  shut_flush_gate (true);
  start (&flush, do_flush);
  wait_for_flush ();
  WAIT_FOR (local_status ().local.errors > 0);
  assert (nbdm_extents (site.volume, REGION, 5 * REGION, &extent, 1) == 1
          && extent.type == NBDM_EXTENT_DATA);
  site_connect (&site, 1);
  start (&copy, do_resync_second);
  /* Give a copy that wrongly sends zeroes time to be answered. */
  poll (NULL, 0, 100);
  shut_flush_gate (false);
  assert (end (&flush) == 0);
  assert (end (&copy) == 0);
  site_resync_to_end (&site, 1);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  assert (read_at (5 * REGION) == 7);
  lose (0);
  assert (read_at (5 * REGION) == 7);
}

/* The second remote was copied from the first, the only one that has the
 * region; then the first alone misses a write of it.  The copy is made again.
 */
static void
source_refuses_after_a_copy (void)
{
  struct job copy = { 0 }, failing = { .offset = 5 * REGION, .value = 8 };

  site.peer.shuffle = true;
  make_volume (SIZE, REGION, 2, 300);
  open_volume ();
  lose (1);
  assert (write_at (5 * REGION, 7) == 0); /* local fails */
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  site_connect (&site, 1);
  peer_hold_flushes (site.peers[1], true);
  start (&copy, do_resync_second);
  WAIT_FOR (site_status (&site, 1).remote.late_regions == 0
            && site_status (&site, 1).remote.answered_bytes > 0
            && site_status (&site, 1).remote.outstanding > 0);
  peer_hold (site.peers[0], PEER_HOLD_ALL);
  start (&failing, do_write);
  WAIT_FOR (site_status (&site, 0).remote.outstanding > 0);
  peer_cut (site.peers[0], false);
  peer_hold (site.peers[0], PEER_GO);
  assert (end (&failing) == -EIO);
  peer_hold_flushes (site.peers[1], false);
  peer_answer_flush (site.peers[1]);
  end (&copy);
  site_connect (&site, 0);
  site_resync_to_end (&site, 1);
  assert (nbdm_flush (site.volume) == 0);
  assert (memcmp (peer_image (site.peers[0]), peer_image (site.peers[1]), SIZE)
          == 0);
}

/* A flush of local has failed, and only the remote has the data that local may
 * have lost: an operator's command must not make this data dirty on the remote
 * before the remote takes local's place.
 */
static void
invalidate_beside_a_doubted_disk (void)
{
  struct job flush = { 0 };

  bring_up (1, 300);
  assert (write_at (5 * REGION, 7) == 0);
  shut_flush_gate (true);
  start (&flush, do_flush);
  wait_for_flush ();
  WAIT_FOR (local_status ().local.errors > 0);
  assert (nbdm_remote_invalidate (site.volume, 1) == -EBUSY);
  shut_flush_gate (false);
  assert (end (&flush) == 0);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  assert (site_status (&site, 0).state == NBDM_IN_SYNC);
  assert (read_at (5 * REGION) == 7);
}

/* Under policy stop no remote takes the place of a disk that was cut: the disk
 * stays in use, and only the remote has the bytes that it lost.
 */
static void
invalidate_beside_a_cut_disk (void)
{
  bring_up (1, 300);
  assert (write_at (200 * REGION, 7) == 0);
  assert (nbdm_flush (site.volume) == 0);
  assert (nbdm_set_policy (site.volume, NBDM_STOP, 0) == 0);
  assert (truncate (site.local, SIZE / 2) == 0);
  assert (read_at (200 * REGION) == 7);
  assert (local_status ().state == NBDM_LOCAL_OK);
  assert (nbdm_remote_invalidate (site.volume, 1) == -EBUSY);
  assert (read_at (200 * REGION) == 7);
}

/* The remote that is to take local's place comes back at another one's address:
 * the regions that the other one missed must not become dirty on it, because
 * local may have lost them.
 */
static void
addresses_beside_a_doubted_disk (void)
{
  struct job flush = { 0 };

  bring_up (2, 1000 * SITE_DEADLINE_S);
  nbdm_disk_drop (site.volume, 2, "for the test");
  assert (write_at (5 * REGION, 7) == 0);
  peer_cut (site.peers[0], false);
  site_wait_state (&site, 0, NBDM_HOLDING);
  start (&flush, do_flush);
  WAIT_FOR (local_status ().local.errors > 0);
  assert (connect_at (0, 1) == -EINVAL);
  site_connect (&site, 0);
  end (&flush);
  assert (site_status (&site, 1).dirty_regions == 1);
}

/* Local misses another region, so it is read region by region.  A flush of it
 * fails during such a read, and its page cache has lost the bytes that are
 * read.
 */
static void
doubt_during_a_read (void)
{
  struct job reader = { .offset = 5 * REGION }, flush = { 0 };
  uint64_t errors;

  bring_up (1, 300);
  assert (write_at (5 * REGION, 7) == 0);
  assert (read_at (200 * REGION) == 0); /* local cannot read it */
  assert (local_status ().state == NBDM_LOCAL_RESYNCING);
  errors = local_status ().local.errors;
  start (&reader, do_read);
  wait_at_gate ();
  punch_local (5 * REGION);
  shut_flush_gate (true);
  start (&flush, do_flush);
  WAIT_FOR (local_status ().local.errors > errors);
  open_gate ();
  assert (!over_soon (&reader) || reader.rc == 7);
  shut_flush_gate (false);
  assert (end (&reader) == 7);
  assert (end (&flush) == 0);
}

/* A flush of local has failed, and its page cache has lost a write: that local
 * differs from a remote is no proof that the remote is another disk.
 */
static void
sample_of_a_doubted_disk (void)
{
  struct job flush = { 0 };

  make_volume (SIZE, REGION, 2, 100);
  site.params.flush_ms = 10;
  open_volume ();
  assert (write_at (5 * REGION, 7) == 0);
  /* Otherwise the takeover makes local miss it, and nothing is compared. */
  assert (nbdm_cool (site.volume, 0) == 0);
  nbdm_disk_drop (site.volume, 2, "for the test");
  punch_local (5 * REGION);
  shut_flush_gate (true);
  start (&flush, do_flush);
  wait_for_flush ();
  WAIT_FOR (local_status ().local.errors > 0);
  assert (connect_at (1, 1) == 0);
  assert (nbdm_remote_compare (site.volume, 2, 9) == 0);
  assert (nbdm_remote_compare (site.volume, 2, 5) == -ENODATA);
  shut_flush_gate (false);
  assert (end (&flush) == 0);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  assert (nbdm_disk_admit (site.volume, 2) == 0);
  assert (site_status (&site, 1).state == NBDM_IN_SYNC);
}

/* The page cache of local has lost a write, and no flush has reported that yet:
 * a read of local, and a copy from it, has the bytes from before the write.
 */
static void
write_and_lose (uint64_t offset)
{
  assert (write_at (offset, 7) == 0);
  punch_local (offset);
}

/* The flush that reports it comes after the copy: the remote is not in sync and
 * does not take local's place, and no client is told that its write is safe.
 */
static void
loss_told_after_a_copy (void)
{
  bring_up (1, 100);
  lose (0);
  write_and_lose (5 * REGION);
  site_connect (&site, 0);
  (void)site_resync (&site, 0, &(struct nbdm_resync){ .max_bytes = SIZE });
  assert (nbdm_flush (site.volume) == -EIO);
  assert (site_status (&site, 0).state != NBDM_IN_SYNC);
}

/* The remote has the write and comes back from a hold: the difference there is
 * no proof that it is another disk.
 */
static void
loss_told_after_a_sample (void)
{
  bring_up (1, 1000 * SITE_DEADLINE_S);
  assert (write_at (5 * REGION, 7) == 0);
  assert (remote_flush_alone (&site.volume->remotes[0]));
  punch_local (5 * REGION);
  peer_cut (site.peers[0], false);
  site_wait_state (&site, 0, NBDM_HOLDING);
  assert (connect_at (0, 0) == 0);
  assert (nbdm_remote_compare (site.volume, 1, 5) == -ENODATA);
  assert (nbdm_disk_admit (site.volume, 1) == 0);
  assert (nbdm_flush (site.volume) == 0);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  assert (read_at (5 * REGION) == 7);
}

/* The connection is lost, and the sample of the next one finds that local has
 * lost a write: no remote is in sync then.
 */
static void
lose_before_a_sample (void)
{
  write_and_lose (5 * REGION);
  assert (remote_flush_alone (&site.volume->remotes[0]));
  peer_cut (site.peers[0], false);
  site_wait_state (&site, 0, NBDM_HOLDING);
  assert (connect_at (0, 0) == 0);
  assert (nbdm_remote_compare (site.volume, 1, 5) == -ENODATA);
}

/* The remote is in sync once it is admitted: it takes local's place at once,
 * and not when a client flushes.
 */
static void
loss_told_before_an_admission (void)
{
  bring_up (1, 1000 * SITE_DEADLINE_S);
  lose_before_a_sample ();
  assert (nbdm_disk_admit (site.volume, 1) == 0);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  assert (read_at (5 * REGION) == 7);
}

/* The server is killed before a remote takes local's place, and has no room for
 * a note: the next start does not count the remote, which has other bytes, as
 * in sync.
 */
static void
loss_told_before_a_kill_without_room (void)
{
  bring_up (1, 1000 * SITE_DEADLINE_S);
  assert (nbdm_flush (site.volume) == 0);
  no_room = true;
  lose_before_a_sample ();
  nbdm_close (site.volume);
  site_open (&site);
  site_connect (&site, 0);
  site_resync_to_end (&site, 0);
  assert (read_at (5 * REGION) == 0);
  assert (memcmp (site.image, peer_image (site.peers[0]), SIZE) == 0);
}

/* Once a remote has taken local's place, a start after a kill takes the page
 * cache for exact again.
 */
static void
loss_without_room_is_over (void)
{
  const struct nbdm *v;

  bring_up (1, 300);
  no_room = true;
  write_and_lose (5 * REGION);
  assert (nbdm_flush (site.volume) == 0);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  v = site.volume;
  assert (memcmp (v->sb.boot_id, v->boot_id, sizeof v->boot_id) == 0);
}

/* A client writes a part of the lost sector: the rest of it, which local has in
 * its old state, is not sent to the remote.
 */
static int
do_write_a_part (struct job *job)
{
  (void)job;
  return nbdm_pwrite (site.volume, "\10", 1, 5 * REGION + 9, 0);
}

static void
assert_rest_is_there (void)
{
  uint8_t found[SECTOR];

  assert (nbdm_flush (site.volume) == 0);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  assert (nbdm_pread (site.volume, found, sizeof found, 5 * REGION) == 0);
  for (unsigned i = 0; i < sizeof found; i++)
    assert (found[i] == (i == 9 ? 8 : 7));
}

static void
loss_told_by_a_part_of_a_sector (void)
{
  bring_up (1, 300);
  write_and_lose (5 * REGION);
  assert (do_write_a_part (NULL) == 0);
  assert_rest_is_there ();
}

/* The same while local is copied back. */
static void
part_of_a_sector_beside_a_copy_back (void)
{
  bring_up (1, 300);
  assert (read_at (200 * REGION) == 0); /* local cannot read it */
  assert (local_status ().state == NBDM_LOCAL_RESYNCING);
  write_and_lose (5 * REGION);
  assert (do_write_a_part (NULL) == 0);
  assert_rest_is_there ();
}

/* The remote is on hold, and gets the sector once it is back. */
static void
part_of_a_sector_beside_a_hold (void)
{
  struct job part = { 0 };

  bring_up (1, 1000 * SITE_DEADLINE_S);
  assert (write_at (5 * REGION, 7) == 0);
  assert (remote_flush_alone (&site.volume->remotes[0]));
  punch_local (5 * REGION);
  peer_cut (site.peers[0], false);
  site_wait_state (&site, 0, NBDM_HOLDING);
  start (&part, do_write_a_part);
  assert (!over_soon (&part));
  site_connect (&site, 0);
  assert (end (&part) == 0);
  assert_rest_is_there ();
}

/* Local fails for another reason while it is flushed. */
static void
part_of_a_sector_beside_a_failure (void)
{
  struct job part = { 0 };

  bring_up (1, 300);
  write_and_lose (5 * REGION);
  start (&part, do_write_a_part);
  wait_at_gate ();
  assert (write_at (200 * REGION, 1) == 0);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  open_gate ();
  assert (end (&part) == 0);
  assert_rest_is_there ();
}

static int
do_write_a_region (struct job *job)
{
  static const uint8_t zeroes[REGION];

  return nbdm_pwrite (site.volume, zeroes, REGION, job->offset, 0);
}

static bool
is_full (const struct remote *r)
{
  LOCK_FOR_SCOPE (&site.volume->lock);
  return backlog_room_locked (r, BACKLOG_DATA, SECTOR, false) == 0;
}

/* As much is unflushed on the remote as may be: it gets the sector later. */
static void
part_of_a_sector_without_room (void)
{
  struct job part = { 0 }, first = { .offset = 20 * REGION };
  struct job second = { .offset = 21 * REGION };
  struct remote *r;

  bring_up (1, 300);
  r = &site.volume->remotes[0];
  write_and_lose (5 * REGION);
  pthread_mutex_lock (&site.volume->lock); /* its flusher looks at the bound */
  r->backlog.bound.bytes[BACKLOG_DATA] = REGION; /* it flushes slowly */
  pthread_mutex_unlock (&site.volume->lock);
  shut_flush_gate (true);
  start (&first, do_write_a_region);
  wait_for_flush ();
  start (&second, do_write_a_region);
  WAIT_FOR (is_full (r));
  start (&part, do_write_a_part);
  assert (!over_soon (&part));
  shut_flush_gate (false);
  assert (end (&part) == 0 && end (&first) == 0 && end (&second) == 0);
  assert_rest_is_there ();
}

/* Another remote has the write and takes local's place.  The one that was
 * copied to is copied to again.
 */
static void
loss_told_after_a_copy_of_two (void)
{
  bring_up (2, 100);
  lose (1);
  write_and_lose (5 * REGION);
  site_connect (&site, 1);
  (void)site_resync (&site, 1, &(struct nbdm_resync){ .max_bytes = SIZE });
  assert (nbdm_flush (site.volume) == 0);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  site_resync_to_end (&site, 1);
  lose (0);
  assert (read_at (5 * REGION) == 7);
}

/* The same while the copy is under way. */
static void
loss_told_beside_a_copy (void)
{
  struct job copy = { 0 };

  bring_up (2, 100);
  lose (1);
  write_and_lose (5 * REGION);
  site_connect (&site, 1);
  start (&copy, do_resync_second);
  wait_at_gate ();
  assert (nbdm_flush (site.volume) == 0);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  open_gate ();
  end (&copy);
  site_resync_to_end (&site, 1);
  lose (0);
  assert (read_at (5 * REGION) == 7);
}

/* A local disk that can neither write nor read a region is no source of it, so
 * the remote stays the source.  Under policy stop no remote takes local's
 * place, but no answered write is lost, and after a switch of the policy the
 * remote takes it.
 */
static void
dead_disk_leaves_the_remote_well (void)
{
  bring_up (1, 300);
  assert (nbdm_set_policy (site.volume, NBDM_STOP, 0) == 0);
  assert (write_at (5 * REGION, 7) == 0);
  assert (write_at (5 * REGION + SECTOR, 8) == -EIO);
  assert (read_at (5 * REGION) == 7);
  assert (nbdm_set_policy (site.volume, NBDM_DEGRADE, 0) == 0);
  assert (write_at (9 * REGION, 9) == 0);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  assert (read_at (5 * REGION) == 7 && read_at (9 * REGION) == 9);
}

/* The same with a local disk that was cut. */
static void
cut_disk_leaves_the_remote_well (void)
{
  bring_up (1, 300);
  assert (nbdm_set_policy (site.volume, NBDM_STOP, 0) == 0);
  assert (write_at (200 * REGION, 7) == 0);
  assert (nbdm_flush (site.volume) == 0);
  assert (truncate (site.local, SIZE / 2) == 0);
  assert (read_at (200 * REGION) == 7); /* finds the cut */
  assert (write_at (200 * REGION + SECTOR, 8) == -EIO);
  assert (read_at (200 * REGION) == 7);
  assert (nbdm_set_policy (site.volume, NBDM_DEGRADE, 0) == 0);
  assert (write_at (9 * REGION, 9) == 0);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  assert (read_at (200 * REGION) == 7 && read_at (9 * REGION) == 9);
}

/* A file system in user space may answer with any error, and also with the one
 * by which the engine says that it no longer waits for the disk.
 */
static void
flush_with_an_odd_error (void)
{
  bring_up (1, 300);
  write_and_lose (5 * REGION);
  assert (nbdm_flush (site.volume) == 0);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  assert (read_at (5 * REGION) == 7);
}

static const struct schedule schedules[] = {
  { "cut_disk_leaves_the_remote_well", NULL, cut_disk_leaves_the_remote_well },
  { "dead_disk_leaves_the_remote_well",
    "local_write:2=error,local_write:3=error,local_read=error",
    dead_disk_leaves_the_remote_well },
  { "loss_told_beside_a_copy",
    "local_flush:2=error,resync_answered:3=wait:gate",
    loss_told_beside_a_copy },
  { "loss_told_after_a_sample", "local_flush:2=error",
    loss_told_after_a_sample },
  { "loss_told_before_an_admission", "local_flush:2=error",
    loss_told_before_an_admission },
  { "loss_told_before_a_kill_without_room", "local_flush:3=error",
    loss_told_before_a_kill_without_room },
  { "loss_without_room_is_over", "local_flush:2=error",
    loss_without_room_is_over },
  { "loss_told_by_a_part_of_a_sector", "local_flush:2=error",
    loss_told_by_a_part_of_a_sector },
  { "part_of_a_sector_beside_a_copy_back",
    "local_read:1=error,local_read:2=error,local_flush:2=error",
    part_of_a_sector_beside_a_copy_back },
  { "part_of_a_sector_beside_a_hold", "local_flush:2=error",
    part_of_a_sector_beside_a_hold },
  { "part_of_a_sector_beside_a_failure",
    "local_flush:2=wait:gate,local_write:2=error",
    part_of_a_sector_beside_a_failure },
  { "part_of_a_sector_without_room", "local_flush:2=error",
    part_of_a_sector_without_room },
  { "flush_with_an_odd_error", "local_flush:2=error:ECANCELED",
    flush_with_an_odd_error },
  { "loss_told_after_a_copy", "local_flush:2=error", loss_told_after_a_copy },
  { "loss_told_after_a_copy_of_two", "local_flush:2=error",
    loss_told_after_a_copy_of_two },
  { "doubt_during_a_read",
    "local_read:1=error,local_read:2=error,local_read:3=wait:gate,"
    "local_flush:2=error",
    doubt_during_a_read },
  { "invalidate_beside_a_doubted_disk", "local_flush:2=error",
    invalidate_beside_a_doubted_disk },
  { "invalidate_beside_a_cut_disk", NULL, invalidate_beside_a_cut_disk },
  { "addresses_beside_a_doubted_disk", "local_flush:2=error",
    addresses_beside_a_doubted_disk },
  { "hole_of_a_doubted_disk", "local_flush:2=error", hole_of_a_doubted_disk },
  { "source_refuses_after_a_copy", "local_write:1=error",
    source_refuses_after_a_copy },
  { "sample_of_a_doubted_disk", "local_flush:3=error",
    sample_of_a_doubted_disk },
};

int
main (int argc, char *argv[])
{
  return run_schedules (schedules, sizeof schedules / sizeof schedules[0], argc,
                        argv);
}
