/* SPDX-License-Identifier: BSD-3-Clause */

/* The local disk fails while there are two remotes, or one that fails as well:
 * the schedules in which the only copy of something could be lost.  The remotes
 * are servers inside the test, which lose what they have not flushed, and
 * whose flushes can be made to wait; local's failures are fault points.
 */

#include "site.h"

#include <poll.h>

#define REGION 4096u
#define EXTENT (4u << 20) /* bytes an activity extent stands for */
#define SIZE (2 * EXTENT + 3 * 512u)
#define SECTOR 512u

static struct site site;

/* --- a gate for flushes ------------------------------------------------ */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t gate_changed = PTHREAD_COND_INITIALIZER;
static bool gate_shut;
static unsigned at_gate;

static void
pass_gate (void *opaque, const struct peer_command *cmd)
{
  (void)opaque;
  if (cmd->type != PEER_FLUSH)
    return;
  pthread_mutex_lock (&lock);
  at_gate++;
  pthread_cond_broadcast (&gate_changed);
  while (gate_shut)
    pthread_cond_wait (&gate_changed, &lock);
  at_gate--;
  pthread_mutex_unlock (&lock);
}

static void
shut_gate (bool shut)
{
  pthread_mutex_lock (&lock);
  gate_shut = shut;
  pthread_cond_broadcast (&gate_changed);
  pthread_mutex_unlock (&lock);
}

static void
wait_for_flush (void)
{
  pthread_mutex_lock (&lock);
  while (at_gate == 0)
    pthread_cond_wait (&gate_changed, &lock);
  pthread_mutex_unlock (&lock);
}

/* --- the volume -------------------------------------------------------- */

static struct nbdm_status
volume_status (void)
{
  struct nbdm_status s;

  nbdm_get_status (site.volume, &s);
  return s;
}

static void
bring_up (uint32_t nr_peers, uint32_t hold_ms)
{
  site = (struct site){ .size = SIZE,
                        .region_size = REGION,
                        .hold_ms = hold_ms,
                        .nr_peers = nr_peers,
                        .peer = { .applied = pass_gate },
                        .seed = 1 };
  site_make (&site);
  /* No flush but those that are asked for. */
  site.params.flush_ms = 1000000;
  site_open (&site);
  for (uint32_t i = 0; i < nr_peers; i++) {
    site_connect (&site, i);
    site_resync_to_end (&site, i);
  }
}

static int
write_with (uint64_t offset, uint8_t value, uint32_t flags)
{
  uint8_t buf[SECTOR];

  memset (buf, value, sizeof buf);
  return nbdm_pwrite (site.volume, buf, sizeof buf, offset, flags);
}

static int
write_sector (uint64_t offset, uint8_t value)
{
  return write_with (offset, value, 0);
}

static void
assert_sector (uint64_t offset, uint8_t value)
{
  uint8_t buf[SECTOR];

  assert (nbdm_pread (site.volume, buf, sizeof buf, offset) == 0);
  for (unsigned i = 0; i < sizeof buf; i++)
    assert (buf[i] == value);
}

struct writer {
  pthread_t thread;
  uint64_t offset;
  uint8_t value;
  int rc;
};

static void *
write_one (void *opaque)
{
  struct writer *w = opaque;

  w->rc = write_sector (w->offset, w->value);
  return NULL;
}

static void
start_write (struct writer *w, uint64_t offset, uint8_t value)
{
  *w = (struct writer){ .offset = offset, .value = value, .rc = 1 };
  assert (pthread_create (&w->thread, NULL, write_one, w) == 0);
}

static int
end_write (struct writer *w)
{
  pthread_join (w->thread, NULL);
  return w->rc;
}

static void
copy_back (void)
{
  time_t until = time (NULL) + SITE_DEADLINE_S;
  struct nbdm_resync batch = { .max_bytes = 1u << 20 };

  while (volume_status ().local_state == NBDM_LOCAL_RESYNCING) {
    assert (nbdm_local_resync (site.volume, &batch) == 0);
    assert (time (NULL) < until);
    batch.first_region = batch.next_region;
  }
  assert (volume_status ().local_state == NBDM_LOCAL_OK);
}

