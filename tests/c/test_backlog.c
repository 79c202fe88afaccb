/* SPDX-License-Identifier: BSD-3-Clause */

/* Remotes whose disk flushes more slowly than their link brings data: no flush
 * passes the deadline, so nothing is lost, and no client gets an error.
 *
 * The servers do one thing after the other: while one flushes it answers
 * nothing, and only what it has unflushed decides how long that takes.
 */

#include "api.h"
#include "volume/backlog.h"
#include "site.h"

#include <poll.h>

#define MIB (1u << 20)
#define KIB 1024u
#define SIZE (4u * MIB)
#define DEADLINE_MS 500u
#define RATE (4u * MIB) /* all at once would take two deadlines */

static struct site site;
static struct peer_params peer; /* of the next site's servers */
static uint8_t bytes[SIZE];

/* --- the bound alone --------------------------------------------------- */

#define S_NS UINT64_C (1000000000)

static struct flush_bound
new_bound (void)
{
  struct flush_bound bound;

  flush_bound_init (&bound, 6000);
  assert (bound.bytes[BACKLOG_DATA] <= 2 * MIB);
  return bound;
}

/* A disk of so many bytes/s, always with all of the bound to flush. */
static void
follow (struct flush_bound *bound, uint64_t rate, uint64_t fixed_ns,
        unsigned flushes)
{
  while (flushes-- > 0) {
    uint64_t covered[BACKLOG_KINDS] = { bound->bytes[BACKLOG_DATA], 0 };
    uint64_t took = fixed_ns + covered[0] * 1000 / (rate / 1000) * 1000;

    if (took > bound->deadline_ns)
      flush_bound_lost (bound, covered);
    else
      flush_bound_took (bound, covered, took);
  }
}

/* Whatever the rate, a flush of all of it takes a fraction of the deadline,
 * and no less than is of use.
 */
static void
test_bound_finds_the_rate (void)
{
  for (uint64_t rate = 100 * KIB; rate < 4 * (uint64_t)SIZE * KIB; rate *= 3) {
    struct flush_bound bound = new_bound ();
    uint64_t found;

    follow (&bound, rate, 0, 40);
    found = bound.bytes[BACKLOG_DATA];
    assert (found <= rate * 2 || found == 64 * KIB);
    assert (found >= rate / 4 || found == MIB * UINT64_C (1024));
  }
}

/* The disk was quick and has become slow: few connections are lost until the
 * bound fits.
 */
static void
test_bound_comes_down (void)
{
  struct flush_bound bound = new_bound ();

  follow (&bound, UINT64_C (8) << 30, 0, 40);
  assert (bound.bytes[BACKLOG_DATA] >= 512u * MIB);
  follow (&bound, 8 * MIB, 0, 3);
  assert (bound.bytes[BACKLOG_DATA] <= 16 * MIB);
  follow (&bound, 256 * KIB, 0, 3);
  assert (bound.bytes[BACKLOG_DATA] <= 512 * KIB);
  follow (&bound, UINT64_C (8) << 30, 0, 20);
  assert (bound.bytes[BACKLOG_DATA] >= 512u * MIB);
}

/* A smaller bound does not help where each flush takes a constant time. */
static void
test_bound_is_kept_where_less_does_not_help (void)
{
  struct flush_bound bound = new_bound ();

  follow (&bound, UINT64_C (8) << 30, 0, 8);
  assert (bound.bytes[BACKLOG_DATA] >= 64u * MIB);
  follow (&bound, UINT64_C (8) << 30, 3 * S_NS, 50);
  assert (bound.bytes[BACKLOG_DATA] >= 4u * MIB);
  follow (&bound, UINT64_C (8) << 30, S_NS / 10, 20);
  assert (bound.bytes[BACKLOG_DATA] >= 512u * MIB);
}

