/* SPDX-License-Identifier: BSD-3-Clause */

/* Load the logs and find out what may differ.
 *
 * What a start may believe:
 *
 *   superblock says          the logs are            and what may differ is
 *   clean                    empty                   what dirty.* says
 *   not clean, same boot     exact: the page cache   dirty, unflushed, and the
 *   and mount                outlived the process    open slots
 *   not clean, another       what was made durable   dirty, unflushed, every
 *   boot or mount                                    region of every active
 *                                                    extent; the slots are not
 *   any log that is missing, torn, garbled, of another volume or session:
 *     everything, and the log says so; the bad file is kept as NAME~bad
 *
 * If the superblock says that local was failed or resyncing, the same holds
 * with the legs exchanged: dirty.local says what local misses, and a remote is
 * the source (local_state.c).  Where a takeover was not over and local may be
 * believed, local is first made the source of what no remote has durably.  And
 * a lost map may hide which disk has the newest data of a region:
 *
 *   lost                       a region's source
 *   dirty.local alone          a remote that is clean there; if none is, local
 *   one remote's alone         as the maps say; where local misses the region
 *                              and no remote is clean, the remote of that map
 *   dirty.local and a remote's a remote that is clean there; if none is, it
 *                              cannot be known
 *   two remotes' or more       as the maps say; where local misses the region
 *                              and no remote is clean, it cannot be
 *                              known
 *
 * If the source cannot be known, the start is refused (volume_check_sources): a
 * guess might read old data, and resync would write it over the only good copy.
 *
 * A start changes the maps before it has stamped them, and may end at any
 * instant.  So LOG_CLEAN is cleared before the first bit changes, and a map
 * that replaces a lost one has LOG_RENEWED until the start is done: after an
 * early end the next start treats it as lost too, not as empty or full.
 */

#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "api.h"
#include "base/error.h"
#include "base/fault.h"
#include "life/local_map.h"
#include "life/node_open.h"
#include "life/recover.h"
#include "logs/activity.h"
#include "logs/bitmap.h"
#include "logs/dirty_map.h"
#include "logs/inflight.h"
#include "logs/layout.h"
#include "logs/log_header.h"
#include "volume/backlog.h"
#include "volume/state.h"
#include "volume/volume.h"

int
volume_put_away (struct nbdm *v, const char *file)
{
  char bad[96];

  snprintf (bad, sizeof bad, "%s~bad", file);
  if (renameat (v->dirfd, file, v->dirfd, bad) < 0 && errno != ENOENT)
    return set_error (-errno, "cannot set aside %s", file);
  fault_point ("log_set_aside");
  return 0;
}

static void
say_copied_again (struct nbdm *v, const char *what)
{
  snprintf (v->reason, sizeof v->reason, "%.128s: everything is copied again",
            what);
}

/* Is it missing or garbled, by the result of its open? */
static bool
log_is_lost (int rc)
{
  return rc == -ENOENT || rc == -EUCLEAN;
}

static bool
is_clean (const struct nbdm *v)
{
  return le32toh (v->sb.flags) & SUPERBLOCK_CLEAN;
}

uint64_t
volume_next_session (const struct nbdm *v)
{
  return le64toh (v->sb.session) + 1;
}

/* A clean superblock vouches only for the logs of its session.  A log of that
 * session that was not closed is an old copy that was put back.  Logs one
 * session ahead belong to a start that ended early, and are empty; or the
 * superblock is an old copy that was put back, and they belong to a session
 * that was never closed.
 */
int
volume_check_log (struct nbdm *v, const char *file,
                  const struct disk_log_header *header)
{
  bool ahead = le64toh (header->session) > le64toh (v->sb.session);
  int rc = log_header_check_closed (file, header, &v->sb);

  if (rc == 0 && (!is_clean (v) || ahead))
    v->was_in_use = true;
  return rc;
}

