/* SPDX-License-Identifier: BSD-3-Clause */

/* What a node believes of its files at a start: maps of a program that had no
 * doubts, maps and logs that are lost, and a slot that is open.
 */

#include "api.h"
#include "logs/dirty_map.h"
#include "logs/layout.h"
#include "lone_volume.h"

#include <endian.h>

#define BYTES ((NR_REGIONS + 7) / 8)

static uint64_t nr_dirty, nr_doubts;

static void
make_node (void)
{
  describe_volume (SIZE, REGION);
  params.node = "alpha";
  params.remotes[0].is_node = 1;
  params.remotes[0].assume_in_sync = 0;
  create_volume ();
}

static void
count (struct nbdm *v)
{
  uint8_t bits[2][BYTES];

  nr_dirty = nr_doubts = 0;
  for (unsigned map = 0; map < 2; map++)
    assert (nbdm_node_map (v, 1, map, bits[map], BYTES) == 0);
  for (unsigned i = 0; i < NR_REGIONS; i++) {
    nr_dirty += bits[0][i / 8] >> i % 8 & 1;
    nr_doubts += bits[1][i / 8] >> i % 8 & 1;
  }
}

static uint32_t
crash (struct nbdm *v)
{
  struct nbdm_node node;

  assert (nbdm_node_get (v, &node) == 0);
  return node.crash;
}

static void
is_doubted (struct nbdm *v)
{
  count (v);
  assert (nr_dirty == 0 && nr_doubts == NR_REGIONS);
  assert (remote (v).remote.late_regions == 0);
  assert (remote (v).state == NBDM_OUT_OF_SYNC);
}

static void
is_empty (struct nbdm *v)
{
  count (v);
  assert (nr_dirty == 0 && nr_doubts == 0);
  assert (crash (v) == NBDM_CRASH_NONE);
}

/* --- maps of a program that had no doubts --------------------------------- */

static bool
slots_have (uint64_t feature)
{
  struct disk_superblock slots[2];
  int fd = openat (site.fd, "superblock", O_RDONLY);
  bool both;

  assert (fd >= 0 && pread (fd, slots, sizeof slots, 0) == sizeof slots);
  both = (le64toh (slots[0].incompatible) & feature)
         && (le64toh (slots[1].incompatible) & feature);
  close (fd);
  return both;
}

/* As the first program that made volumes of nodes did. */
static void
take_doubts_away (void *opaque)
{
  struct disk_superblock sb;
  struct disk_nodes nodes;
  bool torn;
  int fd = openat (site.fd, "superblock", O_RDWR);

  (void)opaque;
  assert (fd >= 0 && superblock_load (fd, &sb, &nodes, &torn) == 0);
  sb.incompatible &= ~htole64 (FEATURE_DOUBTS);
  assert (superblock_store (fd, &sb, &nodes) == 0);
  assert (superblock_store (fd, &sb, &nodes) == 0);
  close (fd);
  assert (dirty_map_create (site.fd, "dr", sb.uuid, le64toh (sb.session),
                            NR_REGIONS, REGION, 0)
          == 0);
}

static void
test_nodes_opening_maps_without_doubts_are_made_anew (void)
{
  make_node ();
  assert (slots_have (FEATURE_DOUBTS));
  assert (file_size (&site, "dirty.dr") == LAYOUT_PAGE * (1 + NR_NODE_MAPS));
  assert (passed (in_child (NULL, take_doubts_away, NULL)));
  assert (!slots_have (FEATURE_DOUBTS));
  check_in_child (is_doubted);
  assert (slots_have (FEATURE_DOUBTS));
  assert (file_size (&site, "dirty.dr") == LAYOUT_PAGE * (1 + NR_NODE_MAPS));
  check_in_child (is_doubted);
  end_volume ();
}

/* A map that has them, without the last of its pages. */
static void
test_nodes_opening_a_map_that_lacks_its_doubts_is_lost (void)
{
  int fd;

  make_node ();
  fd = openat (site.fd, "dirty.dr", O_RDWR);
  assert (fd >= 0 && ftruncate (fd, LAYOUT_PAGE * (1 + NR_MAPS)) == 0);
  close (fd);
  check_in_child (is_doubted);
  assert (faccessat (site.fd, "dirty.dr~bad", F_OK, 0) == 0);
  end_volume ();
}