static void
test_room_is_shared (void)
{
  struct flush_bound bound = new_bound ();
  uint64_t all = bound.bytes[BACKLOG_DATA], used[BACKLOG_KINDS] = { 0, 0 };

  assert (flush_bound_room (&bound, used, BACKLOG_DATA, all + 1) == all);
  used[BACKLOG_ZEROES] = bound.bytes[BACKLOG_ZEROES] / 2;
  assert (flush_bound_room (&bound, used, BACKLOG_DATA, all / 4) == all / 4);
  assert (flush_bound_room (&bound, used, BACKLOG_DATA, all) <= all / 2);
  used[BACKLOG_DATA] = all / 2;
  assert (flush_bound_room (&bound, used, BACKLOG_DATA, 4096) == 0);
  /* Quick answers alone do not raise the bound; slow ones lower it. */
  flush_bound_zeroed (&bound, all, 1);
  assert (bound.bytes[BACKLOG_ZEROES] == all);
  flush_bound_zeroed (&bound, all, 5 * S_NS);
  assert (bound.bytes[BACKLOG_ZEROES] < all / 2);
  assert (bound.bytes[BACKLOG_DATA] == all);
}

/* --- with servers ------------------------------------------------------ */

static void
make_site (uint32_t nr_peers, uint32_t region_size, enum nbdm_policy policy)
{
  memset (&site, 0, sizeof site);
  site.seed = site_seed (1);
  site.size = SIZE;
  site.region_size = region_size;
  site.hold_ms = 100;
  site.nr_peers = nr_peers;
  site.peer = peer;
  peer = (struct peer_params){ .no_fua = false };
  site_make (&site);
  site.params.policy = policy;
  for (uint32_t i = 0; i < nr_peers; i++)
    site.params.remotes[i].deadline_ms = DEADLINE_MS;
  site_open (&site);
  for (uint32_t i = 0; i < SIZE; i++)
    bytes[i] = (uint8_t)(1 + i / 4096);
}

static void
in_sync_site (uint32_t nr_peers, enum nbdm_policy policy)
{
  make_site (nr_peers, 64 * KIB, policy);
  for (uint32_t i = 0; i < nr_peers; i++) {
    site_connect (&site, i);
    site_resync_to_end (&site, i);
    assert (site_status (&site, i).state == NBDM_IN_SYNC);
  }
}

/* Never lost, not even for a moment: no keeper is here to connect it again. */
static void
assert_equal (void)
{
  for (uint32_t i = 0; i < site.nr_peers; i++) {
    assert (site_status (&site, i).remote.admitted);
    assert (site_status (&site, i).state == NBDM_IN_SYNC);
    assert (site_status (&site, i).dirty_regions == 0);
    assert (memcmp (site.image, peer_image (site.peers[i]), SIZE) == 0);
  }
}

/* In calls of any length, each of which must make progress. */
static void
test_resync_fits (void)
{
  static const uint32_t sizes[] = { 4 * KIB, 64 * KIB, 4 * MIB };

  for (unsigned i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
    struct nbdm_resync batch
        = { .max_bytes = UINT64_MAX, .pace = { .depth = 16 } };

    make_site (1, sizes[i], NBDM_DEGRADE);
    assert (nbdm_pwrite (site.volume, bytes, SIZE, 0, 0) == 0);
    site_connect (&site, 0);
    assert (site_status (&site, 0).dirty_regions == SIZE / sizes[i]);
    peer_slow_flushes (site.peers[0], 0, RATE);
    assert (site_resync (&site, 0, &batch) == 0);
    assert (batch.copied_bytes == SIZE);
    assert_equal ();
    site_end (&site);
  }
}

/* Much is written and never flushed; then comes the flush. */
static void
test_clients_flush_fits (enum nbdm_policy policy)
{
  in_sync_site (1, policy);
  peer_slow_flushes (site.peers[0], 0, RATE);
  assert (nbdm_pwrite (site.volume, bytes, 2 * MIB, 0, 0) == 0);
  for (uint32_t at = 2 * MIB; at < SIZE; at += 256 * KIB)
    assert (nbdm_pwrite (site.volume, bytes + at, 256 * KIB, at, 0) == 0);
  assert (nbdm_flush (site.volume) == 0);
  assert_equal ();
  site_end (&site);
}