static void
attach_again (void)
{
  assert (volume_status ().local_state == NBDM_LOCAL_FAILED);
  assert (nbdm_local_attach (site.volume, site.local, 0) == 0);
  assert (nbdm_local_admit (site.volume) == 0);
}

static void
end_equal (void)
{
  uint32_t nr = site.nr_peers;

  assert (nbdm_stop (site.volume) == 0);
  for (uint32_t i = 0; i < nr; i++)
    assert (memcmp (site.image, peer_image (site.peers[i]), SIZE) == 0);
  site_end (&site);
}

/* --- the schedules ----------------------------------------------------- */

/* Local fails under a request that came in the middle of the takeover, in an
 * extent that was cold when it began: local misses that too.
 */
static void
write_in_a_takeover (void *unused)
{
  struct writer first, second;

  (void)unused;
  bring_up (1, 1000);
  shut_gate (true);
  start_write (&first, 0, 1);
  wait_for_flush ();
  start_write (&second, EXTENT, 2);
  while (volume_status ().local_errors < 2)
    poll (NULL, 0, 1);
  shut_gate (false);
  assert (end_write (&first) == 0 && end_write (&second) == 0);
  assert_sector (EXTENT, 2);
  attach_again ();
  assert_sector (EXTENT, 2);
  copy_back ();
  assert_sector (EXTENT, 2);
  end_equal ();
}

static char gate_file[80];

static void
wait_at_file (void)
{
  char reached[96];

  snprintf (reached, sizeof reached, "%s.reached", gate_file);
  while (access (reached, F_OK) < 0)
    poll (NULL, 0, 1);
  unlink (reached);
}

static void
open_file_gate (void)
{
  int fd = open (gate_file, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);

  assert (fd >= 0);
  close (fd);
}

/* The successor crashes while it is flushed, and is back within the hold: what
 * it answered is lost on it, whatever a flush of the new connection says.
 */
static void
successor_crashes_in_a_takeover (void *unused)
{
  struct writer failing;

  (void)unused;
  bring_up (1, 60000);
  assert (write_sector (0, 1) == 0); /* in the server's cache */
  start_write (&failing, REGION, 2);
  wait_at_file ();
  peer_hold (site.peers[0], PEER_HOLD_ALL);
  open_file_gate ();
  while (site_status (&site, 0).outstanding == 0)
    poll (NULL, 0, 1);
  peer_lose_power (site.peers[0], PEER_LOSE_ALL);
  peer_hold (site.peers[0], PEER_GO);
  site_connect (&site, 0);
  assert (end_write (&failing) == -EIO);
  unlink (gate_file);
  assert_sector (0, 1);
  assert (volume_status ().local_state == NBDM_LOCAL_OK);
  site_resync_to_end (&site, 0);
  assert_sector (0, 1);
  end_equal ();
}

/* One remote goes on after the other: it may then be the only one to have what
 * it answered before the takeover, so that is durable as well.
 */
static void
second_remote_crashes (void *unused)
{
  (void)unused;
  bring_up (2, 60000);
  assert (write_sector (0, 1) == 0); /* in both servers' caches */
  assert (write_with (REGION, 2, NBDM_FUA) == 0);
  assert (volume_status ().local_state == NBDM_LOCAL_FAILED);
  nbdm_remote_drop (site.volume, 0, "the test said so");
  assert (write_sector (SECTOR, 3) == 0); /* the second one alone */
  peer_lose_power (site.peers[1], PEER_LOSE_ALL);
  site_connect (&site, 1);
  assert_sector (0, 1);
  assert_sector (SECTOR, 3);
  site_connect (&site, 0);
  site_resync_to_end (&site, 0);
  attach_again ();
  copy_back ();
  assert_sector (0, 1);
  end_equal ();
}

/* What was copied back before local failed once more is not to be believed:
 * the flush that was to make it durable has failed, and is not tried again.
 */
