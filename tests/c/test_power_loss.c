/* SPDX-License-Identifier: BSD-3-Clause */

/* Lost power and killed processes, at every prefix of what was written and
 * synced.  The model is loss.h's, the judge loss_judge.h's; here are the load
 * and the crashes that really happen between two of its lives.
 *
 * With NBDM_TEST_NODES the remotes are other nodes, and this one is primary:
 * the same must hold of what it doubts after the loss.
 *
 * Besides: what was answered with FUA, or before a flush, is on local and on
 * every remote that was in sync, and stays there.
 */

#define _GNU_SOURCE

#include <poll.h>
#include <stdatomic.h>

#include "api.h"
#include "logs/layout.h"
#include "volume/volume.h"
#include "loss_judge.h"

#define WRITERS 3u
#define CYCLES 9u
#define STEPS 30u
#define STRIDE 13u /* of the events that are no sync, one in so many */

static struct site site;
static int caught_fd; /* what lost power leaves of a start under way */
static char caught_dir[96];
static unsigned catch_in; /* after so many events; 0: not */
static enum loss_how catch_how;
static unsigned nr_caught;
static uint64_t dice, catch_dice;
static unsigned nr_events;

/* The boot it is, and the one after the next loss of power. */
static char this_boot[40], next_boot[40];

static void
reboot (void)
{
  static unsigned number;

  snprintf (this_boot, sizeof this_boot, "%08x-0000-4000-8000-000000000000",
            ++number);
  snprintf (next_boot, sizeof next_boot, "%08x-0000-4000-8000-000000000000",
            number + 1);
  loss_set_boot (this_boot);
}

/* --- an event --------------------------------------------------------- */

static void
at_event (bool sync)
{
  static const struct verdict verdicts[] = { { LOSS_UNSYNCED, false },
                                             { LOSS_NOTHING, false },
                                             { LOSS_PAGES, false },
                                             { LOSS_SECTORS, false },
                                             { LOSS_NOTHING, true } };

  pages_collect ();
  if (catch_in > 0 && --catch_in == 0) {
    loss_pretend_boot (this_boot); /* not recorded */
    pages_leave (caught_fd, catch_how, &catch_dice);
    loss_pretend_boot (NULL);
    nr_caught++;
  }
  if (nr_events++ % STRIDE != 0 && !sync)
    return;
  for (unsigned i = 0; i < sizeof verdicts / sizeof verdicts[0]; i++)
    judge (&verdicts[i], verdicts[i].lived ? this_boot : next_boot, nr_events);
}

/* --- load ------------------------------------------------------------ */

static atomic_bool stop_writers;
static atomic_uint nr_requests;
static unsigned nr_durable; /* checks of a remote, under the lock */
static pthread_t writers[WRITERS];
static uint64_t writer_seed[WRITERS];

/* A write to a place that no other thread writes to, made durable with FUA or
 * by a flush: then it is durable on local, and on each remote that is in sync
 * all the while.
 */
static void
durable_write (uint64_t r, unsigned writer_nr)
{
  uint64_t offset = 3 * (uint64_t)EXTENT_SIZE + writer_nr * LOSS_UNIT;
  struct nbdm_disk_status old[PEERS], now[PEERS];
  uint8_t buf[LOSS_UNIT];

  memset (buf, (int)(r >> 32), sizeof buf);
  memcpy (buf, &r, sizeof r);
  for (uint32_t i = 0; i < PEERS; i++)
    old[i] = site_status (&site, i);
  assert (
      nbdm_pwrite (site.volume, buf, sizeof buf, offset, r & 1 ? NBDM_FUA : 0)
      == 0);
  if (!(r & 1))
    assert (nbdm_flush (site.volume) == 0);
  for (uint32_t i = 0; i < PEERS; i++)
    now[i] = site_status (&site, i);
  loss_lock ();
  assert (disk_holds (LOSS_LOCAL, offset, sizeof buf, buf));
  for (uint32_t i = 0; i < PEERS; i++)
    if (old[i].state == NBDM_IN_SYNC && old[i].serial == now[i].serial) {
      assert (disk_holds (1 + i, offset, sizeof buf, buf));
      nr_durable++;
    }
  loss_unlock ();
}

