/* SPDX-License-Identifier: BSD-3-Clause */

/* A volume of nodes at its start: its record, its role, and its doubts.
 *
 * After an unclean end a plain remote misses what may differ, because local is
 * the source.  Of a node that is not known: the other one may have served
 * clients since, or may have kept what this host lost.  So what may differ is
 * doubted, and the handshake decides which copy counts.
 *
 *   the page cache           what is doubted towards every node
 *   outlived the process     the open slots, and what that node had not flushed
 *   did not                  every region of every active extent
 *
 * With two other nodes or more all active extents are doubted in any case: the
 * third node may lack a write whose slot is retired here, because its primary
 * waited for this node alone when it died.
 *
 * A start that ends early leaves the doubts, as each step only adds bits, and
 * the superblock still says that the session before was not closed.
 *
 * A node that opens as primary settles its doubts.  What each step leaves:
 *
 *   step                                  a kill after it
 *   1  the new generation is durable      doubts are left: the next start as
 *                                         primary begins one more
 *   2  the doubts are dirty, durably      the same, and the bits are there
 *   3  the doubts are cleared, then       doubts, or a crash without doubts,
 *      `crash`                            which means nothing
 *
 * In another order the regions would be dirty, or not even that, in a
 * generation that another node may hold.  Local was flushed earlier in this
 * start, when this process had written nothing yet: another node may have had
 * the only durable copy of what this one answered.
 */

#include <endian.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "api.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/fault.h"
#include "life/node_open.h"
#include "logs/bitmap.h"
#include "logs/dirty_map.h"
#include "logs/layout.h"
#include "logs/lineage.h"
#include "logs/nodes.h"
#include "logs/superblock.h"
#include "volume/node.h"
#include "volume/state.h"
#include "volume/volume.h"
#include "volume/zero_proof.h"

/* Each node of the configuration has an entry, and each entry its node. */
static int
find_peers (struct nbdm *v)
{
  uint32_t nr = 0;

  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    struct remote *r = &v->remotes[i];
    const struct nbdm_peer *peer = lineage_peer (&v->node, r->disk.name);

    if ((peer != NULL) != r->disk.is_node)
      return set_message (-EINVAL,
                          r->disk.is_node
                              ? "\"%s\" was no node when the volume was made"
                              : "\"%s\" is a node of the volume",
                          r->disk.name);
    if (peer == NULL)
      continue;
    r->peer = (uint32_t)(peer - v->node.peers);
    nr++;
  }
  if (nr < v->node.nr_peers)
    return set_message (-EINVAL, "a node of the volume is not in the "
                                 "configuration");
  return 0;
}

static int
check_role (const struct nbdm *v, const struct nbdm_params *params)
{
  const struct nbdm_node *node = &v->node;

  if (!params->primary
      || (node->generation != 0 && node->epoch == params->epoch
          && strcmp (node->leader, node->name) == 0))
    return 0;
  if (node->generation == 0)
    return set_message (-EPERM, "this node has no data");
  return set_message (-EPERM,
                      "this node is not the primary of promotion %llu: the "
                      "latest that it knows is %llu, of \"%s\"",
                      (unsigned long long)params->epoch,
                      (unsigned long long)node->epoch, node->leader);
}

static bool
is_garbled (const struct disk_nodes *nodes)
{
  return le32toh (nodes->nr_peers) > LAYOUT_MAX_REMOTES
         || le32toh (nodes->crash) > NBDM_CRASH_HOST;
}

static int
check_no_nodes (const struct nbdm *v, const struct nbdm_params *params)
{
  bool any = params->node != NULL;

  for (uint32_t i = 0; i < v->nr_remotes; i++)
    any = any || v->remotes[i].disk.is_node;
  return any ? set_message (-EINVAL,
                            "%s is the state of a volume without nodes",
                            params->state_dir)
             : 0;
}

int
node_load (struct nbdm *v, const struct nbdm_params *params)
{
  int rc;

  v->has_nodes = superblock_has_nodes (&v->sb);
  if (!v->has_nodes)
    return check_no_nodes (v, params);
  if (is_garbled (&v->nodes))
    return set_message (-EUCLEAN, "the record of nodes in %s is garbled",
                        params->state_dir);
  nodes_get (&v->sb, &v->nodes, &v->node);
  if (params->node == NULL || strcmp (params->node, v->node.name) != 0)
    return set_message (
        -EINVAL, "%s is the state of node \"%s\"%s%s%s", params->state_dir,
        v->node.name, params->node ? ", not of \"" : "",
        params->node ? params->node : "", params->node ? "\"" : "");
  rc = find_peers (v);
  if (rc == 0)
    rc = check_role (v, params);
  if (rc == 0 && !params->primary && params->local_choice == NBDM_LOCAL_LOST)
    rc = set_message (-EINVAL, "a secondary has no other disk than its own");
  v->secondary = !params->primary;
  if (v->secondary) {
    v->policy = NBDM_DEGRADE;
    atomic_store (&v->fail_fenced_reads, false);
  }
  return rc;
}

void
node_doubt_locked (struct nbdm *v, uint64_t offset, uint64_t length)
{
  uint64_t first, count;

  region_span (v, offset, length, &first, &count);
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    if (v->remotes[i].disk.is_node)
      dirty_map_doubt (&v->remotes[i].disk.dm, first, count);
}