static void
fails_while_copying_back (void *unused)
{
  struct nbdm_resync batch = { .max_bytes = 1u << 20 };
  const uint8_t old[SECTOR] = { 0 };
  int fd;

  (void)unused;
  bring_up (1, 1000);
  assert (write_sector (0, 1) == 0);
  assert (nbdm_cool (site.volume, 0) == 0);
  assert (volume_status ().active_extents == 0);
  attach_again ();
  assert (nbdm_local_resync (site.volume, &batch) == -EIO);
  assert (volume_status ().local_state == NBDM_LOCAL_FAILED);
  /* The pages that could not be written are gone. */
  fd = open (site.local, O_WRONLY | O_CLOEXEC);
  assert (fd >= 0 && pwrite (fd, old, sizeof old, 0) == (ssize_t)sizeof old);
  close (fd);
  attach_again ();
  copy_back ();
  assert_sector (0, 1);
  end_equal ();
}

static void *
resync_local (void *opaque)
{
  struct nbdm_resync *batch = opaque;

  assert (nbdm_local_resync (site.volume, batch) == 0);
  return NULL;
}

/* Local refuses a write of what was just copied back to it, and nobody can
 * take over: it misses that as before, whatever the flush says.
 */
static void
refuses_what_was_copied_back (void *unused)
{
  struct nbdm_resync batch = { .max_bytes = REGION };
  pthread_t thread;

  (void)unused;
  bring_up (1, 1000);
  assert (write_sector (0, 1) == 0);
  attach_again ();
  nbdm_remote_drop (site.volume, 0, "the test said so");
  assert (write_sector (EXTENT, 2) == 0);
  site_connect (&site, 0);
  assert (site_status (&site, 0).state == NBDM_RESYNCING);
  assert (pthread_create (&thread, NULL, resync_local, &batch) == 0);
  wait_at_file ();
  assert (write_sector (0, 3) == -EIO); /* the remote has taken it */
  open_file_gate ();
  pthread_join (thread, NULL);
  unlink (gate_file);
  site_resync_to_end (&site, 0);
  copy_back ();
  end_equal ();
}

/* One that was being caught up and cannot even be flushed at the start has
 * failed again: the remote serves.
 */
static void
fails_at_the_start (void *unused)
{
  (void)unused;
  bring_up (1, 1000);
  assert (write_sector (0, 1) == 0);
  attach_again ();
  assert (nbdm_stop (site.volume) == 0);
  nbdm_close (site.volume);
  site_open (&site);
  assert (volume_status ().local_state == NBDM_LOCAL_FAILED);
  site_connect (&site, 0);
  assert_sector (0, 1);
  attach_again ();
  copy_back ();
  end_equal ();
}

/* Every extent that the log has room for is in use, and with no disk left none
 * can go cold: a write of another one is refused, and does not wait for ever.
 */
static void
no_room_and_no_disk (void *unused)
{
  (void)unused;
  site = (struct site){ .size = (ACTIVITY_EXTENTS + 1) * (uint64_t)EXTENT_SIZE,
                        .region_size = EXTENT_SIZE,
                        .hold_ms = 100,
                        .nr_peers = 1,
                        .seed = 1 };
  site_make (&site);
  site.params.flush_ms = 1000000;
  site.params.remotes[0].assume_in_sync = 1;
  assert (nbdm_create (&site.params, 1) == 0);
  site_open (&site);
  site_connect (&site, 0);
  for (uint64_t i = 0; i < ACTIVITY_EXTENTS; i++)
    assert (write_sector (i * EXTENT_SIZE, 1) == 0);
  assert (volume_status ().local_state == NBDM_LOCAL_FAILED);
  nbdm_remote_drop (site.volume, 0, "the test said so");
  assert (write_sector (0, 2) == -EIO);
  assert (write_sector (ACTIVITY_EXTENTS * (uint64_t)EXTENT_SIZE, 2) == -EIO);
  site_connect (&site, 0);
  assert (write_sector (ACTIVITY_EXTENTS * (uint64_t)EXTENT_SIZE, 2) == 0);
  site_end (&site);
}