static int
one_request (uint64_t r, uint8_t *buf)
{
  static const uint8_t hot[] = { 0, 1, 2, 30, 31, 32, 33 };
  uint32_t count = (uint32_t)(r % 8 + 1) * LOSS_UNIT;
  uint64_t offset = hot[(r >> 8) % sizeof hot] * (uint64_t)EXTENT_SIZE;
  unsigned kind = r >> 16 & 31;

  /* Use few places, so that writes meet; some cross into the next extent. */
  offset += (r >> 24) % 16 * LOSS_UNIT;
  if (r >> 32 & 1 && offset >= EXTENT_SIZE)
    offset -= 8 * LOSS_UNIT;
  for (unsigned i = 0; i < count / LOSS_UNIT; i++)
    memset (buf + i * LOSS_UNIT, (int)(r >> (40 + i)), LOSS_UNIT);
  if (kind == 0)
    return nbdm_flush (site.volume);
  if (kind < 3)
    return nbdm_trim (site.volume, count, offset, kind == 1 ? NBDM_FUA : 0);
  if (kind < 5)
    return nbdm_zero (site.volume, count, offset, kind == 3 ? NBDM_FUA : 0);
  return nbdm_pwrite (site.volume, buf, count, offset, kind < 8 ? NBDM_FUA : 0);
}

static void *
writer (void *opaque)
{
  uintptr_t me = (uintptr_t)opaque;
  uint64_t random = writer_seed[me];
  uint8_t buf[8 * LOSS_UNIT];

  while (!stop_writers) {
    uint64_t r = peer_random (&random);

    if (r % 16 == 0)
      durable_write (r >> 8, (unsigned)me);
    assert (one_request (peer_random (&random), buf) == 0);
    nr_requests++;
    /* Write in bursts, so that extents go cold and resyncs come to an end. */
    if (peer_random (&random) % 8 == 0)
      poll (NULL, 0, 2);
  }
  return NULL;
}

static void
start_writers (void)
{
  stop_writers = false;
  for (uintptr_t i = 0; i < WRITERS; i++) {
    writer_seed[i] = peer_random (&dice);
    assert (pthread_create (&writers[i], NULL, writer, (void *)i) == 0);
  }
}

static void
end_writers (void)
{
  stop_writers = true;
  for (unsigned i = 0; i < WRITERS; i++)
    pthread_join (writers[i], NULL);
}

/* --- what happens to a volume ---------------------------------------- */

static void
remote_loses_power (uint32_t i)
{
  peer_lose_power (site.peers[i], PEER_LOSE_SOME);
  loss_lock ();
  disk_lost_power (1 + i, peer_image (site.peers[i]));
  loss_unlock ();
}

static void
lose_remote (uint32_t i, uint64_t r)
{
  switch (r % 4) {
  case 0:
    nbdm_disk_drop (site.volume, i + 1, "the test dropped it");
    break;
  case 1:
    peer_cut (site.peers[i], false);
    break;
  case 2:
    peer_cut (site.peers[i], true); /* what was sent may arrive later */
    break;
  default:
    remote_loses_power (i);
    break;
  }
}

static void
resync_batch (uint32_t i)
{
  struct nbdm_resync batch = { .max_bytes = 1u << 20, .pace.depth = 4 };

  /* What may have come late has come, or never will. */
  peer_apply_late (site.peers[i]);
  loss_forget_old (i);
  do
    if (site_resync (&site, i, &batch) < 0)
      return;
  while (batch.next_region != 0);
}

static void
step (void)
{
  uint64_t r = peer_random (&dice);
  uint32_t i = r >> 8 & 1;
  struct nbdm_disk_status status = site_status (&site, i);

  if (!status.remote.admitted) {
    if (r % 4 == 0)
      site_connect (&site, i);
  }
  else if (status.state == NBDM_RESYNCING && r % 4)
    resync_batch (i);
  else if (r % 32 == 4)
    assert (nbdm_remote_invalidate (site.volume, i + 1) == 0);
  else if (r % 16 == 8)
    assert (nbdm_remote_pause (site.volume, i + 1, r >> 9 & 1) == 0);
  else if (r % 4 == 0)
    lose_remote (i, r >> 16);
  if (r >> 24 & 1)
    assert (nbdm_cool (site.volume, 0) == 0);
  if ((r >> 25 & 7) == 0)
    assert (nbdm_local_sample (site.volume, NR_SAMPLES) >= 0);
  poll (NULL, 0, r >> 32 & 3);
}

/* No thread writes and nothing is under way: what the engine holds and what the
 * model takes for the disks must be the same as the disks.
 */
static void
check_model (void)
{
  int fd = open (site.local, O_RDONLY | O_CLOEXEC);

  loss_lock ();
  disk_check (LOSS_LOCAL, fd, NULL);
  for (uint32_t i = 0; i < PEERS; i++)
    disk_check (1 + i, -1, peer_image (site.peers[i]));
  loss_unlock ();
  close (fd);
}

