/* SPDX-License-Identifier: BSD-3-Clause */

/* A primary and another node, whose disk is a server inside the test: which
 * writes begin a generation, when the node is in sync, and what a session
 * leaves in the maps.
 *
 * Each test asks the rule of generations: a write that was answered and that
 * the other node lacks is of a generation which that node cannot hold.
 */

#include "api.h"
#include "logs/lineage.h"
#include "volume/local_state.h"
#include "volume/state.h"
#include "site.h"

#define REGION 4096u
#define REGIONS 64u

static struct site site;

/* --- the site ----------------------------------------------------------- */

static struct nbdm_node
record (void)
{
  struct nbdm_node node;

  assert (nbdm_node_get (site.volume, &node) == 0);
  return node;
}

static void
store (const struct nbdm_node *before, const struct nbdm_node *after)
{
  assert (nbdm_node_store (site.volume, before, after) == 0);
}

/* As the control thread does at the end of a resync: see rules/generation.py.
 */
static void
count (void)
{
  struct nbdm_node before = record (), after = before;

  memset (after.peers[0].bases, 0, sizeof after.peers[0].bases);
  after.peers[0].shared = 1;
  store (&before, &after);
}

/* A new pair, of which this node was promoted; the other one was counted, or
 * was never met.
 */
static void
make (bool counted)
{
  site = (struct site){ .size = REGIONS * REGION,
                        .region_size = REGION,
                        .nr_peers = 1,
                        .node = "alpha",
                        .seed = 1 };
  site_make (&site);
  site_promote (&site, counted);
  site_open (&site);
}

static void
write_regions (unsigned first, unsigned nr, uint8_t value)
{
  static uint8_t buf[REGIONS * REGION];

  memset (buf, value, nr * REGION);
  assert (nbdm_pwrite (site.volume, buf, nr * REGION, first * REGION, 0) == 0);
}

static uint64_t
map_of (uint32_t map)
{
  uint64_t bits = 0;

  assert (nbdm_node_map (site.volume, 1, map, (uint8_t *)&bits, sizeof bits)
          == 0);
  return bits;
}

static void
mark (uint32_t map, uint64_t bits)
{
  assert (
      nbdm_node_mark (site.volume, 1, map, (const uint8_t *)&bits, sizeof bits)
      == 0);
}

static void
resync (void)
{
  struct nbdm_resync batch = { .max_bytes = 1u << 20, .pace.depth = 4 };

  while (site_status (&site, 0).dirty_regions > 0) {
    nbdm_remote_release_late (site.volume, 1); /* a claim fences late writes */
    assert (nbdm_disk_resync (site.volume, 1, &batch) == 0);
    batch.first_region = batch.next_region;
  }
}

/* Resync all, and count the node. */
static void
join (void)
{
  site_connect (&site, 0);
  mark (NBDM_MAP_DIRTY, UINT64_MAX);
  resync ();
  count ();
  assert (site_status (&site, 0).state == NBDM_IN_SYNC);
}

/* The present generation began with the one `before`, for a write that the
 * node misses.
 */
static void
assert_began (const struct nbdm_node *before)
{
  struct nbdm_node now = record (), expect = *before;
  bool missing = true;

  assert (now.generation != before->generation);
  lineage_begin (&expect, now.generation, &missing);
  assert (memcmp (&now, &expect, sizeof now) == 0);
  assert (!now.peers[0].shared && now.peers[0].bases[0] == before->generation);
}

static void
assert_same_record (const struct nbdm_node *before)
{
  struct nbdm_node now = record ();

  assert (memcmp (&now, before, sizeof now) == 0);
}

static void
assert_equal_disks (void)
{
  assert (nbdm_flush (site.volume) == 0);
  assert (memcmp (site.image, peer_image (site.peers[0]), site.size) == 0);
}

/* --- in sync ------------------------------------------------------------- */

