/* SPDX-License-Identifier: BSD-3-Clause */

/* A node that was told that it lacks nothing, and then lacks a region.
 *
 * Each test asks one rule: such a node gets no later write, because its image
 * would lack an earlier write and have a later one, and its record would still
 * call it consistent.  It is connected again, and told so first.
 */

#include "api.h"
#include "volume/volume.h"
#include "site.h"
#include "tls_relay.h"

#define REGION 65536u
#define REGIONS 64u
#define LONG (1u << 20) /* as of long_zero.c */

static struct site site;
static bool local_is_full;

int __real_local_zero (struct nbdm *v, uint64_t length, uint64_t offset,
                       bool may_trim);
int __wrap_local_zero (struct nbdm *v, uint64_t length, uint64_t offset,
                       bool may_trim);

int
__wrap_local_zero (struct nbdm *v, uint64_t length, uint64_t offset,
                   bool may_trim)
{
  return local_is_full ? -ENOSPC
                       : __real_local_zero (v, length, offset, may_trim);
}

static void
write_region (unsigned region, uint8_t value)
{
  static uint8_t buf[REGION];

  memset (buf, value, sizeof buf);
  assert (nbdm_pwrite (site.volume, buf, sizeof buf, region * REGION, 0) == 0);
}

/* The byte that the node has at a region. */
static uint8_t
node_has (unsigned region)
{
  return peer_image (site.peers[0])[region * REGION];
}

static void
mark (uint64_t bits)
{
  assert (nbdm_node_mark (site.volume, 1, NBDM_MAP_DIRTY,
                          (const uint8_t *)&bits, sizeof bits)
          == 0);
}

/* A pair in sync; the node refuses zeroes with this errno, unless it is 0. */
static void
make_refusing (uint32_t policy, uint32_t hold_ms, uint32_t refuse_zeroes)
{
  char uri[256];

  site = (struct site){ .size = (uint64_t)REGIONS * REGION,
                        .region_size = REGION,
                        .hold_ms = hold_ms,
                        .nr_peers = 1,
                        .node = "alpha",
                        .peer.refuse_zeroes = refuse_zeroes,
                        .seed = 1 };
  site_make (&site);
  site_promote (&site, true);
  site.params.policy = policy;
  site_open (&site);
  peer_uri (uri, sizeof uri, site.sockets[0]);
  assert (nbdm_remote_connect (site.volume, 1, uri, SITE_DEADLINE_S * 1000)
          == 0);
  assert (nbdm_node_admit (site.volume, 1) == 0);
  assert (site_status (&site, 0).state == NBDM_IN_SYNC);
  for (unsigned i = 0; i < REGIONS; i++)
    write_region (i, 1);
  assert (nbdm_flush (site.volume) == 0); /* what it lost would be dirty */
  assert (node_has (REGIONS - 1) == 1);
}

static void
make (uint32_t policy, uint32_t hold_ms)
{
  make_refusing (policy, hold_ms, 0);
}

static void
assert_left (void)
{
  struct nbdm_disk_status status = site_status (&site, 0);

  assert (!status.remote.admitted && status.dirty_regions > 0);
}

/* --- each event that leaves a region dirty ------------------------------- */

static void
test_nodes_whole_a_long_zero_that_is_left (void)
{
  make (NBDM_DEGRADE, 0);
  site.volume->remotes[0].leaves_zeroes = true; /* an earlier one took long */
  assert (nbdm_zero (site.volume, LONG, 0, 0) == 0);
  write_region (40, 2);
  assert (node_has (0) == 1); /* lacks the zeroes */
  assert (node_has (40) == 1);
  assert_left ();
  site_end (&site);
}

static void
test_nodes_whole_an_operator_makes_all_dirty (void)
{
  make (NBDM_DEGRADE, 0);
  assert (nbdm_remote_invalidate (site.volume, 1) == 0);
  assert_left ();
  write_region (40, 2);
  assert (node_has (40) == 1);
  site_end (&site);
}