/* The next life begins with what lost power left of this one. */
static void
lose_power (uint64_t r)
{
  static const enum loss_how hows[]
      = { LOSS_UNSYNCED, LOSS_NOTHING, LOSS_PAGES, LOSS_SECTORS };
  enum loss_how how = hows[r % 4];
  int dirfd, fd;

  for (uint32_t i = 0; i < PEERS; i++)
    if (r >> (8 + i) & 1)
      remote_loses_power (i);
    else
      peer_cut (site.peers[i], false);
  loss_pretend_boot (this_boot); /* not recorded */
  dirfd = open (site.state, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  fd = open (site.local, O_RDWR | O_CLOEXEC);
  assert (dirfd >= 0 && fd >= 0);
  loss_lock ();
  pages_leave (dirfd, how, &dice);
  disk_leave_local (fd, r >> 16 & 1 ? LOSS_UNSYNCED : LOSS_PAGES, &dice);
  loss_unlock ();
  close (fd);
  close (dirfd);
  loss_pretend_boot (NULL);
  loss_stop_recording ();
  reboot ();
  loss_record (&site, at_event);
}

/* A start loses power at any of its events: the next one begins with the rest.
 * The events of a start are judged as all others are, so the test tries two
 * losses within starts, or three, one after the other.
 */
static void
start_that_does_not_end (uint64_t r)
{
  static const enum loss_how hows[]
      = { LOSS_UNSYNCED, LOSS_NOTHING, LOSS_PAGES, LOSS_SECTORS };
  char command[300];
  int fd;

  loss_lock ();
  catch_how = hows[r % 4];
  catch_in = 1 + (unsigned)(r >> 8) % 70;
  loss_unlock ();
  assert (nbdm_open (&site.params, &site.volume) == 0);
  nbdm_close (site.volume);
  loss_lock ();
  r = catch_in;
  catch_in = 0;
  loss_unlock ();
  if (r > 0)
    return; /* it came to its end, and was killed then */
  loss_pretend_boot (this_boot);
  snprintf (command, sizeof command, "rm -f %s/* && cp %s/* %s", site.state,
            caught_dir, site.state);
  assert (system (command) == 0);
  fd = open (site.local, O_RDWR | O_CLOEXEC);
  assert (fd >= 0);
  loss_lock ();
  disk_leave_local (fd, LOSS_PAGES, &dice);
  loss_unlock ();
  close (fd);
  loss_pretend_boot (NULL);
  loss_stop_recording ();
  reboot ();
  loss_record (&site, at_event);
}

static void
live (unsigned cycle)
{
  uint64_t r = peer_random (&dice);

  /* What a remote had not flushed when the primary went may be lost later. */
  for (uint32_t i = 0; i < PEERS; i++)
    if (r >> (8 + i) & 1)
      remote_loses_power (i);
  for (unsigned n = cycle == 0 ? 0 : r >> 16 & 3; n > 0; n--)
    start_that_does_not_end (peer_random (&dice));
  site_open (&site);
  for (uint32_t i = 0; i < PEERS; i++)
    if (cycle == 0 || r >> i & 1)
      site_connect (&site, i);
  start_writers ();
  for (unsigned i = 0; i < STEPS; i++)
    step ();
  end_writers ();
  check_model ();
}

static void
make_caught_directory (void)
{
  snprintf (caught_dir, sizeof caught_dir, "%s/caught", site.dir);
  assert (mkdir (caught_dir, 0700) == 0);
  caught_fd = open (caught_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  assert (caught_fd >= 0);
}

int
main (void)
{
  alarm (190); /* nothing here may hang */
  site.seed = dice = site_seed (1);
  catch_dice = dice + 2;
  site.size = SIZE;
  site.region_size = LOSS_UNIT;
  site.hold_ms = 20;
  site.nr_peers = PEERS;
  site.peer.shuffle = true;
  site.peer.enter = loss_enter;
  site.peer.applied = loss_applied;
  site.peer.leave = loss_leave;
  disks_init (SIZE, 1 + PEERS);
  reboot ();
  if (getenv ("NBDM_TEST_NODES"))
    site.node = "alpha";
  site_make (&site);
  if (site.node)
    site_promote (&site, true);
  judge_begin (&site, dice + 1);
  make_caught_directory ();
  loss_record (&site, at_event);
  for (unsigned cycle = 0; cycle < CYCLES; cycle++) {
    live (cycle);
    switch (cycle % 3) {
    case 0:
      nbdm_close (site.volume);
      lose_power (peer_random (&dice));
      break;
    case 1: /* killed: the page cache lives */
      nbdm_close (site.volume);
      break;
    default:
      assert (nbdm_stop (site.volume) == 0);
      nbdm_close (site.volume);
      break;
    }
    printf ("cycle %u: %u requests, %u events, %u recoveries, %u starts that "
            "lost power, %u samples\n",
            cycle, nr_requests, nr_events, judge_recoveries, nr_caught,
            judge_samples);
    fflush (stdout);
  }
  assert (nr_durable > 0 && nr_caught > 0 && judge_samples > 0);
  loss_stop_recording ();
  disks_free ();
  judge_end ();
  close (caught_fd);
  site_remove (&site);
  return 0;
}