static void
test_nodes_engine_in_sync_needs_a_counted_node (void)
{
  struct nbdm_disk_status status;

  make (false);
  write_regions (0, 8, 1);
  site_connect (&site, 0);
  mark (NBDM_MAP_DIRTY, UINT64_MAX);
  resync ();
  status = site_status (&site, 0);
  assert (status.state == NBDM_RESYNCING && status.dirty_regions == 0);
  assert (status.remote.admitted && status.remote.is_node);
  count ();
  assert (site_status (&site, 0).state == NBDM_IN_SYNC);
  assert_equal_disks ();
  site_end (&site);
}

/* A clean stop in sync: the next start waits for it, as it misses nothing. */
static void
test_nodes_engine_counted_node_is_held_at_a_start (void)
{
  make (false);
  join ();
  assert (nbdm_stop (site.volume) == 0);
  nbdm_close (site.volume);
  site.params.hold_ms = 60000;
  site_open (&site);
  assert (site_status (&site, 0).state == NBDM_HOLDING);
  site_connect (&site, 0);
  assert (site_status (&site, 0).state == NBDM_IN_SYNC);
  site_end (&site);
}

static void
test_nodes_engine_a_store_that_counts_no_more_ends_in_sync (void)
{
  struct nbdm_node before, after;

  make (false);
  join ();
  before = after = record ();
  after.peers[0].bases[0] = 999;
  store (&before, &after);
  assert (site_status (&site, 0).state == NBDM_RESYNCING);
  count ();
  assert (site_status (&site, 0).state == NBDM_IN_SYNC);
  site_end (&site);
}

/* --- doubts --------------------------------------------------------------- */

static void
test_nodes_engine_a_copy_clears_dirty_and_doubts (void)
{
  make (false);
  join ();
  mark (NBDM_MAP_DOUBTS, 0xf0);
  mark (NBDM_MAP_DIRTY, 0x30);
  resync ();
  assert (map_of (NBDM_MAP_DIRTY) == 0);
  assert (map_of (NBDM_MAP_DOUBTS) == 0xc0);
  assert (site_status (&site, 0).remote.doubts == 2);
  site_end (&site);
}

/* The page cache may be lost as soon as the other node is told. */
static void
test_nodes_engine_a_call_is_durable_when_it_returns (void)
{
  const struct dirty_map *dm;
  struct nbdm_status before, after;

  make (false);
  dm = &site.volume->remotes[0].disk.dm;
  for (unsigned step = 0; step < 3; step++) {
    nbdm_get_status (site.volume, &before);
    if (step == 0)
      mark (NBDM_MAP_DIRTY, 1);
    else if (step == 1)
      mark (NBDM_MAP_DOUBTS, 2);
    else
      count ();
    nbdm_get_status (site.volume, &after);
    assert (!dm->changed);
    assert (after.superblock_persists > before.superblock_persists);
    assert (step == 2 || after.dirty_persists > before.dirty_persists);
  }
  assert (nbdm_stop (site.volume) == 0);
  nbdm_close (site.volume);
  site.params.primary = 0;
  site_open (&site);
  dm = &site.volume->remotes[0].disk.dm;
  write_regions (0, 1, 1);
  for (unsigned step = 0; step < 2; step++) {
    nbdm_get_status (site.volume, &before);
    assert ((step == 0 ? nbdm_node_session_lost (site.volume)
                       : nbdm_node_clear (site.volume, 1))
            == 0);
    nbdm_get_status (site.volume, &after);
    assert (!dm->changed);
    assert (after.superblock_persists > before.superblock_persists);
    assert (after.dirty_persists > before.dirty_persists);
  }
  site_end (&site);
}

/* --- which writes begin a generation -------------------------------------- */

static void
test_nodes_engine_no_generation_while_the_node_gets_all (void)
{
  struct nbdm_node before;

  make (false);
  join ();
  before = record ();
  write_regions (3, 5, 2);
  assert (nbdm_zero (site.volume, 2 * REGION, REGION, 0) == 0);
  assert_same_record (&before);
  assert (map_of (NBDM_MAP_DIRTY) == 0);
  assert_equal_disks ();
  site_end (&site);
}