int
volume_check_map (struct disk *d)
{
  char file[80];
  int rc;

  snprintf (file, sizeof file, "dirty.%s", d->name);
  rc = volume_check_log (d->volume, file, &d->dm.header);
  if (rc < 0)
    dirty_map_close (&d->dm);
  else if (le32toh (d->dm.header.flags) & LOG_RENEWED)
    rc = set_message (-EUCLEAN, "%s was lost", file);
  return rc;
}

/* Make all regions dirty, and late as well, as the commands under way are not
 * known.  An operator's assumption no longer holds.
 */
static void
mark_all_dirty_and_late (struct remote *r)
{
  mark_regions_locked (r, 0, r->disk.volume->nr_regions, true);
  r->assumed = false;
}

/* How well a remote would serve as the only source of a region. */
static int
worth (const struct remote *r)
{
  if (r->state == NBDM_IN_SYNC)
    return 2;
  return r->state != NBDM_FAILED; /* behind that one may be another disk */
}

/* The last remote that has a region is spared, so the least worth comes first.
 * Towards a node the range is doubted: node_open.c.
 */
static void
mark_remotes (struct nbdm *v, uint64_t offset, uint64_t length, bool late)
{
  node_doubt_locked (v, offset, length);
  for (int step = 0; step <= 2; step++)
    for (uint32_t i = 0; i < v->nr_remotes; i++)
      if (worth (&v->remotes[i]) == step && !v->remotes[i].disk.is_node)
        mark_dirty_locked (&v->remotes[i], offset, length, late);
}

/* Durable before an empty log replaces the lost one: if this start ends between
 * the two, the next one must not find everything in order.
 */
static int
forget_log (struct nbdm *v, const char *file)
{
  char what[NBDM_REASON_LEN];
  int rc = 0;

  snprintf (what, sizeof what, "%s", last_error ());
  if (v->local.state == NBDM_LOCAL_FAILED)
    local_miss_range_locked (v, 0, v->size);
  mark_remotes (v, 0, v->size, true);
  for (uint32_t i = 0; i < v->nr_remotes && rc == 0; i++) {
    v->remotes[i].assumed = false;
    rc = dirty_map_persist (&v->remotes[i].disk.dm);
  }
  if (rc == 0)
    rc = dirty_map_persist (&v->local.disk.dm);
  fault_point ("forget_persisted");
  if (rc < 0)
    return rc;
  say_copied_again (v, what);
  return volume_put_away (v, file);
}

static int
open_activity (struct nbdm *v)
{
  uint64_t session = le64toh (v->sb.session);
  uint64_t nr_extents = (v->size - 1) / EXTENT_SIZE + 1;
  bool clean;
  int rc = activity_open (&v->activity, v->dirfd, v->uuid, session,
                          ACTIVITY_EXTENTS, EXTENT_SIZE, nr_extents, &clean);

  if (rc == 0) {
    rc = volume_check_log (v, "activity", &v->activity.header);
    if (rc < 0)
      activity_close (&v->activity);
  }
  if (!log_is_lost (rc))
    return rc;
  rc = forget_log (v, "activity");
  if (rc == 0)
    rc = activity_create (v->dirfd, v->uuid, session, ACTIVITY_EXTENTS,
                          EXTENT_SIZE);
  fault_point ("log_renewed");
  if (rc == 0)
    rc = activity_open (&v->activity, v->dirfd, v->uuid, session,
                        ACTIVITY_EXTENTS, EXTENT_SIZE, nr_extents, &clean);
  return rc;
}

static int
make_inflight (struct nbdm *v)
{
  uint64_t session = le64toh (v->sb.session);
  bool clean;
  int rc = inflight_create (v->dirfd, v->uuid, session, RING_SLOTS);

  fault_point ("log_renewed");
  if (rc == 0)
    rc = inflight_open (&v->inflight, v->dirfd, v->uuid, session, RING_SLOTS,
                        &clean);
  return rc;
}

/* An open slot of a killed process: the write may have reached any leg, and
 * may still reach a remote late (rule 12).
 */
