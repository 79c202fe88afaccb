/* SPDX-License-Identifier: BSD-3-Clause */

/* `dirty.local` at a start: open it, create a lost one again, and make it
 * consistent with the remotes' maps.
 */

#include <endian.h>
#include <errno.h>
#include <stdio.h>

#include "api.h"
#include "base/error.h"
#include "base/fault.h"
#include "life/local_map.h"
#include "life/recover.h"
#include "logs/bitmap.h"
#include "logs/dirty_map.h"
#include "logs/layout.h"
#include "volume/local_state.h"
#include "volume/state.h"
#include "volume/volume.h"

static bool
any_remote_clean (const struct nbdm *v, uint64_t region)
{
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    if (!bitmap_test (&v->remotes[i].disk.dm.map[MAP_DIRTY], region))
      return true;
  return false;
}

/* Does a remote that has not failed have it?  Behind a failed one may be
 * another disk, which would become the only source.  A failed remote got no
 * write, so local misses none for it.
 */
static bool
any_remote_has (const struct nbdm *v, uint64_t region)
{
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    if (v->remotes[i].state != NBDM_FAILED
        && !bitmap_test (&v->remotes[i].disk.dm.map[MAP_DIRTY], region))
      return true;
  return false;
}

void
local_miss_all_locked (struct nbdm *v)
{
  uint64_t nr = v->nr_regions, region, end;

  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    const struct bitmap *dirty = &v->remotes[i].disk.dm.map[MAP_DIRTY];

    region = v->remotes[i].state == NBDM_FAILED ? nr : 0;
    for (; (region = bitmap_next_clear (dirty, region, nr)) < nr;
         region = end) {
      end = bitmap_next_set (dirty, region, nr);
      dirty_map_mark (&v->local.disk.dm, region, end - region, false);
    }
  }
}

void
local_miss_range_locked (struct nbdm *v, uint64_t offset, uint64_t length)
{
  uint64_t region, count;

  region_span (v, offset, length, &region, &count);
  for (; count > 0; region++, count--)
    if (any_remote_has (v, region))
      dirty_map_mark (&v->local.disk.dm, region, 1, false);
}

/* Its map is lost.  What a failed remote has counts too: local may have missed
 * it since before that remote failed.
 */
static void
miss_where_remote_is_clean (struct nbdm *v)
{
  for (uint64_t region = 0; region < v->nr_regions; region++)
    if (any_remote_clean (v, region))
      dirty_map_mark (&v->local.disk.dm, region, 1, false);
}

/* While the superblock says ok, local misses nothing, by rule 7, whatever the
 * map says.  So a lost map is no loss, and a volume of an earlier version has
 * none.  Marks of a takeover that ended before the superblock knew of it do not
 * count, so such a map is closed.
 */
int
local_map_open (struct nbdm *v)
{
  struct disk *d = &v->local.disk;
  bool ok = v->local.state == NBDM_LOCAL_OK;
  int rc = disk_map_open (d);

  if (rc == 0 && ok && d->dm.map[MAP_DIRTY].nr_set > 0) {
    dirty_map_close (&d->dm);
    return 0;
  }
  if (rc == 0)
    rc = volume_check_map (d);
  if (rc != -ENOENT && rc != -EUCLEAN)
    return rc;
  if (!ok) {
    d->map_lost = true;
    snprintf (v->reason, sizeof v->reason,
              "%s: everything is copied to the local disk again",
              last_error ());
  }
  return 0;
}

/* Open the closed map again: a new one needs room. */
static bool
opens_again (struct disk *d)
{
  if (disk_map_open (d) == 0 && volume_check_map (d) == 0)
    return true;
  dirty_map_close (&d->dm);
  return false;
}

int
local_map_renew (struct nbdm *v)
{
  struct disk *d = &v->local.disk;
  int rc = 0;

  if (d->dm.mapping || (!d->map_lost && opens_again (d)))
    return 0;
  if (d->map_lost)
    rc = volume_put_away (v, "dirty." LOCAL_NAME);
  return rc == 0 ? disk_map_make (d, 0) : rc;
}

/* The map may be changed from now on.  See local_map_open. */
static void
drop_old_marks (struct nbdm *v)
{
  struct dirty_map *dm = &v->local.disk.dm;

  if (v->local.state == NBDM_LOCAL_OK && dm->map[MAP_DIRTY].nr_set > 0) {
    bitmap_clear_all (&dm->map[MAP_DIRTY]);
    dm->changed = true;
  }
}

/* A region that local misses and that is dirty in every remote's map: local
 * misses it only because a remote had it.  So that is the remote whose map is
 * lost, if there is exactly one.
 */
static void
find_lost_sources (struct nbdm *v)
{
  const struct bitmap *missing = &v->local.disk.dm.map[MAP_DIRTY];
  uint64_t nr = v->nr_regions, region = 0;
  struct remote *lost = NULL;

  for (uint32_t i = 0; i < v->nr_remotes; i++)
    if (v->remotes[i].disk.map_lost) {
      if (lost)
        return;
      lost = &v->remotes[i];
    }
  if (lost == NULL)
    return;
  for (; (region = bitmap_next_set (missing, region, nr)) < nr; region++)
    if (!any_remote_clean (v, region)) {
      bitmap_clear (&lost->disk.dm.map[MAP_DIRTY], region, 1);
      bitmap_clear (&lost->disk.dm.map[MAP_LATE], region, 1);
    }
}

static bool
any_remote_durable (const struct nbdm *v, uint64_t region)
{
  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    const struct bitmap *map = v->remotes[i].disk.dm.map;

    if (v->remotes[i].state == NBDM_FAILED)
      continue; /* behind it may be another disk */
    if (!bitmap_test (&map[MAP_DIRTY], region)
        && !bitmap_test (&map[MAP_UNFLUSHED0], region)
        && !bitmap_test (&map[MAP_UNFLUSHED1], region))
      return true;
  }
  return false;
}

/* The process was killed in a takeover, and local is not to be doubted: not by
 * that takeover, nor by a flush of a start that was killed since.  The
 * remotes' unflushed regions become dirty as at any start after a kill, once
 * local has them: so after a kill in between the next start finds the same.
 */
static void
take_back (struct nbdm *v)
{
  struct dirty_map *dm = &v->local.disk.dm;
  uint64_t nr = v->nr_regions, region = 0;

  for (; (region = bitmap_next_set (&dm->map[MAP_DIRTY], region, nr)) < nr;
       region++)
    if (!any_remote_durable (v, region))
      bitmap_clear (&dm->map[MAP_DIRTY], region, 1);
  dm->changed = true;
  fault_point ("takeover_undone");
  if (dm->map[MAP_DIRTY].nr_set > 0)
    return;
  v->local.disk.reason[0] = '\0';
  local_set_locked (v, NBDM_LOCAL_OK);
}

void
local_map_recover (struct nbdm *v)
{
  drop_old_marks (v);
  if (v->local.disk.map_lost)
    miss_where_remote_is_clean (v);
  if (v->local.state == NBDM_LOCAL_RESYNCING && !v->local.unflushed
      && le32toh (v->sb.flags) & SUPERBLOCK_UNDECIDED)
    take_back (v);
  else if (!v->local.disk.map_lost)
    find_lost_sources (v);
}
