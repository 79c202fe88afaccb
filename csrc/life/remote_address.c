/* SPDX-License-Identifier: BSD-3-Clause */

/* Remotes that have exchanged their addresses.
 *
 * A plain server does not report which disk it has, and the compared sample
 * (nbd_mirror/server/sample.py) may not show that it is another one.  That is
 * most likely if two remotes of one volume are mixed up: their disks differ in
 * a few regions only, and each would be used with the other's map.  So the
 * superblock stores a hash of the address at which each remote was last used.
 * The hash is a hint, not an identity.  A server may move, so a remote at an
 * address that no remote had is used as it is.  The hint does not detect
 * another disk behind the same address.
 *
 *   the address belonged to              result
 *   the remote itself, or no remote      used as it is
 *   another remote, local is ok          each of the two gets the dirty
 *                                        regions of both, as one map is right
 *   another remote, and local is not     refused: no map says which disk has
 *   ok or the other is connected there   the only copy of a region
 *   a remote that has left the           all dirty, because its map is gone;
 *   configuration                        refused if local is not ok
 *
 * Then the two exchange their recorded addresses, so that this happens once.
 * With three remotes in a ring each pair is handled in turn, and the missed
 * regions spread along the ring.
 */

#include <endian.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "api.h"
#include "base/crc64.h"
#include "base/error.h"
#include "life/recover.h"
#include "life/remote_address.h"
#include "logs/bitmap.h"
#include "logs/dirty_map.h"
#include "logs/layout.h"
#include "volume/local_state.h"
#include "volume/state.h"
#include "volume/volume.h"

static uint64_t
hash (const char *uri)
{
  uint64_t crc = crc64 (uri, strlen (uri));

  return crc ? crc : 1;
}

static struct remote *
find_other (const struct remote *r, uint64_t address)
{
  struct nbdm *v = r->disk.volume;

  for (uint32_t i = 0; i < v->nr_remotes; i++)
    if (&v->remotes[i] != r && v->remotes[i].address == address)
      return &v->remotes[i];
  return NULL;
}

static bool
was_left_out (const struct nbdm *v, uint64_t address)
{
  for (unsigned i = 0; i < LAYOUT_MAX_LEFT_OUT; i++)
    if (le64toh (v->sb.left_out[i]) == address)
      return true;
  return false;
}

/* The next store of the superblock makes this durable. */
static void
forget_left_out (struct nbdm *v, uint64_t address)
{
  uint64_t *kept = v->sb.left_out;

  for (unsigned i = 0; i < LAYOUT_MAX_LEFT_OUT; i++)
    if (le64toh (v->sb.left_out[i]) != address)
      *kept++ = v->sb.left_out[i];
  while (kept < v->sb.left_out + LAYOUT_MAX_LEFT_OUT)
    *kept++ = 0;
}

/* The latest first; the oldest one is dropped if there is no room. */
static void
note_left_out (struct nbdm *v, uint64_t address)
{
  uint64_t *first = v->sb.left_out;

  forget_left_out (v, address);
  memmove (first + 1, first, (LAYOUT_MAX_LEFT_OUT - 1) * sizeof *first);
  *first = htole64 (address);
}

/* If local misses regions, the maps also say which disk has their only copy. */
static bool
local_has_all_locked (const struct nbdm *v)
{
  return local_believed (v) && v->local.disk.dm.map[MAP_DIRTY].nr_set == 0;
}

static uint64_t
nr_missed (const struct remote *r)
{
  return r->disk.dm.map[MAP_DIRTY].nr_set;
}

/* Unflushed regions became dirty when the connections were lost. */
static void
miss_also (struct remote *r, const struct remote *other)
{
  bitmap_merge (&r->disk.dm.map[MAP_DIRTY], &other->disk.dm.map[MAP_DIRTY]);
  bitmap_merge (&r->disk.dm.map[MAP_LATE], &other->disk.dm.map[MAP_LATE]);
  bitmap_clear_all (&r->disk.dm.copied);
  dirty_map_mark_lost (&r->disk.dm, 0, r->disk.volume->nr_regions);
  r->disk.dm.changed = true;
}

static int
refuse (const struct remote *other, const char *why)
{
  return set_message (-EINVAL,
                      "this is the address of remote \"%s\", %s: exchange the "
                      "addresses back",
                      other->disk.name, why);
}

static int
exchange_locked (struct remote *r, struct remote *other, uint64_t address)
{
  struct nbdm *v = r->disk.volume;
  bool alike = nr_missed (r) == 0 && nr_missed (other) == 0;

  if (other->conn)
    return refuse (other, "which is connected there");
  if (!alike && !local_has_all_locked (v))
    return refuse (other, "and the local disk is not ok, so that nothing tells "
                          "which disk has the only copy of what it misses");
  if (!alike) {
    miss_also (r, other);
    if (r->address) /* else the other cannot have its disk now */
      miss_also (other, r);
    snprintf (v->reason, sizeof v->reason,
              "%.50s has the address of %.50s: what either missed is copied",
              r->disk.name, other->disk.name);
  }
  other->address = r->address;
  r->address = address;
  r->assumed = other->assumed = r->assumed || other->assumed;
  disk_bump_locked (&other->disk);
  return volume_persist_locked (v);
}

static int
take_over_locked (struct remote *r, uint64_t address)
{
  struct nbdm *v = r->disk.volume;

  if (nr_missed (r) < v->nr_regions) {
    if (!local_has_all_locked (v))
      return set_message (-EINVAL,
                          "this is the address of a remote that has left the "
                          "configuration, and the local disk is not ok");
    dirty_map_mark (&r->disk.dm, 0, v->nr_regions, true);
    dirty_map_mark_lost (&r->disk.dm, 0, v->nr_regions);
    snprintf (v->reason, sizeof v->reason,
              "%.63s is connected where a remote was that has left the "
              "configuration: everything is copied to it",
              r->disk.name);
  }
  r->assumed = false;
  r->address = address; /* in its own entry from now on */
  forget_left_out (v, address);
  return volume_persist_locked (v);
}

int
remote_address_locked (struct remote *r, const char *uri)
{
  uint64_t address = hash (uri);
  struct remote *other = find_other (r, address);
  int rc = 0;

  /* A node shows its identity, and its address names a session. */
  if (r->disk.is_node)
    return 0;
  if (r->address != address && other)
    rc = exchange_locked (r, other, address);
  else if (r->address != address && was_left_out (r->disk.volume, address))
    rc = take_over_locked (r, address);
  if (rc == 0)
    r->connected_at = address;
  return rc;
}

void
remote_addresses_left_out (struct nbdm *v)
{
  for (uint32_t i = 0; i < LAYOUT_MAX_REMOTES; i++) {
    const struct disk_remote *stored = &v->sb.remotes[i];

    if (stored->name[0] && stored->address
        && !volume_has_remote (v, stored->name))
      note_left_out (v, le64toh (stored->address));
  }
}