/* An outage in which no client writes costs no generation. */
static void
test_nodes_engine_no_generation_with_an_outage_alone (void)
{
  struct nbdm_node before;

  make (false);
  join ();
  before = record ();
  write_regions (3, 1, 2); /* answered, and not flushed there */
  peer_cut (site.peers[0], false);
  site_wait_state (&site, 0, NBDM_OUT_OF_SYNC);
  assert_same_record (&before);
  site_connect (&site, 0);
  resync ();
  assert (site_status (&site, 0).state == NBDM_IN_SYNC);
  assert_same_record (&before);
  write_regions (4, 1, 3);
  assert_same_record (&before);
  site_end (&site);
}

static void
test_nodes_engine_the_first_missed_write_begins_one (void)
{
  struct nbdm_node before, after;

  make (false);
  join ();
  before = record ();
  peer_cut (site.peers[0], false);
  site_wait_state (&site, 0, NBDM_OUT_OF_SYNC);
  write_regions (9, 2, 2);
  assert_began (&before);
  after = record ();
  write_regions (20, 2, 2);
  assert_same_record (&after);
  assert (map_of (NBDM_MAP_DIRTY) == (UINT64_C (3) << 9 | UINT64_C (3) << 20));
  /* What is copied does not make it hold the generation. */
  site_connect (&site, 0);
  resync ();
  assert (site_status (&site, 0).state == NBDM_RESYNCING);
  assert_same_record (&after);
  site_end (&site);
}

static void *
write_under_way (void *opaque)
{
  (void)opaque;
  write_regions (5, 1, 7);
  return NULL;
}

/* The write was sent, and the node is lost before it answers. */
static void
test_nodes_engine_a_write_under_way_begins_one (void)
{
  struct nbdm_node before;
  pthread_t writer;

  make (false);
  join ();
  before = record ();
  peer_hold (site.peers[0], PEER_HOLD_ANSWERS);
  assert (pthread_create (&writer, NULL, write_under_way, NULL) == 0);
  WAIT_FOR (site_status (&site, 0).remote.outstanding > 0);
  peer_cut (site.peers[0], false);
  pthread_join (writer, NULL);
  assert_began (&before);
  assert (map_of (NBDM_MAP_DIRTY) & 1u << 5);
  site_end (&site);
}

/* The same within a hold: the write is sent again, and the node has it. */
static void
test_nodes_engine_a_write_sent_again_begins_none (void)
{
  struct nbdm_node before;
  pthread_t writer;

  make (false);
  join ();
  site.volume->hold_ms = 60000;
  before = record ();
  peer_hold (site.peers[0], PEER_HOLD_ANSWERS);
  assert (pthread_create (&writer, NULL, write_under_way, NULL) == 0);
  WAIT_FOR (site_status (&site, 0).remote.outstanding > 0);
  peer_cut (site.peers[0], false);
  site_wait_state (&site, 0, NBDM_HOLDING);
  peer_hold (site.peers[0], PEER_GO);
  site_connect (&site, 0);
  pthread_join (writer, NULL);
  resync ();
  assert_same_record (&before);
  assert (site_status (&site, 0).state == NBDM_IN_SYNC);
  assert_equal_disks ();
  site_end (&site);
}

/* The node shares the generation and is copied to: a write of a region that
 * comes later is answered without it.
 */
static void
test_nodes_engine_a_write_left_to_resync_begins_one (void)
{
  struct nbdm_node before;

  make (true);
  site_connect (&site, 0);
  mark (NBDM_MAP_DIRTY, 0xff00);
  assert (site_status (&site, 0).state == NBDM_RESYNCING);
  before = record ();
  write_regions (3, 2, 4); /* the node gets it */
  assert_same_record (&before);
  write_regions (6, 4, 5); /* it gets half of it */
  assert_began (&before);
  resync ();
  assert (site_status (&site, 0).state == NBDM_RESYNCING);
  count ();
  assert (site_status (&site, 0).state == NBDM_IN_SYNC);
  assert_equal_disks ();
  site_end (&site);
}