void
node_doubt_extent (void *opaque, uint64_t extent)
{
  struct nbdm *v = opaque;
  uint64_t offset = extent * EXTENT_SIZE;

  node_doubt_locked (v, offset,
                     v->size - offset < EXTENT_SIZE ? v->size - offset
                                                    : EXTENT_SIZE);
}

/* Where local misses a region, that node may be its only source, and the
 * flusher must flush it: as of a plain remote.
 */
void
node_doubt_unflushed_locked (struct remote *r)
{
  struct bitmap *map = r->disk.dm.map;

  if (r->disk.volume->local.disk.dm.map[MAP_DIRTY].nr_set > 0) {
    unflushed_lost_locked (r);
    return;
  }
  for (int i = MAP_UNFLUSHED0; i <= MAP_UNFLUSHED1; i++) {
    bitmap_merge (&map[MAP_DOUBTS], &map[i]);
    /* After a kill between the two the bits are in both maps. */
    atomic_signal_fence (memory_order_seq_cst);
    fault_point ("lost_merged");
    bitmap_clear_all (&map[i]);
  }
  r->disk.dm.changed = true;
}

bool
node_any_doubts (const struct nbdm *v)
{
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    if (v->remotes[i].disk.dm.map[MAP_DOUBTS].nr_set > 0)
      return true;
  return false;
}

void
node_recovered (struct nbdm *v, bool crashed, bool host)
{
  uint32_t crash = host ? NBDM_CRASH_HOST : NBDM_CRASH_PROCESS;

  if (crashed && crash > v->node.crash)
    v->node.crash = crash;
  if (!node_any_doubts (v))
    v->node.crash = NBDM_CRASH_NONE;
  fault_point ("doubts_marked");
}

void
node_took_disk (struct nbdm *v)
{
  if (!v->has_nodes)
    return;
  node_doubt_locked (v, 0, v->size);
  v->node.crash = NBDM_CRASH_HOST;
}

/* The disk was not locked since the proof. */
static void
forget_zeroes (struct nbdm *v)
{
  const struct local *l = &v->local;

  if (v->node.zero)
    v->node.zero = v->node.generation == 0 && l->state == NBDM_LOCAL_OK
                   && reads_as_zeroes (l->file.fd, v->size);
}

/* A volume of a program that had no doubts: the new maps are there, and so both
 * slots must keep that program out.
 */
int
node_first_store (struct nbdm *v)
{
  bool is_new
      = v->has_nodes && !(le64toh (v->sb.incompatible) & FEATURE_DOUBTS);
  int rc;

  forget_zeroes (v);
  if (is_new)
    v->sb.incompatible |= htole64 (FEATURE_DOUBTS);
  rc = volume_persist_locked (v);
  return rc == 0 && is_new ? volume_persist_locked (v) : rc;
}

static void
doubts_become_dirty (struct remote *r)
{
  const struct bitmap *doubts = &r->disk.dm.map[MAP_DOUBTS];
  uint64_t nr = doubts->nr_bits, region = 0, end;

  for (; (region = bitmap_next_set (doubts, region, nr)) < nr; region = end) {
    end = bitmap_next_clear (doubts, region, nr);
    mark_regions_locked (r, region, end - region, false);
  }
}

int
node_settle_doubts (struct nbdm *v)
{
  bool missing[NBDM_MAX_REMOTES];
  int rc;

  if (!v->has_nodes || v->secondary || !node_any_doubts (v))
    return 0;
  memset (missing, true, sizeof missing);
  node_begin_locked (v, missing);
  rc = volume_persist_locked (v);
  fault_point ("doubts_generation");
  for (uint32_t i = 0; i < v->nr_remotes && rc == 0; i++)
    if (v->remotes[i].disk.is_node)
      doubts_become_dirty (&v->remotes[i]);
  if (rc == 0)
    rc = volume_persist_locked (v);
  fault_point ("doubts_dirty");
  for (uint32_t i = 0; i < v->nr_remotes && rc == 0; i++)
    if (v->remotes[i].disk.is_node) {
      bitmap_clear_all (&v->remotes[i].disk.dm.map[MAP_DOUBTS]);
      v->remotes[i].disk.dm.changed = true;
    }
  v->node.crash = NBDM_CRASH_NONE;
  if (rc == 0)
    rc = volume_persist_locked (v);
  fault_point ("doubts_settled");
  return rc;
}

/* What is stored of a plain remote stays as it is while nothing is written
 * (node_forget_plain_locked).
 */
static void
rest (struct remote *r)
{
  r->kept_state = r->state == NBDM_HOLDING || r->state == NBDM_RESYNCING
                      ? NBDM_OUT_OF_SYNC
                      : r->state;
  if (r->state != NBDM_FAILED)
    r->state = NBDM_OUT_OF_SYNC;
}

void
node_begin_state (struct remote *r)
{
  struct nbdm *v = r->disk.volume;

  if (v->secondary)
    rest (r);
  else if (r->disk.is_node && r->state != NBDM_FAILED)
    r->state = node_counted_locked (r) && r->disk.dm.map[MAP_DIRTY].nr_set == 0
                       && r->disk.dm.map[MAP_DOUBTS].nr_set == 0
                   ? NBDM_IN_SYNC
                   : NBDM_OUT_OF_SYNC;
}