static void
test_clients_flush_fits_under_degrade (void)
{
  test_clients_flush_fits (NBDM_DEGRADE);
}

static void
test_clients_flush_fits_under_stop (void)
{
  test_clients_flush_fits (NBDM_STOP);
}

/* A durable write is answered as late as a flush would be. */
static void
test_fua_fits (bool no_fua)
{
  peer.no_fua = no_fua;
  in_sync_site (1, NBDM_STOP);
  peer_slow_flushes (site.peers[0], 0, RATE);
  assert (nbdm_pwrite (site.volume, bytes, 3 * MIB, 0, NBDM_FUA) == 0);
  assert_equal ();
  site_end (&site);
}

static void
test_fua_fits_a_server_with_it (void)
{
  test_fua_fits (false);
}

static void
test_fua_fits_a_server_without_it (void)
{
  test_fua_fits (true);
}

/* --- loads ------------------------------------------------------------- */

#define THREADS 6

static void *
load (void *opaque)
{
  uintptr_t number = (uintptr_t)opaque;
  uint64_t share = SIZE / THREADS / 4096 * 4096, random = number + 1;

  for (unsigned i = 0; i < 12; i++) {
    uint32_t count = (uint32_t)(peer_random (&random) % 100 + 1) * 4096;
    uint64_t offset
        = number * share + peer_random (&random) % (share - count) / 512 * 512;
    uint32_t flags = i % 6 == 5 ? NBDM_FUA : 0;

    if (i % 4 == 3)
      assert (nbdm_zero (site.volume, count, offset, flags) == 0);
    else
      assert (nbdm_pwrite (site.volume, bytes, count, offset, flags) == 0);
  }
  return NULL;
}

static void
run_load (void)
{
  pthread_t threads[THREADS];

  for (uintptr_t i = 0; i < THREADS; i++)
    assert (pthread_create (&threads[i], NULL, load, (void *)i) == 0);
  for (unsigned i = 0; i < THREADS; i++)
    pthread_join (threads[i], NULL);
}

/* Clients wait for room on the one and on the other. */
static void
test_two_slow_remotes_under_load (void)
{
  in_sync_site (2, NBDM_STOP);
  peer_slow_flushes (site.peers[0], 5, 2 * RATE);
  peer_slow_flushes (site.peers[1], 5, 2 * RATE);
  run_load ();
  assert (nbdm_flush (site.volume) == 0);
  assert_equal ();
  site_end (&site);
}

static void
test_a_slow_and_a_quick_remote (void)
{
  in_sync_site (2, NBDM_DEGRADE);
  peer_slow_flushes (site.peers[1], 0, RATE);
  assert (nbdm_pwrite (site.volume, bytes, SIZE, 0, 0) == 0);
  assert (nbdm_flush (site.volume) == 0);
  assert_equal ();
  assert (site_status (&site, 0).remote.flush_bound
          > site_status (&site, 1).remote.flush_bound);
  assert (site_status (&site, 1).remote.flush_bound <= 2 * MIB);
  site_end (&site);
}

static void *
resync_at (void *batch)
{
  while (site_status (&site, 0).state == NBDM_RESYNCING)
    assert (site_resync (&site, 0, batch) == 0);
  return NULL;
}

/* Neither keeps the other from its share. */
static void
test_resync_beside_clients (void)
{
  struct nbdm_resync batch
      = { .max_bytes = UINT64_MAX, .pace = { .depth = 8 } };
  pthread_t thread;

  make_site (1, 64 * KIB, NBDM_DEGRADE);
  assert (nbdm_pwrite (site.volume, bytes, SIZE, 0, 0) == 0);
  site_connect (&site, 0);
  peer_slow_flushes (site.peers[0], 0, 2 * RATE);
  assert (pthread_create (&thread, NULL, resync_at, &batch) == 0);
  run_load ();
  pthread_join (thread, NULL);
  assert (nbdm_flush (site.volume) == 0);
  assert_equal ();
  site_end (&site);
}

