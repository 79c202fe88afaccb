/* SPDX-License-Identifier: BSD-3-Clause */

/* The record and the maps of nodes: what the control thread reads and changes.
 *
 * Each change is durable before its call returns, as the other node is told of
 * it next.
 */

#include <endian.h>
#include <errno.h>
#include <stdatomic.h>
#include <string.h>

#include "api.h"
#include "base/error.h"
#include "base/fault.h"
#include "base/lock.h"
#include "logs/activity.h"
#include "logs/bitmap.h"
#include "logs/dirty_map.h"
#include "logs/layout.h"
#include "logs/nodes.h"
#include "life/node_open.h"
#include "volume/flush.h"
#include "volume/identity.h"
#include "volume/local_state.h"
#include "volume/node.h"
#include "volume/state.h"
#include "volume/volume.h"

static int
check_nodes (const struct nbdm *v)
{
  return v->has_nodes ? 0 : set_message (-EINVAL, "the volume has no nodes");
}

/* May the record and the maps be changed? */
static int
change_gate_locked (const struct nbdm *v)
{
  int rc = command_gate_locked (v);

  if (rc == 0 && v->failed)
    rc = set_message (-EIO, "the volume has failed: %s", v->reason);
  return rc;
}

static int
secondary_only (const struct nbdm *v)
{
  return v->secondary ? 0 : set_message (-EPERM, "this node is primary");
}

int
nbdm_node_get (struct nbdm *v, struct nbdm_node *node)
{
  int rc = check_nodes (v);

  if (rc < 0)
    return rc;
  LOCK_FOR_SCOPE (&v->lock);
  *node = v->node;
  return 0;
}

/* --- the record -------------------------------------------------------- */

/* A record as its bytes on disk, which have no padding. */
struct stored {
  struct disk_superblock sb;
  struct disk_nodes nodes;
};

static bool
same (const struct nbdm_node *one, const struct nbdm_node *other)
{
  struct stored a = { 0 }, b = { 0 };

  nodes_put (one, &a.sb, &a.nodes);
  nodes_put (other, &b.sb, &b.nodes);
  return memcmp (&a, &b, sizeof a) == 0;
}

static bool
ends (const char *name)
{
  return memchr (name, '\0', NBDM_NAME_LEN) != NULL;
}

static bool
same_peers (const struct nbdm_node *before, const struct nbdm_node *after)
{
  if (before->nr_peers != after->nr_peers)
    return false;
  for (uint32_t i = 0; i < before->nr_peers; i++)
    if (strncmp (before->peers[i].name, after->peers[i].name, NBDM_NAME_LEN)
        != 0)
      return false;
  return true;
}

static bool
is_earlier (const struct nbdm_node *node, const struct nbdm_node *than)
{
  if (node->epoch != than->epoch)
    return node->epoch < than->epoch;
  return strncmp (node->leader, than->leader, NBDM_NAME_LEN) < 0;
}

static int
check_record (const struct nbdm_node *before, const struct nbdm_node *after)
{
  if (strncmp (before->name, after->name, NBDM_NAME_LEN) != 0
      || memcmp (before->id, after->id, sizeof before->id) != 0
      || !same_peers (before, after))
    return set_message (-EINVAL, "the record is of other nodes");
  if (!ends (after->leader) || !ends (after->handed)
      || !ends (after->claim.node))
    return set_message (-EINVAL, "a name in the record does not end");
  if (after->role != NBDM_PRIMARY && after->role != NBDM_SECONDARY)
    return set_message (-EINVAL, "there is no role %u", after->role);
  if (after->crash > NBDM_CRASH_HOST)
    return set_message (-EINVAL, "there is no crash %u", after->crash);
  if (is_earlier (after, before))
    return set_message (-EINVAL, "the record is of an earlier promotion");
  if (after->generation == 0 && before->generation != 0)
    return set_message (-EINVAL, "the record has no generation any more");
  return 0;
}

/* The record may have counted a node, or not any more. */
static void
update_states_locked (struct nbdm *v)
{
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    if (v->remotes[i].disk.is_node)
      remote_update_state_locked (&v->remotes[i]);
}

int
nbdm_node_store (struct nbdm *v, const struct nbdm_node *before,
                 const struct nbdm_node *after)
{
  uint64_t generation;
  int rc = check_nodes (v);

  if (rc < 0)
    return rc;
  LOCK_FOR_SCOPE (&v->lock);
  rc = change_gate_locked (v);
  if (rc < 0)
    return rc;
  if (!same (&v->node, before))
    return set_message (-EAGAIN, "the record of nodes has changed");
  rc = check_record (before, after);
  if (rc < 0)
    return rc;
  generation = v->generation;
  v->node = *after;
  if (v->node.generation != generation)
    node_generation_locked (v, generation);
  rc = volume_persist_locked (v);
  fault_point ("node_stored");
  if (rc == 0)
    update_states_locked (v);
  return rc;
}

/* --- the maps ---------------------------------------------------------- */

static uint64_t
bytes_of (const struct nbdm *v)
{
  return (v->nr_regions + 7) / 8;
}

static int
find (struct nbdm *v, uint32_t disk, uint32_t map, uint64_t size,
      struct remote **r)
{
  struct disk *d = volume_disk (v, disk);

  if (d == NULL || !d->is_node)
    return set_message (-EINVAL, "disk %u is no node of this volume", disk);
  if (map > NBDM_MAP_MISSED)
    return set_message (-EINVAL, "there is no map %u", map);
  if (size != bytes_of (v))
    return set_message (-EINVAL, "the map has %llu bytes, not %llu",
                        (unsigned long long)bytes_of (v),
                        (unsigned long long)size);
  *r = &v->remotes[disk - 1];
  return 0;
}

