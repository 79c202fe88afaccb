/* SPDX-License-Identifier: BSD-3-Clause */

/* The local disk fails while there are two remotes, or one that fails as well:
 * the schedules in which the only copy of something could be lost.
 */

#include "api.h"
#include "volume/volume.h"
#include "nbd_peer.h"
#include "schedules.h"

#define SMALL_REGION 4096u
#define EXTENT (4u << 20) /* bytes an activity extent stands for */
#define SMALL_SIZE (2 * EXTENT + 3 * 512u)

/* Not a whole number of regions. */
static void
bring_up_small (uint32_t nr_peers, uint32_t hold_ms)
{
  make_volume (SMALL_SIZE, SMALL_REGION, nr_peers, hold_ms);
  open_volume ();
}

static int
write_fua (uint64_t offset, uint8_t value)
{
  uint8_t buf[SECTOR];

  memset (buf, value, sizeof buf);
  return nbdm_pwrite (site.volume, buf, sizeof buf, offset, NBDM_FUA);
}

static void
copy_back (void)
{
  time_t until = time (NULL) + SITE_DEADLINE_S;
  struct nbdm_resync batch = { .max_bytes = 1u << 20 };

  while (local_status ().state == NBDM_LOCAL_RESYNCING) {
    assert (nbdm_disk_resync (site.volume, NBDM_LOCAL, &batch) == 0);
    assert (time (NULL) < until);
    batch.first_region = batch.next_region;
  }
  assert (local_status ().state == NBDM_LOCAL_OK);
}

/* The kernel could not write a page of local, and has dropped it. */
static void
drop_page (uint64_t offset)
{
  const uint8_t old[SECTOR] = { 0 };
  int fd = open (site.local, O_WRONLY | O_CLOEXEC);

  assert (fd >= 0
          && pwrite (fd, old, sizeof old, (off_t)offset)
                 == (ssize_t)sizeof old);
  close (fd);
}

static void
end_equal (void)
{
  assert (nbdm_stop (site.volume) == 0);
  for (uint32_t i = 0; i < site.nr_peers; i++)
    assert (memcmp (site.image, peer_image (site.peers[i]), SMALL_SIZE) == 0);
}

/* --- the schedules ----------------------------------------------------- */

/* Local fails under a request that came in the middle of the takeover, in an
 * extent that was cold when it began: local misses that too.
 */
static void
write_in_a_takeover (void)
{
  struct job first = { .offset = 0, .value = 1 };
  struct job second = { .offset = EXTENT, .value = 2 };

  bring_up_small (1, 1000);
  shut_flush_gate (true);
  start (&first, do_write);
  wait_for_flush ();
  start (&second, do_write);
  WAIT_FOR (local_status ().local.errors >= 2);
  shut_flush_gate (false);
  assert (end (&first) == 0 && end (&second) == 0);
  assert (read_at (EXTENT) == 2);
  attach_and_admit ();
  assert (read_at (EXTENT) == 2);
  copy_back ();
  assert (read_at (EXTENT) == 2);
  end_equal ();
}

/* The remote that takes over crashes during its flush, and is back within the
 * hold: it has lost the writes it answered, even if a flush on the new
 * connection succeeds.
 */
static void
successor_crashes_in_a_takeover (void)
{
  struct job failing = { .offset = SMALL_REGION, .value = 2 };

  bring_up_small (1, 60000);
  assert (write_at (0, 1) == 0); /* in the server's cache */
  start (&failing, do_write);
  wait_at_gate ();
  peer_hold (site.peers[0], PEER_HOLD_ALL);
  open_gate ();
  WAIT_FOR (site_status (&site, 0).remote.outstanding > 0);
  peer_lose_power (site.peers[0], PEER_LOSE_ALL);
  peer_hold (site.peers[0], PEER_GO);
  site_connect (&site, 0);
  assert (end (&failing) == -EIO);
  assert (read_at (0) == 1);
  assert (local_status ().state == NBDM_LOCAL_OK);
  site_resync_to_end (&site, 0);
  assert (read_at (0) == 1);
  end_equal ();
}