/* What the node was offered counts as held. */
static void
test_nodes_engine_a_missed_write_after_an_offer_begins_one (void)
{
  struct nbdm_node before, after;

  make (false);
  site_connect (&site, 0);
  mark (NBDM_MAP_DIRTY, UINT64_MAX);
  resync ();
  before = after = record ();
  after.peers[0].shared = 1;
  after.peers[0].bases[0] = 900;
  store (&before, &after);
  assert (site_status (&site, 0).state == NBDM_RESYNCING);
  peer_cut (site.peers[0], false);
  site_wait_state (&site, 0, NBDM_OUT_OF_SYNC);
  write_regions (1, 1, 2);
  assert_began (&after);
  assert (record ().peers[0].bases[1] == 900);
  site_end (&site);
}

/* --- a node that takes its image for whole ---------------------------------
 */

/* In sync; it has adopted, and so calls its image one of an instant. */
static void
make_whole (void)
{
  make (true);
  join ();
  assert (nbdm_node_whole (site.volume, 1) == 0);
}

/* It lacks region 1.  A later write that it got beside that would make its
 * image one of no instant, and it would not know.
 */
static void
assert_gets_no_later_write (void)
{
  uint8_t before = peer_image (site.peers[0])[5 * REGION];

  write_regions (5, 1, 77);
  assert (site_status (&site, 0).state == NBDM_OUT_OF_SYNC);
  assert (!site_status (&site, 0).remote.admitted);
  assert (peer_image (site.peers[0])[5 * REGION] == before);
  assert (nbdm_node_whole (site.volume, 1) == -EAGAIN);
  site_connect (&site, 0); /* it was told, as it was met */
  write_regions (6, 1, 78);
  resync ();
  count ();
  assert (site_status (&site, 0).state == NBDM_IN_SYNC);
  assert_equal_disks ();
  site_end (&site);
}

static void
test_nodes_engine_whole_and_invalidated (void)
{
  make_whole ();
  assert (nbdm_remote_invalidate (site.volume, 1) == 0);
  assert (!site_status (&site, 0).remote.admitted);
  mark (NBDM_MAP_DIRTY, 2);
  assert_gets_no_later_write ();
}

static void
test_nodes_engine_whole_and_marked (void)
{
  make_whole ();
  mark (NBDM_MAP_DIRTY, 2);
  assert (!site_status (&site, 0).remote.admitted);
  assert_gets_no_later_write ();
}

/* Whatever made a region dirty: the next write finds it. */
static void
test_nodes_engine_whole_and_dirty (void)
{
  struct nbdm *v;

  make_whole ();
  v = site.volume;
  pthread_mutex_lock (&v->lock);
  mark_dirty_locked (&v->remotes[0], REGION, REGION, false);
  pthread_mutex_unlock (&v->lock);
  assert_gets_no_later_write ();
}

/* A node that is copied to knows: it stays connected. */
static void
test_nodes_engine_filled_and_invalidated (void)
{
  make (true);
  join ();
  assert (nbdm_remote_invalidate (site.volume, 1) == 0);
  assert (site_status (&site, 0).state == NBDM_RESYNCING);
  assert (nbdm_node_whole (site.volume, 1) == -EAGAIN);
  resync ();
  assert_equal_disks ();
  site_end (&site);
}

/* --- a local disk that misses regions ---------------------------------------
 */

/* The node took the place of the local disk, and is primary later: its resync
 * to this one writes what the new disk misses, and then it is whole.
 */