int
nbdm_node_map (struct nbdm *v, uint32_t disk, uint32_t map, uint8_t *bits,
               uint64_t size)
{
  const struct bitmap *from;
  struct remote *r;
  int rc = find (v, disk, map, size, &r);

  if (rc < 0)
    return rc;
  LOCK_FOR_SCOPE (&v->lock);
  if (v->drained) /* the maps may be closed at any time */
    return command_gate_locked (v);
  from = map == NBDM_MAP_DIRTY    ? &r->disk.dm.map[MAP_DIRTY]
         : map == NBDM_MAP_DOUBTS ? &r->disk.dm.map[MAP_DOUBTS]
                                  : &v->local.disk.dm.map[MAP_DIRTY];
  if (map == NBDM_MAP_MISSED && v->local.state == NBDM_LOCAL_FAILED) {
    memset (bits, 0xff, size);
    if (v->nr_regions % 8)
      bits[size - 1] = (uint8_t)((1u << v->nr_regions % 8) - 1);
  }
  else if (from->nr_set == 0) /* reads no page */
    memset (bits, 0, size);
  else
    memcpy (bits, from->words, size);
  return 0;
}

static bool
bit (const uint8_t *bits, uint64_t region)
{
  return bits[region / 8] >> region % 8 & 1;
}

/* The end of the run of equal bits at `region`. */
static uint64_t
run_end (const uint8_t *bits, uint64_t region, uint64_t nr)
{
  bool set = bit (bits, region);
  uint8_t whole = set ? 0xff : 0;

  while (region < nr && bit (bits, region) == set)
    region += region % 8 == 0 && bits[region / 8] == whole ? 8 : 1;
  return region < nr ? region : nr;
}

int
nbdm_node_mark (struct nbdm *v, uint32_t disk, uint32_t map,
                const uint8_t *bits, uint64_t size)
{
  struct remote *r;
  int rc = find (v, disk, map, size, &r);

  if (rc == 0 && map == NBDM_MAP_MISSED)
    rc = set_message (-EINVAL, "what local misses is not marked");
  if (rc < 0)
    return rc;
  LOCK_FOR_SCOPE (&v->lock);
  rc = change_gate_locked (v);
  if (rc < 0)
    return rc;
  for (uint64_t region = 0, end; region < v->nr_regions; region = end) {
    end = run_end (bits, region, v->nr_regions);
    if (!bit (bits, region))
      continue;
    if (map == NBDM_MAP_DOUBTS)
      dirty_map_doubt (&r->disk.dm, region, end - region);
    else
      mark_regions_locked (r, region, end - region, false);
  }
  rc = volume_persist_locked (v);
  fault_point ("node_marked");
  if (rc == 0)
    remote_update_state_locked (r);
  return rc;
}

/* On a secondary nothing but a resync to it repairs the local disk.  The
 * samples of what it missed are void before the map is empty: see identity.c.
 */
static int
local_was_filled_locked (struct nbdm *v)
{
  struct dirty_map *dm = &v->local.disk.dm;
  int rc;

  if (v->local.state != NBDM_LOCAL_RESYNCING)
    return 0;
  rc = identity_copied_back_locked (v);
  if (rc < 0)
    return rc;
  bitmap_clear_all (&dm->map[MAP_DIRTY]);
  bitmap_clear_all (&dm->copied);
  dm->changed = true;
  local_update_state_locked (v);
  return 0;
}

int
nbdm_node_clear (struct nbdm *v, uint32_t disk)
{
  struct dirty_map *dm;
  struct remote *r;
  int rc = find (v, disk, 0, bytes_of (v), &r);

  if (rc == 0)
    rc = secondary_only (v);
  if (rc == 0 && atomic_load (&v->local.state) == NBDM_LOCAL_RESYNCING)
    rc = flush_local_group (v);
  if (rc < 0)
    return rc;
  LOCK_FOR_SCOPE (&v->lock);
  rc = change_gate_locked (v);
  if (rc == 0)
    rc = local_was_filled_locked (v);
  if (rc < 0)
    return rc;
  dm = &r->disk.dm;
  for (int i = 0; i < NR_NODE_MAPS; i++)
    bitmap_clear_all (&dm->map[i]);
  bitmap_clear_all (&dm->copied);
  bitmap_clear_all (&dm->lost);
  dm->changed = true;
  rc = volume_persist_locked (v);
  fault_point ("node_cleared");
  return rc;
}

/* --- the end of a session ---------------------------------------------- */

static bool
doubt_active_locked (struct nbdm *v)
{
  uint64_t extents[ACTIVITY_EXTENTS];
  uint32_t nr = activity_list (&v->activity, extents, ACTIVITY_EXTENTS);

  for (uint32_t i = 0; i < nr; i++)
    node_doubt_extent (v, extents[i]);
  return node_any_doubts (v);
}

int
nbdm_node_session_lost (struct nbdm *v)
{
  int rc = check_nodes (v);

  if (rc == 0)
    rc = secondary_only (v);
  if (rc < 0)
    return rc;
  LOCK_FOR_SCOPE (&v->lock);
  rc = change_gate_locked (v);
  if (rc < 0)
    return rc;
  if (doubt_active_locked (v) && v->node.crash == NBDM_CRASH_NONE)
    v->node.crash = NBDM_CRASH_SESSION;
  fault_point ("session_doubted");
  rc = volume_persist_locked (v);
  fault_point ("session_lost");
  return rc;
}