/* The second remote serves after the first is lost: then it may be the only
 * disk that has the writes it answered before the takeover, so the takeover
 * makes them durable on it too.
 */
static void
second_remote_crashes (void)
{
  bring_up_small (2, 60000);
  assert (write_at (0, 1) == 0); /* in both servers' caches */
  assert (write_fua (SMALL_REGION, 2) == 0);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  nbdm_disk_drop (site.volume, 1, "the test said so");
  assert (write_at (SECTOR, 3) == 0); /* the second one alone */
  peer_lose_power (site.peers[1], PEER_LOSE_ALL);
  site_connect (&site, 1);
  assert (read_at (0) == 1);
  assert (read_at (SECTOR) == 3);
  site_connect (&site, 0);
  site_resync_to_end (&site, 0);
  attach_and_admit ();
  copy_back ();
  assert (read_at (0) == 1);
  end_equal ();
}

/* Regions that were copied back before local failed the second time are copied
 * again: the flush of these copies has failed, and a second flush proves
 * nothing.
 */
static void
fails_while_copying_back (void)
{
  struct nbdm_resync batch = { .max_bytes = 1u << 20 };

  bring_up_small (1, 1000);
  assert (write_at (0, 1) == 0);
  assert (nbdm_cool (site.volume, 0) == 0);
  assert (volume_status ().active_extents == 0);
  attach_and_admit ();
  assert (nbdm_disk_resync (site.volume, NBDM_LOCAL, &batch) == -EIO);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  drop_page (0);
  attach_and_admit ();
  copy_back ();
  assert (read_at (0) == 1);
  end_equal ();
}

/* Local refuses a write to a region that was just copied back to it, and no
 * remote can take over: local misses the region as before, even if the flush of
 * the copy succeeds.
 */
static void
refuses_what_was_copied_back (void)
{
  struct job copy = { 0 };

  bring_up_small (1, 1000);
  assert (write_at (0, 1) == 0);
  attach_and_admit ();
  nbdm_disk_drop (site.volume, 1, "the test said so");
  assert (write_at (EXTENT, 2) == 0);
  site_connect (&site, 0);
  assert (site_status (&site, 0).state == NBDM_RESYNCING);
  start (&copy, do_copy_back_one);
  wait_at_gate ();
  assert (write_at (0, 3) == -EIO); /* the remote has taken it */
  open_gate ();
  assert (end (&copy) == 0);
  site_resync_to_end (&site, 0);
  copy_back ();
  end_equal ();
}

/* A local disk that was being caught up and that the start cannot flush has
 * failed again: the remote serves.
 */
static void
fails_at_the_start (void)
{
  bring_up_small (1, 1000);
  assert (write_at (0, 1) == 0);
  attach_and_admit ();
  assert (nbdm_stop (site.volume) == 0);
  open_again ();
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  site_connect (&site, 0);
  assert (read_at (0) == 1);
  attach_and_admit ();
  copy_back ();
  end_equal ();
}

/* The same, and the kernel has dropped a page outside the active extents, which
 * another program wrote.  The kernel reports this once; then an operator brings
 * the disk back, and no byte of it is believed.
 */
static void
spoiled_at_the_start (void)
{
  bring_up_small (1, 1000);
  assert (write_at (EXTENT, 5) == 0);
  assert (nbdm_cool (site.volume, 0) == 0);
  write_and_fail_local (0, 1);
  attach_and_admit ();
  open_again ();
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  drop_page (EXTENT);
  site_connect (&site, 0);
  attach_and_admit ();
  assert (read_at (EXTENT) == 5);
  copy_back ();
  end_equal ();
}

/* The activity log is full, and without a disk no extent can go cold: a write
 * to another extent is refused, and does not wait forever.
 */