static void
test_nodes_engine_an_adoption_heals_the_local_disk (void)
{
  struct nbdm_status status;
  struct nbdm_disk_status disk;
  uint64_t all = UINT64_MAX;
  uint8_t buf[REGION];

  make (false);
  join ();
  write_regions (0, 8, 1);
  pthread_mutex_lock (&site.volume->lock);
  assert (local_takeover_relock (site.volume) == 0);
  pthread_mutex_unlock (&site.volume->lock);
  assert (map_of (NBDM_MAP_MISSED) == all); /* it is not open */
  write_regions (4, 8, 2);
  assert (nbdm_stop (site.volume) == 0);
  nbdm_close (site.volume);

  site.params.primary = 0;
  site_open (&site);
  assert (map_of (NBDM_MAP_MISSED) == all);
  assert (nbdm_pwrite (site.volume, buf, REGION, 0, 0) == -EIO);
  assert (nbdm_local_attach (site.volume, site.local, 1) == 0);
  assert (nbdm_disk_admit (site.volume, NBDM_LOCAL) == 0);
  assert (map_of (NBDM_MAP_MISSED) == all);
  assert (nbdm_pread (site.volume, buf, REGION, 0) == -EIO);
  for (unsigned i = 0; i < REGIONS; i++)
    write_regions (i, 1, (uint8_t)(3 + i)); /* the primary's copies */
  assert (nbdm_node_clear (site.volume, 1) == 0);
  assert (map_of (NBDM_MAP_MISSED) == 0);
  assert (nbdm_get_disk_status (site.volume, NBDM_LOCAL, &disk) == 0);
  assert (disk.state == NBDM_LOCAL_OK);
  assert (nbdm_pread (site.volume, buf, REGION, 5 * REGION) == 0);
  assert (buf[0] == 8);
  assert (nbdm_stop (site.volume) == 0);
  nbdm_close (site.volume);
  site_open (&site);
  nbdm_get_status (site.volume, &status);
  assert (status.role == NBDM_SECONDARY);
  assert (map_of (NBDM_MAP_MISSED) == 0);
  site_end (&site);
}

/* --- a record that both change ----------------------------------------------
 */

/* The control thread got the record, and the engine began a generation before
 * the store.
 */
static void
test_nodes_engine_a_store_does_not_undo_a_generation (void)
{
  struct nbdm_node before, after, began;

  make (true); /* not connected: the write is missed */
  before = after = record ();
  after.own_session = 9;
  write_regions (1, 1, 2);
  began = record ();
  assert (began.generation != before.generation);
  assert (nbdm_node_store (site.volume, &before, &after) == -EAGAIN);
  assert_same_record (&began);
  site_end (&site);
}

int
main (void)
{
  RUN (test_nodes_engine_in_sync_needs_a_counted_node);
  RUN (test_nodes_engine_counted_node_is_held_at_a_start);
  RUN (test_nodes_engine_a_store_that_counts_no_more_ends_in_sync);
  RUN (test_nodes_engine_a_copy_clears_dirty_and_doubts);
  RUN (test_nodes_engine_a_call_is_durable_when_it_returns);
  RUN (test_nodes_engine_no_generation_while_the_node_gets_all);
  RUN (test_nodes_engine_no_generation_with_an_outage_alone);
  RUN (test_nodes_engine_the_first_missed_write_begins_one);
  RUN (test_nodes_engine_a_write_under_way_begins_one);
  RUN (test_nodes_engine_a_write_sent_again_begins_none);
  RUN (test_nodes_engine_a_write_left_to_resync_begins_one);
  RUN (test_nodes_engine_a_missed_write_after_an_offer_begins_one);
  RUN (test_nodes_engine_whole_and_invalidated);
  RUN (test_nodes_engine_whole_and_marked);
  RUN (test_nodes_engine_whole_and_dirty);
  RUN (test_nodes_engine_filled_and_invalidated);
  RUN (test_nodes_engine_an_adoption_heals_the_local_disk);
  RUN (test_nodes_engine_a_store_does_not_undo_a_generation);
  return 0;
}
