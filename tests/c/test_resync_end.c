/* SPDX-License-Identifier: BSD-3-Clause */

/* The race at the end of a resync: writes to the last dirty regions while
 * their copies are answered, flushed and cleared.
 *
 * The volume has four regions, so that every region is always among the last
 * ones, and several threads do nothing but write to them.  One round makes it
 * all dirty, by an operator's word or by a lost connection, and resyncs it to
 * `in_sync` under that load.  Then the writers stand still for a moment, and
 * the images must be the same: what a round left different would be lost in
 * the next, which copies all again.  Now and then they stand still in the
 * middle of it too: then every region that differs must be dirty.
 *
 * What is counted is not rounds but races: writes under way while the batch
 * ran that made the remote in_sync.
 */

#include "api.h"
#include "logs/layout.h"
#include "site.h"

#include <inttypes.h>
#include <stdatomic.h>

#define REGION 4096u
#define NR_REGIONS 4u
#define SIZE (NR_REGIONS * REGION)
#define SECTOR 512u
#define WRITERS 4
#define RACES 100000u
#define ENOUGH_ROUNDS 12000u

static struct site site;
static uint64_t dice;

/* --- writers --------------------------------------------------------- */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t parked_changed = PTHREAD_COND_INITIALIZER;
static unsigned parked;
static bool park, stop;

/* Batches that may be the last one have an odd number while they run. */
static atomic_uint batch_number;
/* Of those a batch overlapped; counted if it was the last one indeed. */
static atomic_uint overlapped, writes;

static bool
go_on (void)
{
  bool on;

  pthread_mutex_lock (&lock);
  if (park) {
    parked++;
    pthread_cond_broadcast (&parked_changed);
    while (park && !stop)
      pthread_cond_wait (&parked_changed, &lock);
    parked--;
  }
  on = !stop;
  pthread_mutex_unlock (&lock);
  return on;
}

static void *
writer (void *opaque)
{
  uint64_t random = site.seed + 77 * (uintptr_t)opaque;
  uint8_t buf[2 * REGION];

  while (go_on ()) {
    uint64_t r = peer_random (&random);
    uint32_t count = (uint32_t)(r % (sizeof buf / SECTOR) + 1) * SECTOR;
    uint64_t offset = (r >> 16) % ((SIZE - count) / SECTOR + 1) * SECTOR;
    unsigned before = batch_number;
    int rc;

    memset (buf, (int)(r >> 56), count);
    if (r >> 32 & 15)
      rc = nbdm_pwrite (site.volume, buf, count, offset,
                        r >> 36 & 31 ? 0 : NBDM_FUA);
    else
      rc = nbdm_zero (site.volume, count, offset, NBDM_MAY_TRIM);
    assert (rc == 0);
    writes++;
    if ((before | batch_number) % 2)
      overlapped++;
  }
  return NULL;
}

static void
stand_still (void)
{
  pthread_mutex_lock (&lock);
  park = true;
  while (parked < WRITERS)
    pthread_cond_wait (&parked_changed, &lock);
  pthread_mutex_unlock (&lock);
}

static void
move_on (void)
{
  pthread_mutex_lock (&lock);
  park = false;
  pthread_cond_broadcast (&parked_changed);
  pthread_mutex_unlock (&lock);
}

/* --- checks, with the writers standing still ------------------------- */

static void
check_in_sync (unsigned round)
{
  struct nbdm_disk_status status = site_status (&site, 0);

  if (status.state != NBDM_IN_SYNC)
    return;
  assert (status.dirty_regions == 0);
  if (memcmp (site.image, peer_image (site.peers[0]), SIZE) != 0) {
    fprintf (stderr, "in sync and different, round %u\n", round);
    abort ();
  }
}

/* By the engine's own file, as the next start would find it. */
static void
check_differing_are_dirty (void)
{
  uint8_t bits;
  char path[128];
  int fd;

  snprintf (path, sizeof path, "%s/dirty.dr0", site.state);
  fd = open (path, O_RDONLY | O_CLOEXEC);
  assert (fd >= 0 && pread (fd, &bits, 1, LAYOUT_PAGE) == 1);
  close (fd);
  for (uint64_t i = 0; i < NR_REGIONS; i++)
    if (memcmp (site.image + i * REGION,
                peer_image (site.peers[0]) + i * REGION, REGION)
        != 0)
      assert (bits >> i & 1);
}

/* --- rounds ---------------------------------------------------------- */

/* Make the remote dirty: all of it, or the regions that are written while it is
 * away.
 */
static void
begin_round (unsigned round)
{
  uint64_t r = peer_random (&dice);

  if (round % 64 != 63) {
    assert (nbdm_remote_invalidate (site.volume, 1) == 0);
    return;
  }
  if (r & 1)
    peer_cut (site.peers[0], r & 2);
  else
    nbdm_disk_drop (site.volume, 1, "the test dropped it");
  if (r & 4)
    site_wait_state (&site, 0, NBDM_OUT_OF_SYNC);
  site_connect (&site, 0);
  peer_apply_late (site.peers[0]);
}

/* Returns how many writes raced with the batch that ended it. */
static unsigned
resync (unsigned round)
{
  struct nbdm_resync batch = { .pace.depth = 1 + round % 4 };
  unsigned races = 0;

  while (site_status (&site, 0).state != NBDM_IN_SYNC) {
    batch.max_bytes = peer_random (&dice) % 8 ? SIZE : REGION;
    overlapped = 0;
    batch_number++;
    assert (site_resync (&site, 0, &batch) == 0);
    batch_number++;
    races = overlapped;
    if (round % 16 == 5) {
      stand_still ();
      check_differing_are_dirty ();
      move_on ();
    }
  }
  return races;
}

static void
run (void)
{
  pthread_t threads[WRITERS];
  unsigned races = 0, round;

  site.seed = dice = site_seed (1);
  site.size = SIZE;
  site.region_size = REGION;
  site.hold_ms = 20;
  site.nr_peers = 1;
  site.peer.shuffle = true;
  site_make (&site);
  site_open (&site);
  site_connect (&site, 0);
  for (uintptr_t i = 0; i < WRITERS; i++)
    assert (pthread_create (&threads[i], NULL, writer, (void *)(i + 1)) == 0);
  for (round = 0; races < RACES || round < ENOUGH_ROUNDS; round++) {
    begin_round (round);
    races += resync (round);
    stand_still ();
    check_in_sync (round);
    move_on ();
  }
  pthread_mutex_lock (&lock);
  stop = true;
  pthread_cond_broadcast (&parked_changed);
  pthread_mutex_unlock (&lock);
  for (unsigned i = 0; i < WRITERS; i++)
    pthread_join (threads[i], NULL);
  printf ("%u races in %u rounds, %u writes\n", races, round, writes);
  site_resync_to_end (&site, 0);
  check_in_sync (round);
  site_end (&site);
}

int
main (void)
{
  alarm (300); /* nothing here may hang */
  run ();
  return 0;
}