static void
no_room_and_no_disk (void)
{
  make_volume ((ACTIVITY_EXTENTS + 1) * (uint64_t)EXTENT_SIZE, EXTENT_SIZE, 1,
               100);
  site.params.remotes[0].assume_in_sync = 1;
  assert (nbdm_create (&site.params, 1) == 0);
  site_open (&site);
  site_connect (&site, 0);
  for (uint64_t i = 0; i < ACTIVITY_EXTENTS; i++)
    assert (write_at (i * EXTENT_SIZE, 1) == 0);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  nbdm_disk_drop (site.volume, 1, "the test said so");
  assert (write_at (0, 2) == -EIO);
  assert (write_at (ACTIVITY_EXTENTS * (uint64_t)EXTENT_SIZE, 2) == -EIO);
  site_connect (&site, 0);
  assert (write_at (ACTIVITY_EXTENTS * (uint64_t)EXTENT_SIZE, 2) == 0);
  assert (nbdm_stop (site.volume) == 0);
}

/* After a switch to policy stop in the middle of a takeover local is still ok.
 */
static void
policy_stop_in_a_takeover (void)
{
  struct job failing = { .offset = 0, .value = 1 };

  bring_up_small (1, 1000);
  shut_flush_gate (true);
  start (&failing, do_write);
  wait_for_flush ();
  assert (nbdm_set_policy (site.volume, NBDM_STOP, 0) == 0);
  shut_flush_gate (false);
  assert (end (&failing) == -EIO);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  assert (volume_status ().fenced);
  assert (write_at (EXTENT, 2) == -EIO);
  attach_and_admit ();
  copy_back ();
  assert (!volume_status ().fenced);
  assert (write_at (EXTENT, 2) == 0);
  end_equal ();
}

/* If only local gets a write, the maps are made durable first: otherwise after
 * lost power the map of local could say that it misses a region that was copied
 * back, or the map of a remote could lack the write.
 */
static void
maps_are_durable_first (void)
{
  struct nbdm_resync batch = { .max_bytes = SMALL_REGION };

  bring_up_small (2, 1000);
  assert (write_at (0, 1) == 0);
  attach_and_admit ();
  assert (nbdm_disk_resync (site.volume, NBDM_LOCAL, &batch) == 0);
  assert (local_status ().state == NBDM_LOCAL_RESYNCING);
  assert (!site.volume->local.disk.dm.changed);
  nbdm_disk_drop (site.volume, 1, "the test said so");
  assert (write_at (EXTENT, 2) == 0); /* the remote misses it, durably */
  assert (site_status (&site, 0).dirty_regions == 1);
  assert (!site.volume->remotes[0].disk.dm.changed);
  assert (write_at (EXTENT + 2 * SMALL_REGION, 2) == 0);
  assert (site_status (&site, 0).dirty_regions == 2);
  assert (!site.volume->remotes[0].disk.dm.changed);
  site_connect (&site, 0);
  batch = (struct nbdm_resync){ .max_bytes = SMALL_REGION, .pace.depth = 1 };
  assert (site_resync (&site, 0, &batch) == 0);
  assert (site_status (&site, 0).dirty_regions == 1);
  assert (!site.volume->remotes[0].disk.dm.changed);
  site_resync_to_end (&site, 0);
  copy_back ();
  end_equal ();
}

/* Replace a remote's server by one that refuses to zero. */
static void
refuse_zeroes_at (uint32_t remote)
{
  struct peer_params peer = { .socket = site.sockets[remote],
                              .size = SMALL_SIZE,
                              .seed = 1,
                              .refuse_zeroes = EIO };

  peer_stop (site.peers[remote]);
  unlink (site.sockets[remote]);
  site.peers[remote] = peer_start (&peer);
}

static int
do_trim (struct job *job)
{
  return nbdm_trim (site.volume, SECTOR, job->offset, 0);
}

static void
copy_files (const char *from, const char *to)
{
  char command[300];

  snprintf (command, sizeof command, "cp -r %s %s", from, to);
  assert (system (command) == 0);
}

