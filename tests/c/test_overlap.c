/* SPDX-License-Identifier: BSD-3-Clause */

/* Overlapping requests from many threads, while two remotes are resynced: in
 * any order, all disks end with the same bytes, and these bytes are allowed.
 *
 * The servers apply and answer in any order, as NBD lets them, so that only the
 * range lock orders the requests.  Each sector is a register: a write has a
 * value of its own, and the times of its start and its answer.  No read may
 * return, and no disk may hold, a value older than an answered write.
 */

#include "api.h"
#include "site.h"

#include <inttypes.h>
#include <poll.h>
#include <stdatomic.h>

#define REGION 4096u
#define SECTOR 512u
#define SIZE (6 * REGION)
#define SECTORS (SIZE / SECTOR)
#define MAX_SECTORS 20u /* of a request */
#define WRITERS 6u
#define REQUESTS 30u /* of a writer in a round */
#define ROUNDS 500u
#define PEERS 2u

struct record {
  uint64_t value; /* of a write; 0: zeroes */
  uint64_t start, end;
  uint32_t first, count; /* sectors */
  bool read;
  uint64_t seen[MAX_SECTORS];
};

static struct site site;
static uint64_t dice;
static struct record records[WRITERS * REQUESTS];
static uint64_t before[SECTORS]; /* what the round began with */
static atomic_uint_fast64_t ticks;
static atomic_uint under_way;
static pthread_barrier_t barrier;
static bool over;

/* --- requests -------------------------------------------------------- */

static void
fill (uint64_t *words, uint32_t sectors, uint64_t value)
{
  for (uint32_t i = 0; i < sectors * SECTOR / 8; i++)
    words[i] = value;
}

/* The value of a sector, which must be of one write. */
static uint64_t
value_of (const void *sector)
{
  uint64_t words[SECTOR / 8];

  memcpy (words, sector, SECTOR);
  for (unsigned i = 1; i < SECTOR / 8; i++)
    if (words[i] != words[0]) {
      fprintf (stderr, "a sector of two writes\n");
      abort ();
    }
  return words[0];
}

static void
request (struct record *record, uint64_t r)
{
  uint64_t words[MAX_SECTORS * SECTOR / 8];
  uint32_t count = (uint32_t)(r % MAX_SECTORS) + 1;
  uint32_t first = (uint32_t)((r >> 8) % (SECTORS - count + 1));
  unsigned kind = r >> 32 & 15;
  int rc;

  *record = (struct record){ .first = first, .count = count };
  if (kind >= 2)
    record->value = r | 1;
  record->read = kind >= 12;
  fill (words, count, record->value);
  record->start = ++ticks;
  if (record->read)
    rc = nbdm_pread (site.volume, words, count * SECTOR, first * SECTOR);
  else if (record->value == 0)
    rc = nbdm_zero (site.volume, count * SECTOR, first * SECTOR,
                    kind ? NBDM_MAY_TRIM : 0);
  else
    rc = nbdm_pwrite (site.volume, words, count * SECTOR, first * SECTOR,
                      kind == 2 ? NBDM_FUA : 0);
  record->end = ++ticks;
  assert (rc == 0);
  for (uint32_t i = 0; record->read && i < count; i++)
    record->seen[i] = words[i * SECTOR / 8]; /* beside a write: may be torn */
}

static void *
writer (void *opaque)
{
  uintptr_t me = (uintptr_t)opaque;
  uint64_t random = site.seed + 99 * me;

  for (;;) {
    pthread_barrier_wait (&barrier);
    if (over)
      return NULL;
    for (unsigned i = 0; i < REQUESTS; i++)
      request (&records[(me - 1) * REQUESTS + i], peer_random (&random));
    under_way--;
    pthread_barrier_wait (&barrier);
  }
}

/* --- the judge ------------------------------------------------------- */

static bool
covers (const struct record *record, uint32_t sector)
{
  return !record->read && sector >= record->first
         && sector < record->first + record->count;
}

/* Was a write that began after `after` answered before `by`? */
static bool
overwritten (uint32_t sector, uint64_t after, uint64_t by)
{
  for (unsigned i = 0; i < WRITERS * REQUESTS; i++)
    if (covers (&records[i], sector) && records[i].start > after
        && records[i].end < by)
      return true;
  return false;
}