static void
replay_slot (void *opaque, const struct slot_view *slot)
{
  struct nbdm *v = opaque;

  /* The process was killed before it marked the write in local's map: if the
   * region were dirty only on the remotes, the failed disk would be the source.
   */
  if (v->local.state == NBDM_LOCAL_FAILED)
    local_miss_range_locked (v, slot->offset, slot->length);
  mark_remotes (v, slot->offset, slot->length, true);
}

/* Are the last session's unflushed writes still there, in the same page cache?
 */
static bool
same_page_cache (const struct nbdm *v)
{
  return !volume_noted (v, DISTRUST_FILE) && !v->identity.cache_lost
         && memcmp (v->sb.boot_id, v->boot_id, sizeof v->boot_id) == 0
         && memcmp (v->sb.mount_id, v->mount_id, sizeof v->mount_id) == 0;
}

/* An operator wonders about the copies that follow. */
static void
note_lost_cache (struct nbdm *v)
{
  const char *why = "the page cache may have been lost";

  if (memcmp (v->sb.boot_id, v->boot_id, sizeof v->boot_id) != 0)
    why = "this host was started again";
  else if (memcmp (v->sb.mount_id, v->mount_id, sizeof v->mount_id) != 0)
    why = "the state is on another mount, or in another mount namespace";
  if (v->identity.note[0] == '\0')
    snprintf (
        v->identity.note, sizeof v->identity.note,
        "no clean stop, and then %s: all active extents are copied to the "
        "remotes again",
        why);
}

static int
open_inflight (struct nbdm *v)
{
  bool clean;
  int rc = inflight_open (&v->inflight, v->dirfd, v->uuid,
                          le64toh (v->sb.session), RING_SLOTS, &clean);

  if (rc == 0) {
    rc = volume_check_log (v, "inflight", &v->inflight.header);
    if (rc < 0)
      inflight_close (&v->inflight);
  }
  if (rc == 0 && v->was_in_use && !same_page_cache (v)) {
    /* The slots were never made durable: they may be torn, and the active
     * extents cover all of them.
     */
    inflight_forget (&v->inflight);
    return 0;
  }
  if (rc == 0) {
    rc = inflight_replay (&v->inflight, v->size, replay_slot, v);
    if (rc < 0)
      inflight_close (&v->inflight);
  }
  if (!log_is_lost (rc))
    return rc;
  rc = forget_log (v, "inflight");
  return rc == 0 ? make_inflight (v) : rc;
}

static const struct disk_remote *
find_stored (const struct nbdm *v, const char *name)
{
  for (uint32_t i = 0; i < LAYOUT_MAX_REMOTES; i++)
    if (strncmp (v->sb.remotes[i].name, name, sizeof v->sb.remotes[i].name)
        == 0)
      return &v->sb.remotes[i];
  return NULL;
}

bool
volume_has_remote (const struct nbdm *v, const char *name)
{
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    if (strcmp (v->remotes[i].disk.name, name) == 0)
      return true;
  return false;
}

static int
open_dirty_map (struct nbdm *v, struct remote *r)
{
  int rc = disk_map_open (&r->disk);

  if (rc == 0)
    rc = volume_check_map (&r->disk);
  if (!log_is_lost (rc))
    return rc;
  say_copied_again (v, last_error ());
  r->assumed = false;
  r->disk.map_lost = true;
  return 0;
}

/* Create the map of a remote that is new in the configuration, or replace a
 * lost one.  A map from an earlier start that ended may be there already, and
 * may lack bits.  All regions are dirty and late: commands of an earlier
 * process may be under way to the same disk, under this or another name.
 */
static int
renew_dirty_map (struct nbdm *v, struct remote *r)
{
  char file[80];
  int rc = 0;

  if (r->disk.dm.mapping)
    return 0;
  snprintf (file, sizeof file, "dirty.%s", r->disk.name);
  if (r->disk.map_lost)
    rc = volume_put_away (v, file);
  return rc == 0 ? disk_map_make (&r->disk, r->disk.is_node
                                                ? NEW_MAP_DOUBTED
                                                : NEW_MAP_DIRTY | NEW_MAP_LATE)
                 : rc;
}

