/* SPDX-License-Identifier: BSD-3-Clause */

/* A volume of nodes, while it is open.
 *
 * The record of nodes is in `v->node`.  Its generation is that of the volume,
 * and each store of the superblock writes it.
 *
 * A node answers a write which another node lacks only in a generation that the
 * other node cannot hold (docs/nodes.md).  What a write finds of another node:
 *
 *   the node                          its map              the generation
 *   is not used                       dirty, at admission  begins at admission
 *   is used, and got all of it
 *   is used, the region is not        dirty before         begins before the
 *     copied yet                                           answer
 *   was lost, or refused it           dirty                begins before the
 *                                                          answer
 *
 * The two latest rows are one check, as the request ends: it holds the range
 * until then, so no copy of the region comes between.
 *
 * Plain remotes have no part in this.  The generation that a plain remote has
 * in its entry only proves that its entry and its map are of one time, so a
 * plain remote that misses a write has none.
 */

#include <stdio.h>
#include <string.h>
#include <sys/random.h>

#include "api.h"
#include "base/fault.h"
#include "logs/bitmap.h"
#include "logs/classify.h"
#include "logs/dirty_map.h"
#include "logs/layout.h"
#include "logs/lineage.h"
#include "logs/nodes.h"
#include "volume/node.h"
#include "volume/state.h"
#include "volume/volume.h"

void
node_put_locked (struct nbdm *v)
{
  if (v->has_nodes)
    nodes_put (&v->node, &v->sb, &v->nodes);
}

static struct nbdm_peer *
peer_of (const struct remote *r)
{
  return &r->disk.volume->node.peers[r->peer];
}

bool
node_counted_locked (const struct remote *r)
{
  return !r->disk.is_node || lineage_counted (peer_of (r));
}

bool
node_has_generation_locked (const struct remote *r)
{
  return r->disk.is_node ? lineage_counted (peer_of (r))
                         : r->generation == r->disk.volume->generation;
}

void
node_begin_locked (struct nbdm *v, const bool *missing)
{
  uint64_t before = v->generation, fresh = 0;

  while (!lineage_is_fresh (&v->node, fresh))
    if (getrandom (&fresh, sizeof fresh, 0) != (ssize_t)sizeof fresh)
      fresh = v->generation + 1 + fresh;
  lineage_begin (&v->node, fresh, missing);
  node_generation_locked (v, before);
}

void
node_generation_locked (struct nbdm *v, uint64_t before)
{
  v->generation = v->node.generation;
  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    struct remote *r = &v->remotes[i];

    if (!r->disk.is_node && r->generation == before)
      r->generation = v->generation;
  }
}

bool
node_missed_locked (struct nbdm *v, struct remote *r)
{
  bool missing[NBDM_MAX_REMOTES] = { false };

  if (!peer_of (r)->shared)
    return false;
  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    const struct remote *other = &v->remotes[i];

    if (other->disk.is_node)
      missing[other->peer] = other == r || !remote_used_locked (other);
  }
  node_begin_locked (v, missing);
  fault_point ("generation_new");
  volume_persist_locked (v);
  return true;
}

/* Is a region of the write left to resync? */
static bool
left_to_resync (const struct remote *r, const struct request *req)
{
  const struct dirty_map *dm = &r->disk.dm;
  uint64_t region, count, end;

  if (dm->map[MAP_DIRTY].nr_set == 0 || r->disk.volume->policy == NBDM_STOP)
    return false;
  region_span (r->disk.volume, req->offset, req->length, &region, &count);
  end = region + count;
  while ((region = bitmap_next_set (&dm->map[MAP_DIRTY], region, end)) < end) {
    if (!classify_goes_remote (dm, region, false))
      return true;
    region++;
  }
  return false;
}

void
node_left_behind_locked (struct remote *r, const struct request *req)
{
  if (r->disk.is_node && left_to_resync (r, req))
    node_missed_locked (r->disk.volume, r);
}

void
node_forget_plain_locked (struct nbdm *v)
{
  bool any = false;

  if (v->plain_forgotten)
    return;
  v->plain_forgotten = true;
  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    struct remote *r = &v->remotes[i];

    if (r->disk.is_node)
      continue;
    dirty_map_mark (&r->disk.dm, 0, v->nr_regions, true);
    r->kept_state = r->state == NBDM_FAILED ? NBDM_FAILED : NBDM_OUT_OF_SYNC;
    r->assumed = false;
    r->generation = 0;
    disk_explain_locked (&r->disk, "this node was secondary since");
    any = true;
  }
  if (any)
    volume_persist_locked (v);
}