/* A switch to policy stop in the middle of a takeover finds local ok still. */
static void
policy_stop_in_a_takeover (void *unused)
{
  struct writer failing;

  (void)unused;
  bring_up (1, 1000);
  shut_gate (true);
  start_write (&failing, 0, 1);
  wait_for_flush ();
  assert (nbdm_set_policy (site.volume, NBDM_STOP, 0) == 0);
  shut_gate (false);
  assert (end_write (&failing) == -EIO);
  assert (volume_status ().local_state == NBDM_LOCAL_FAILED);
  assert (volume_status ().fenced);
  assert (write_sector (EXTENT, 2) == -EIO);
  attach_again ();
  copy_back ();
  assert (!volume_status ().fenced);
  assert (write_sector (EXTENT, 2) == 0);
  end_equal ();
}

/* Where nothing but local is left to take a write, the maps that say so are
 * durable: after lost power a region that local had copied back must not be
 * found missing, nor the write be missing in the map of a remote.
 */
static void
maps_are_durable_first (void *unused)
{
  struct nbdm_resync batch = { .max_bytes = REGION };

  (void)unused;
  bring_up (2, 1000);
  assert (write_sector (0, 1) == 0);
  attach_again ();
  assert (nbdm_local_resync (site.volume, &batch) == 0);
  assert (volume_status ().local_state == NBDM_LOCAL_RESYNCING);
  assert (!site.volume->local.dm.changed);
  nbdm_remote_drop (site.volume, 0, "the test said so");
  assert (write_sector (EXTENT, 2) == 0); /* it misses this, durably */
  assert (site_status (&site, 0).dirty_regions == 1);
  assert (!site.volume->remotes[0].dm.changed);
  assert (write_sector (EXTENT + 2 * REGION, 2) == 0);
  assert (site_status (&site, 0).dirty_regions == 2);
  assert (!site.volume->remotes[0].dm.changed);
  site_connect (&site, 0);
  batch = (struct nbdm_resync){ .max_bytes = REGION, .pace.depth = 1 };
  assert (site_resync (&site, 0, &batch) == 0);
  assert (site_status (&site, 0).dirty_regions == 1);
  assert (!site.volume->remotes[0].dm.changed);
  site_resync_to_end (&site, 0);
  copy_back ();
  end_equal ();
}

/* ----------------------------------------------------------------------- */

static void
with_alarm (void *opaque)
{
  void (**schedule) (void *) = opaque;

  alarm (90); /* nothing here may hang */
  (*schedule) (NULL);
}

static void
run (const char *name, const char *fault, void (*schedule) (void *))
{
  printf ("%s\n", name);
  fflush (stdout);
  assert (passed (in_child (fault, with_alarm, (void *)&schedule)));
}

int
main (int argc, char *argv[])
{
  char fault[160], refused[200];
  const struct {
    const char *name, *fault;
    void (*schedule) (void *);
  } schedules[] = {
    { "write_in_a_takeover", "local_write:1=error,local_write:2=error",
      write_in_a_takeover },
    { "successor_crashes_in_a_takeover", fault,
      successor_crashes_in_a_takeover },
    { "second_remote_crashes", "local_flush:2=error", second_remote_crashes },
    { "fails_while_copying_back", "local_write:1=error,local_flush:2=error",
      fails_while_copying_back },
    { "refuses_what_was_copied_back", refused, refuses_what_was_copied_back },
    { "fails_at_the_start", "local_write:1=error,local_flush:3=error",
      fails_at_the_start },
    { "no_room_and_no_disk", "local_write:1024=error", no_room_and_no_disk },
    { "policy_stop_in_a_takeover", "local_write:1=error",
      policy_stop_in_a_takeover },
    { "maps_are_durable_first", "local_write:1=error", maps_are_durable_first },
  };

  snprintf (gate_file, sizeof gate_file, "/tmp/nbdm-local-two-%d",
            (int)getpid ());
  snprintf (fault, sizeof fault, "local_write:2=error,after_remote:2=wait:%s",
            gate_file);
  /* The write that fails over, one beside it, and the one copy. */
  snprintf (refused, sizeof refused,
            "local_write:1=error,local_write:4=error,"
            "local_resync_before_clean:1=wait:%s",
            gate_file);
  for (size_t i = 0; i < sizeof schedules / sizeof schedules[0]; i++)
    if (argc < 2 || strcmp (argv[1], schedules[i].name) == 0)
      run (schedules[i].name, schedules[i].fault, schedules[i].schedule);
  return 0;
}