int
remote_load (struct nbdm *v, const struct nbdm_remote_params *params,
             uint32_t index)
{
  struct remote *r = &v->remotes[index];
  const struct disk_remote *disk = find_stored (v, params->name);

  r->deadline_ms = params->deadline_ms;
  flush_bound_init (&r->backlog.bound, params->deadline_ms);
  r->disk.since = (int64_t)time (NULL);
  r->state = NBDM_OUT_OF_SYNC;
  disk_explain_locked (&r->disk, "never copied yet");
  if (disk) {
    uint32_t flags = le32toh (disk->flags);
    uint32_t state = le32toh (disk->state);

    if (state >= NBDM_IN_SYNC && state <= NBDM_FAILED)
      r->state = state;
    r->disk.paused = flags & REMOTE_PAUSED;
    r->assumed = flags & REMOTE_ASSUMED;
    r->generation = le64toh (disk->generation);
    r->address = le64toh (disk->address);
    r->disk.since = (int64_t)le64toh ((uint64_t)disk->since);
    disk_explain_locked (&r->disk, "%.159s", disk->reason);
  }
  return disk ? open_dirty_map (v, r) : 0;
}

/* --- may it be served? ------------------------------------------------- */

static int
check_left_out (const struct nbdm *v)
{
  for (uint32_t i = 0; i < LAYOUT_MAX_REMOTES; i++) {
    const char *name = v->sb.remotes[i].name;

    if (name[0] && !volume_has_remote (v, name))
      return set_message (
          -EINVAL,
          "the local disk is not ok, and remote \"%.63s\", which may have the "
          "only copy of what it misses, is not in the configuration: put it "
          "back, under this name, until the local disk is ok",
          name);
  }
  return 0;
}

/* Is the region clean on a remote whose map is believed? */
static bool
known_clean (const struct nbdm *v, uint64_t region)
{
  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    const struct remote *r = &v->remotes[i];

    if (!r->disk.map_lost && r->disk.dm.mapping
        && !bitmap_test (&r->disk.dm.map[MAP_DIRTY], region))
      return true;
  }
  return false;
}

/* See the table above. */
static bool
sources_known (struct nbdm *v)
{
  const struct bitmap *missing = &v->local.disk.dm.map[MAP_DIRTY];
  uint64_t nr = v->nr_regions, region = 0;
  unsigned lost = 0;

  FOR_EACH_DISK (d, v)
    lost += d->map_lost;
  if (lost < 2)
    return true;
  for (; region < nr; region++) {
    if (!v->local.disk.map_lost)
      region = bitmap_next_set (missing, region, nr);
    if (region < nr && !known_clean (v, region))
      return false;
  }
  return true;
}

int
volume_check_sources (struct nbdm *v)
{
  char why[NBDM_REASON_LEN];
  int rc;

  if (v->local.state == NBDM_LOCAL_OK)
    return 0;
  rc = check_left_out (v);
  if (rc < 0 || sources_known (v))
    return rc;
  snprintf (why, sizeof why, "%.*s", (int)strcspn (v->reason, ":"), v->reason);
  return set_message (-ENOTRECOVERABLE,
                      "%s, and so is another map: the local disk misses writes "
                      "that only remotes have, and nothing says which disk has "
                      "the newest data; nothing is served, no disk was touched",
                      why);
}

/* --- what may differ --------------------------------------------------- */

/* Create the lost and new maps; after that all maps may be changed. */
static int
prepare_maps (struct nbdm *v)
{
  uint64_t session = volume_next_session (v);
  int rc = local_map_renew (v);

  for (uint32_t i = 0; i < v->nr_remotes && rc == 0; i++)
    rc = renew_dirty_map (v, &v->remotes[i]);
  fault_point ("maps_renewed");
  FOR_EACH_DISK (d, v)
    if (rc == 0)
      rc = dirty_map_unseal (&d->dm, session);
  fault_point ("maps_unsealed");
  for (uint32_t i = 0; i < v->nr_remotes && rc == 0; i++)
    if (v->remotes[i].disk.map_lost && !v->remotes[i].disk.is_node)
      dirty_map_mark (&v->remotes[i].disk.dm, 0, v->nr_regions, true);
  return rc;
}