/* May the value be read from `start` to `end`? */
static bool
allowed (uint32_t sector, uint64_t value, uint64_t start, uint64_t end)
{
  if (value == before[sector] && !overwritten (sector, 0, start))
    return true;
  for (unsigned i = 0; i < WRITERS * REQUESTS; i++)
    if (covers (&records[i], sector) && records[i].value == value
        && records[i].start < end
        && !overwritten (sector, records[i].end, start))
      return true;
  return false;
}

static void
judge (unsigned round)
{
  for (unsigned i = 0; i < WRITERS * REQUESTS; i++) {
    const struct record *r = &records[i];

    for (uint32_t s = 0; r->read && s < r->count; s++)
      if (!allowed (r->first + s, r->seen[s], r->start, r->end)) {
        fprintf (stderr, "round %u: a read of sector %u is too old\n", round,
                 r->first + s);
        abort ();
      }
  }
  for (uint32_t s = 0; s < SECTORS; s++) {
    uint64_t value = value_of (site.image + s * SECTOR);

    if (!allowed (s, value, UINT64_MAX, UINT64_MAX)) {
      fprintf (stderr, "round %u: sector %u is too old\n", round, s);
      abort ();
    }
  }
  for (uint32_t i = 0; i < PEERS; i++)
    if (memcmp (site.image, peer_image (site.peers[i]), SIZE) != 0) {
      fprintf (stderr, "round %u: remote %u is different\n", round, i);
      abort ();
    }
}

/* --- rounds ---------------------------------------------------------- */

/* A remote is lost, and back, and all of it to be copied; while they write. */
static void
trouble (void)
{
  uint64_t r = peer_random (&dice);
  uint32_t i = r & 1;

  if (r >> 1 & 1)
    assert (nbdm_remote_invalidate (site.volume, i + 1) == 0);
  if (r >> 2 & 7)
    return;
  peer_cut (site.peers[i], r >> 5 & 1);
  site_connect (&site, i);
  peer_apply_late (site.peers[i]);
}

static void
one_round (unsigned round)
{
  struct nbdm_resync batch[PEERS] = { { .max_bytes = REGION, .pace.depth = 2 },
                                      { .max_bytes = SIZE, .pace.depth = 4 } };

  for (uint32_t s = 0; s < SECTORS; s++)
    before[s] = value_of (site.image + s * SECTOR);
  ticks = 0;
  under_way = WRITERS;
  pthread_barrier_wait (&barrier);
  trouble ();
  for (uint32_t i = 0; under_way > 0; i = (i + 1) % PEERS)
    if (site_status (&site, i).state == NBDM_RESYNCING)
      assert (site_resync (&site, i, &batch[i]) == 0);
    else if (peer_random (&dice) % 2)
      assert (nbdm_remote_invalidate (site.volume, i + 1) == 0);
    else
      poll (NULL, 0, 1);
  pthread_barrier_wait (&barrier);
  for (uint32_t i = 0; i < PEERS; i++)
    site_resync_to_end (&site, i);
  judge (round);
}

int
main (void)
{
  pthread_t threads[WRITERS];

  alarm (300); /* nothing here may hang */
  site.seed = dice = site_seed (1);
  site.size = SIZE;
  site.region_size = REGION;
  site.hold_ms = 20;
  site.nr_peers = PEERS;
  site.peer.shuffle = true;
  site_make (&site);
  site_open (&site);
  pthread_barrier_init (&barrier, NULL, WRITERS + 1);
  for (uint32_t i = 0; i < PEERS; i++)
    site_connect (&site, i);
  for (uintptr_t i = 0; i < WRITERS; i++)
    assert (pthread_create (&threads[i], NULL, writer, (void *)(i + 1)) == 0);
  for (unsigned round = 0; round < ROUNDS; round++)
    one_round (round);
  over = true;
  pthread_barrier_wait (&barrier);
  for (unsigned i = 0; i < WRITERS; i++)
    pthread_join (threads[i], NULL);
  pthread_barrier_destroy (&barrier);
  printf ("%u requests in %u rounds\n", ROUNDS * WRITERS * REQUESTS, ROUNDS);
  site_end (&site);
  return 0;
}