/* The disk becomes slow between two flushes.  Connections are lost until the
 * server has written what the first of them left in its cache; the bound is
 * smaller from the first on.
 */
static void
test_quick_disk_becomes_slow (void)
{
  uint64_t before;
  unsigned lost = 0;
  time_t until = time (NULL) + SITE_DEADLINE_S;

  in_sync_site (1, NBDM_DEGRADE);
  for (unsigned i = 0; i < 4; i++) {
    assert (nbdm_pwrite (site.volume, bytes, SIZE, 0, 0) == 0);
    assert (nbdm_flush (site.volume) == 0);
  }
  before = site_status (&site, 0).remote.flush_bound;
  assert (before >= 2 * MIB);
  peer_slow_flushes (site.peers[0], 0, MIB);
  assert (nbdm_pwrite (site.volume, bytes + 4096, MIB, 0, 0) == 0);
  assert (nbdm_flush (site.volume) == 0);
  while (site_status (&site, 0).state != NBDM_IN_SYNC) {
    struct nbdm_resync batch
        = { .max_bytes = UINT64_MAX, .pace = { .depth = 8 } };

    assert (time (NULL) < until);
    if (!site_status (&site, 0).remote.connected) {
      assert (strstr (site_status (&site, 0).reason, "a flush was not"));
      lost++;
      site_connect (&site, 0);
    }
    nbdm_remote_release_late (site.volume, 1);
    nbdm_disk_resync (site.volume, 1, &batch);
  }
  assert (lost > 0 && lost <= 4);
  assert (site_status (&site, 0).remote.flush_bound < MIB);
  assert_equal ();
  site_end (&site);
}

/* --- zeroes, and slow links -------------------------------------------- */

/* A server that writes what it is to zero, before it answers or behind its
 * cache, gets pieces that fit.
 */
static void
test_zeroes_fit (void)
{
  peer.zero_bytes_per_ms = RATE / 1000;
  in_sync_site (1, NBDM_STOP);
  assert (nbdm_pwrite (site.volume, bytes, SIZE, 0, 0) == 0);
  assert (nbdm_zero (site.volume, SIZE, 0, 0) == 0);
  assert (nbdm_flush (site.volume) == 0);
  assert_equal ();
  assert (site.image[SIZE - 1] == 0);
  site_end (&site);
}