/* Rule 8: in sync is the same generation and no dirty bit.  A superblock that
 * says "in sync" with another generation contradicts itself.
 */
static void
check_generation (struct nbdm *v, struct remote *r)
{
  if (r->state != NBDM_IN_SYNC || r->generation == v->generation
      || r->disk.is_node)
    return;
  mark_all_dirty_and_late (r);
  snprintf (v->reason, sizeof v->reason,
            "%s was in sync with another generation: everything is copied "
            "again",
            r->disk.name);
}

static void
miss_extent (void *opaque, uint64_t extent)
{
  struct nbdm *v = opaque;
  uint64_t offset = extent * EXTENT_SIZE;

  local_miss_range_locked (v, offset,
                           v->size - offset < EXTENT_SIZE ? v->size - offset
                                                          : EXTENT_SIZE);
}

static void
mark_extent (void *opaque, uint64_t extent)
{
  struct nbdm *v = opaque;
  uint64_t offset = extent * EXTENT_SIZE;
  uint64_t length
      = v->size - offset < EXTENT_SIZE ? v->size - offset : EXTENT_SIZE;

  /* Only remotes got the write: its mark in local's map is lost, and so may be
   * the marks of the remotes that did not get it.
   */
  if (v->local.state == NBDM_LOCAL_FAILED)
    miss_extent (v, extent);
  mark_remotes (v, offset, length, false);
}

/* The disk was in use before the stop and cannot be opened now, or its flush
 * may have failed: its answered and unflushed writes may be lost, as in a
 * takeover.
 */
static bool
local_lost_at_start (const struct nbdm *v)
{
  return v->local.unflushed
         || (v->local.state == NBDM_LOCAL_FAILED
             && le32toh (v->sb.local_state) != NBDM_LOCAL_FAILED);
}

/* After lost power the commands under way are not known, only that they were to
 * dirty regions (rule 12).
 */
static void
make_all_late (struct nbdm *v)
{
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    if (!v->remotes[i].disk.is_node) /* it fences late writes */
      bitmap_merge (&v->remotes[i].disk.dm.map[MAP_LATE],
                    &v->remotes[i].disk.dm.map[MAP_DIRTY]);
}

int
volume_recover (struct nbdm *v)
{
  int rc = prepare_maps (v);

  if (rc < 0)
    return rc;
  local_map_recover (v);
  /* A flush of a disk that was being caught up has failed, in this start or in
   * an earlier one (open.c).  This comes before any mark of a remote: a region
   * that local does not miss would have local as its only source.
   */
  if (v->local.flush_error || v->local.unflushed)
    local_miss_all_locked (v);
  rc = open_activity (v);
  if (rc == 0)
    rc = open_inflight (v);
  if (rc < 0)
    return rc;
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    check_generation (v, &v->remotes[i]);
  if (v->was_in_use) {
    /* After a clean stop the unflushed sets are empty: only a start after a
     * crash has anything to do here.  Local's marks come first, as above: what
     * such a disk had not flushed may be lost with it.
     */
    if (v->node.nr_peers > 1)
      activity_visit (&v->activity, node_doubt_extent, v);
    if (local_lost_at_start (v))
      activity_visit (&v->activity, miss_extent, v);
    for (uint32_t i = 0; i < v->nr_remotes; i++)
      if (v->remotes[i].disk.is_node)
        node_doubt_unflushed_locked (&v->remotes[i]);
      else
        unflushed_lost_locked (&v->remotes[i]);
    fault_point ("recover_lost");
    if (!same_page_cache (v)) {
      activity_visit (&v->activity, mark_extent, v);
      make_all_late (v);
      note_lost_cache (v);
    }
  }
  if (v->has_nodes)
    node_recovered (v, v->was_in_use, !same_page_cache (v));
  return 0;
}