/* --- lost logs -------------------------------------------------------------
 */

static void
test_nodes_opening_lost_logs_are_doubts (void)
{
  static const char *const logs[] = { "dirty.dr", "activity", "inflight" };

  for (unsigned i = 0; i < sizeof logs / sizeof logs[0]; i++) {
    make_node ();
    check_in_child (is_empty);
    assert (unlinkat (site.fd, logs[i], 0) == 0);
    check_in_child (is_doubted);
    check_in_child (is_doubted); /* until a handshake decides */
    end_volume ();
  }
}

/* Plain remotes have no fifth map, beside nodes either. */
static void
test_nodes_opening_plain_maps_keep_their_size (void)
{
  describe_volume (SIZE, REGION);
  create_volume ();
  assert (!slots_have (FEATURE_NODES) && !slots_have (FEATURE_DOUBTS));
  assert (file_size (&site, "dirty.dr") == LAYOUT_PAGE * (1 + NR_MAPS));
  end_volume ();
}

/* --- an open slot -----------------------------------------------------------
 */

static void
one_region_is_doubted (struct nbdm *v)
{
  count (v);
  assert (nr_dirty == 0 && nr_doubts == 1);
  assert (crash (v) == NBDM_CRASH_PROCESS);
}

static void
an_extent_is_doubted (struct nbdm *v)
{
  count (v);
  assert (nr_dirty == 0 && nr_doubts == EXTENT / REGION);
  assert (crash (v) == NBDM_CRASH_HOST);
}

static void
test_nodes_opening_a_slot_is_doubted_as_far_as_it_goes (void)
{
  static const char *const points[]
      = { "slot_reserved=kill", "after_log=kill", "after_local=kill",
          "before_retire=kill" };

  for (unsigned i = 0; i < sizeof points / sizeof points[0]; i++) {
    make_node ();
    killed_at (points[i], 3 * REGION);
    check_in_child (one_region_is_doubted);
    end_volume ();
    make_node ();
    killed_at (points[i], 3 * REGION);
    reboot ();
    check_in_child (an_extent_is_doubted);
    end_volume ();
  }
}

/* With a third node all active extents are doubted: it may lack a write whose
 * slot is retired.
 */
static void
test_nodes_opening_three_nodes_doubt_active_extents (void)
{
  describe_volume (SIZE, REGION);
  params.node = "alpha";
  params.nr_remotes = 2;
  params.remotes[1] = params.remotes[0];
  params.remotes[1].name = "third";
  for (unsigned i = 0; i < 2; i++) {
    params.remotes[i].is_node = 1;
    params.remotes[i].assume_in_sync = 0;
  }
  create_volume ();
  killed_at ("before_answer=kill", 3 * REGION);
  for (unsigned i = 0; i < 2; i++) {
    struct nbdm *v = open_volume ();
    uint8_t bits[BYTES];

    assert (nbdm_node_map (v, 1 + i, NBDM_MAP_DOUBTS, bits, BYTES) == 0);
    for (unsigned r = 0; r < NR_REGIONS; r++)
      assert ((bits[r / 8] >> r % 8 & 1) == (r < EXTENT / REGION));
    assert (crash (v) == NBDM_CRASH_PROCESS);
    assert (nbdm_stop (v) == 0);
    nbdm_close (v);
  }
  end_volume ();
}

int
main (void)
{
  RUN (test_nodes_opening_maps_without_doubts_are_made_anew);
  RUN (test_nodes_opening_a_map_that_lacks_its_doubts_is_lost);
  RUN (test_nodes_opening_lost_logs_are_doubts);
  RUN (test_nodes_opening_plain_maps_keep_their_size);
  RUN (test_nodes_opening_a_slot_is_doubted_as_far_as_it_goes);
  RUN (test_nodes_opening_three_nodes_doubt_active_extents);
  return 0;
}