static uint64_t
now_ms (void)
{
  struct timespec now;

  clock_gettime (CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

/* In sync, and the bound is that of a disk which was slow all the time. */
static void
slow_site (enum nbdm_policy policy)
{
  make_site (1, 64 * KIB, policy);
  peer_slow_flushes (site.peers[0], 0, 2 * RATE);
  site_connect (&site, 0);
  site_resync_to_end (&site, 0);
}

/* A client waits one deadline for its trim; resync zeroes the rest. */
static void
test_long_trim_is_left_to_resync (void)
{
  uint64_t start, took;

  peer.no_zeroes = true;
  slow_site (NBDM_DEGRADE);
  assert (nbdm_pwrite (site.volume, bytes, 4096, 0, 0) == 0);
  assert (nbdm_pwrite (site.volume, bytes, 4096, SIZE - 4096, 0) == 0);
  peer_slow_flushes (site.peers[0], 0, RATE / 2);
  start = now_ms ();
  assert (nbdm_trim (site.volume, SIZE, 0, 0) == 0);
  took = now_ms () - start;
  assert (site_status (&site, 0).state == NBDM_RESYNCING);
  assert (site_status (&site, 0).dirty_regions > 0);
  assert (site_status (&site, 0).remote.late_regions == 0);
  assert (took >= DEADLINE_MS && took < 3 * DEADLINE_MS);
  assert (site.image[0] == 0 && site.image[SIZE - 1] == 0);
  /* The next trim does not wait. */
  start = now_ms ();
  assert (nbdm_trim (site.volume, SIZE, 0, 0) == 0);
  assert (now_ms () - start < DEADLINE_MS);
  peer_slow_flushes (site.peers[0], 0, 0);
  site_resync_to_end (&site, 0);
  assert_equal ();
  site_end (&site);
}

static void
test_long_trim_is_sent_under_stop (void)
{
  peer.no_zeroes = true;
  slow_site (NBDM_STOP);
  assert (nbdm_pwrite (site.volume, bytes, 4096, SIZE - 4096, 0) == 0);
  peer_slow_flushes (site.peers[0], 0, RATE);
  assert (nbdm_trim (site.volume, SIZE, 0, 0) == 0);
  assert_equal ();
  site_end (&site);
}

static uint32_t longest;

static void
note_length (void *opaque, const struct peer_command *cmd)
{
  (void)opaque;
  if (cmd->type == PEER_WRITE && cmd->length > longest)
    longest = cmd->length;
}

/* A region of 4 MiB takes minutes on a slow link. It is sent in pieces, as many
 * at a time as the pace allows; otherwise a client would wait for all of it.
 */
static void
test_long_region_travels_in_pieces (void)
{
  struct nbdm_resync batch = { .max_bytes = UINT64_MAX,
                               .pace = { .depth = 2, .copy_bytes = 64 * KIB } };
  pthread_t thread;

  peer.applied = note_length;
  longest = 0;
  make_site (1, 4 * MIB, NBDM_DEGRADE);
  assert (nbdm_pwrite (site.volume, bytes, SIZE, 0, 0) == 0);
  site_connect (&site, 0);
  peer_slow_flushes (site.peers[0], 10, 0);
  assert (pthread_create (&thread, NULL, resync_at, &batch) == 0);
  while (site_status (&site, 0).state == NBDM_RESYNCING)
    assert (site_status (&site, 0).remote.outstanding <= 3); /* and a flush */
  pthread_join (thread, NULL);
  assert (longest == 64 * KIB);
  assert_equal ();
  site_end (&site);
}

/* Too slow for any amount: what helps is said. */
static void
test_hopeless_disk_is_named (void)
{
  in_sync_site (1, NBDM_DEGRADE);
  peer_slow_flushes (site.peers[0], 3 * DEADLINE_MS, 0);
  assert (nbdm_pwrite (site.volume, bytes, 4096, 0, 0) == 0);
  assert (nbdm_flush (site.volume) == 0);
  assert (site_status (&site, 0).state == NBDM_OUT_OF_SYNC);
  assert (strstr (site_status (&site, 0).reason, "too slow"));
  assert (strstr (site_status (&site, 0).reason, "`deadline`"));
  site_end (&site);
}

int
main (void)
{
  alarm (150); /* nothing here may hang */
  RUN (test_bound_finds_the_rate);
  RUN (test_bound_comes_down);
  RUN (test_bound_is_kept_where_less_does_not_help);
  RUN (test_room_is_shared);
  RUN (test_resync_fits);
  RUN (test_clients_flush_fits_under_degrade);
  RUN (test_clients_flush_fits_under_stop);
  RUN (test_fua_fits_a_server_with_it);
  RUN (test_fua_fits_a_server_without_it);
  RUN (test_two_slow_remotes_under_load);
  RUN (test_a_slow_and_a_quick_remote);
  RUN (test_resync_beside_clients);
  RUN (test_quick_disk_becomes_slow);
  RUN (test_zeroes_fit);
  RUN (test_long_trim_is_left_to_resync);
  RUN (test_long_trim_is_sent_under_stop);
  RUN (test_long_region_travels_in_pieces);
  RUN (test_hopeless_disk_is_named);
  return 0;
}