/* The next start recovers as after lost power. */
static void
distrust_page_cache (void)
{
  char mark[100];
  int fd;

  snprintf (mark, sizeof mark, "%s/" DISTRUST_FILE, site.state);
  fd = open (mark, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
  assert (fd >= 0);
  close (fd);
}

/* The second remote refuses a request and is lost before that is noticed.  The
 * request is answered, as the first one has carried it out.  Local has failed,
 * so after lost power only the maps tell which of the two remotes has it.
 */
static void
refused_by_a_lost_remote (void)
{
  struct job trim = { .offset = 0 };
  char map[100], kept[100];
  bool synced;

  make_volume (SMALL_SIZE, SMALL_REGION, 2, 1000 * SITE_DEADLINE_S);
  refuse_zeroes_at (1);
  for (uint32_t i = 0; i < 2; i++)
    site.params.remotes[i].assume_in_sync = 1;
  assert (nbdm_create (&site.params, 1) == 0);
  site_open (&site);
  site_connect (&site, 0);
  site_connect (&site, 1);
  write_and_fail_local (0, 9);
  snprintf (map, sizeof map, "%s/dirty.dr1", site.state);
  snprintf (kept, sizeof kept, "%s/kept", site.dir);
  assert (!site.volume->remotes[1].disk.dm.changed);
  copy_files (map, kept);
  start (&trim, do_trim);
  wait_at_gate ();
  peer_cut (site.peers[1], false);
  site_wait_state (&site, 1, NBDM_HOLDING);
  open_gate ();
  assert (end (&trim) == 0);
  /* Power is lost: only the synced part of the map is left. */
  synced = !site.volume->remotes[1].disk.dm.changed;
  nbdm_close (site.volume);
  if (!synced)
    copy_files (kept, map);
  distrust_page_cache ();
  site_open (&site);
  site_connect (&site, 0);
  site_connect (&site, 1);
  assert (read_at (0) == 0);
}

/* What a process that is killed now leaves, served from the first remote. */
static int
read_after_a_kill (uint64_t offset)
{
  struct nbdm_params params = site.params;
  uint8_t buf[SECTOR];
  char state[100], uri[160];
  struct nbdm *v;
  int rc;

  snprintf (state, sizeof state, "%s/left", site.dir);
  copy_files (site.state, state);
  params.state_dir = state;
  assert (nbdm_open (&params, &v) == 0 && nbdm_start (v) == 0);
  snprintf (uri, sizeof uri, "nbd+unix:///?socket=%s", site.sockets[0]);
  assert (nbdm_remote_connect (v, 1, uri, 10000) == 0);
  assert (nbdm_disk_admit (v, 1) == 0);
  rc = nbdm_pread (v, buf, sizeof buf, offset);
  nbdm_close (v);
  return rc < 0 ? rc : buf[0];
}

/* The process is killed when a write has a slot but no mark yet.  The second
 * remote is away and out of sync, but has the content before this write: the
 * first remote remains a source of it.
 */
static void
killed_before_the_marks (void)
{
  struct job writer = { .offset = 0, .value = 3 };

  bring_up_small (2, 1000);
  write_and_fail_local (0, 1);
  nbdm_disk_drop (site.volume, 2, "the test said so");
  assert (write_at (EXTENT, 2) == 0);
  start (&writer, do_write);
  wait_at_gate ();
  assert (read_after_a_kill (0) == 1);
  open_gate ();
  assert (end (&writer) == 0 && read_at (0) == 3);
}

/* A remote that cannot read a region is asked once.  Another one, which comes
 * back from a hold during that, is asked too, at any place in the list.
 */
static void
one_cannot_read_and_one_is_held (void)
{
  struct job reader = { .offset = 0 };
  uint64_t answered;

  bring_up_small (2, 1000 * SITE_DEADLINE_S);
  write_and_fail_local (0, 1);
  peer_fail_reads (site.peers[1]);
  peer_cut (site.peers[0], false);
  site_wait_state (&site, 0, NBDM_HOLDING);
  answered = site_status (&site, 1).remote.commands;
  start (&reader, do_read);
  WAIT_FOR (site_status (&site, 1).remote.commands > answered);
  site_connect (&site, 0);
  assert (end (&reader) == 1);
}

/* The same with a second remote that has failed, as another disk was in its
 * place, and a first one that misses something else, so that neither is in
 * sync.
 */
static void
killed_beside_a_failed_remote (void)
{
  struct job writer = { .offset = 0, .value = 3 };

  bring_up_small (2, 1000);
  write_and_fail_local (0, 1);
  nbdm_disk_drop (site.volume, 1, "the test said so");
  assert (write_at (EXTENT, 2) == 0);
  site_connect (&site, 0);
  assert (site_status (&site, 0).state == NBDM_RESYNCING);
  assert (nbdm_remote_fail (site.volume, 2, "the test said so") == 0);
  start (&writer, do_write);
  wait_at_gate ();
  assert (read_after_a_kill (0) == 1);
  open_gate ();
  assert (end (&writer) == 0 && read_at (0) == 3);
}

/* Only the failed local disk has a region: the first remote misses it, and the
 * second, which has it by its map, has failed.  After lost power the volume
 * still knows that the disk has it: no other disk may take its place.
 */
static void
lost_power_beside_a_failed_remote (void)
{
  bring_up_small (2, 1000);
  nbdm_disk_drop (site.volume, 1, "the test said so");
  assert (write_at (0, 1) == 0);
  assert (nbdm_cool (site.volume, 0) == 0);
  write_and_fail_local (EXTENT, 2);
  site_connect (&site, 0);
  assert (nbdm_remote_fail (site.volume, 2, "the test said so") == 0);
  assert (write_at (2 * SMALL_REGION, 3) == 0); /* on the first remote */
  nbdm_close (site.volume);
  distrust_page_cache ();
  site_open (&site);
  site_connect (&site, 0);
  assert (nbdm_local_attach (site.volume, site.local, 1) == -EBUSY);
  ASSERT_SAYS ("has the only copy of something");
  attach_and_admit ();
  assert (read_at (0) == 1 && read_at (2 * SMALL_REGION) == 3);
}

static const struct schedule schedules[] = {
  { "lost_power_beside_a_failed_remote", "local_write:2=error",
    lost_power_beside_a_failed_remote },
  { "killed_beside_a_failed_remote",
    "local_write:1=error,slot_reserved:3=wait:gate",
    killed_beside_a_failed_remote },
  { "one_cannot_read_and_one_is_held", "local_write:1=error",
    one_cannot_read_and_one_is_held },
  { "killed_before_the_marks", "local_write:1=error,slot_reserved:3=wait:gate",
    killed_before_the_marks },
  { "refused_by_a_lost_remote", "local_write:1=error,leg_answered:4=wait:gate",
    refused_by_a_lost_remote },
  { "write_in_a_takeover", "local_write:1=error,local_write:2=error",
    write_in_a_takeover },
  { "successor_crashes_in_a_takeover",
    "local_write:2=error,after_remote:2=wait:gate",
    successor_crashes_in_a_takeover },
  { "second_remote_crashes", "local_flush:2=error", second_remote_crashes },
  { "fails_while_copying_back", "local_write:1=error,local_flush:2=error",
    fails_while_copying_back },
  /* The write that fails over, one beside it, and the one copy. */
  { "refuses_what_was_copied_back",
    "local_write:1=error,local_write:4=error,"
    "local_resync_before_clean:1=wait:gate",
    refuses_what_was_copied_back },
  { "fails_at_the_start", "local_write:1=error,local_flush:3=error",
    fails_at_the_start },
  { "spoiled_at_the_start", "local_write:2=error,local_flush:3=error",
    spoiled_at_the_start },
  { "no_room_and_no_disk", "local_write:1024=error", no_room_and_no_disk },
  { "policy_stop_in_a_takeover", "local_write:1=error",
    policy_stop_in_a_takeover },
  { "maps_are_durable_first", "local_write:1=error", maps_are_durable_first },
};

int
main (int argc, char *argv[])
{
  return run_schedules (schedules, sizeof schedules / sizeof schedules[0], argc,
                        argv);
}