/* Both disks refuse it with one error, so neither is the worse one. */
static void
test_nodes_whole_a_write_that_both_refuse (void)
{
  make_refusing (NBDM_DEGRADE, 0, ENOSPC);
  local_is_full = true;
  assert (nbdm_zero (site.volume, REGION, 0, 0) == -ENOSPC);
  local_is_full = false;
  write_region (40, 2);
  assert (node_has (40) == 1);
  assert_left ();
  site_end (&site);
}

/* A node that nobody writes to is met again too. */
static void
test_nodes_whole_it_leaves_without_a_write (void)
{
  make (NBDM_DEGRADE, 0);
  mark (4);
  WAIT_FOR (!site_status (&site, 0).remote.admitted);
  assert_left ();
  site_end (&site);
}

/* --- what stays possible ------------------------------------------------- */

static void
test_nodes_whole_nothing_is_copied_to_it (void)
{
  struct nbdm_resync batch = { .max_bytes = 1u << 20, .pace.depth = 4 };

  make (NBDM_DEGRADE, 0);
  write_region (2, 5);
  mark (4);
  memset (peer_image (site.peers[0]) + 2 * REGION, 7, REGION);
  assert (nbdm_disk_resync (site.volume, 1, &batch) == -ENOTCONN);
  assert (node_has (2) == 7);
  site_end (&site);
}

/* It was told that it is copied to: its writes go on beside the copies. */
static void
test_nodes_whole_a_told_node_gets_writes (void)
{
  make (NBDM_DEGRADE, 0);
  mark (4);
  WAIT_FOR (!site_status (&site, 0).remote.admitted);
  site_connect (&site, 0);
  write_region (40, 2);
  assert (node_has (40) == 2);
  assert (site_status (&site, 0).remote.admitted);
  site_end (&site);
}

/* The end of a resync: whole from before it adopts. */
static void
test_nodes_whole_from_before_the_adoption (void)
{
  make (NBDM_DEGRADE, 0);
  mark (4);
  WAIT_FOR (!site_status (&site, 0).remote.admitted);
  assert (nbdm_node_whole (site.volume, 1) == -EAGAIN);
  site_connect (&site, 0);
  assert (nbdm_node_whole (site.volume, 1) == -EAGAIN);
  site_resync_to_end (&site, 0);
  assert (nbdm_node_whole (site.volume, 1) == 0);
  assert (nbdm_remote_invalidate (site.volume, 1) == 0);
  assert_left ();
  site_end (&site);
}

static uint64_t
requests_under_way (void)
{
  uint64_t nr;

  pthread_mutex_lock (&site.volume->lock);
  nr = site.volume->nr_requests;
  pthread_mutex_unlock (&site.volume->lock);
  return nr;
}

static void *
write_on (void *opaque)
{
  (void)opaque;
  write_region (40, 2);
  return NULL;
}

/* Policy stop: clients wait while it is met again, and get no error. */
static void
test_nodes_whole_policy_stop_waits (void)
{
  pthread_t writer;

  make (NBDM_STOP, 60000);
  assert (nbdm_remote_invalidate (site.volume, 1) == 0);
  assert (site_status (&site, 0).state == NBDM_HOLDING);
  assert (pthread_create (&writer, NULL, write_on, NULL) == 0);
  WAIT_FOR (requests_under_way () > 0);
  assert (node_has (40) == 1);
  site_connect (&site, 0);
  pthread_join (writer, NULL);
  assert (node_has (40) == 2);
  site_end (&site);
}

int
main (void)
{
  RUN (test_nodes_whole_a_long_zero_that_is_left);
  RUN (test_nodes_whole_an_operator_makes_all_dirty);
  RUN (test_nodes_whole_a_write_that_both_refuse);
  RUN (test_nodes_whole_it_leaves_without_a_write);
  RUN (test_nodes_whole_nothing_is_copied_to_it);
  RUN (test_nodes_whole_a_told_node_gets_writes);
  RUN (test_nodes_whole_from_before_the_adoption);
  RUN (test_nodes_whole_policy_stop_waits);
  return 0;
}
