/* SPDX-License-Identifier: BSD-3-Clause */

/* Load the logs and find out what may differ.
 *
 * What a start may believe (design, section 4):
 *
 *   superblock says          the logs are            and what may differ is
 *   clean                    empty                   what dirty.* says
 *   not clean, same boot     exact: the page cache   dirty, unflushed, and the
 *   and mount                outlived the process    open slots
 *   not clean, another       what was made durable   dirty, unflushed, every
 *   boot or mount                                    region of every active
 *                                                    extent; the slots are not
 *   any log that is missing, torn, garbled, of another volume or session:
 *   everything, said loudly; the bad file is kept as NAME.bad
 *
 * Where the superblock says that local had failed, or was being caught up, the
 * same is true with the legs turned round: what it misses is in dirty.local,
 * and a remote is the source of it (local_state.c).
 */

#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"
#include "volume.h"

/* Keep a log that cannot be believed, out of the way and loudly. */
static int
set_aside (struct nbdm *v, const char *file, const char *what)
{
  char bad[96], why[NBDM_REASON_LEN];

  snprintf (why, sizeof why, "%s: everything is copied again", what);
  snprintf (v->reason, sizeof v->reason, "%s", why);
  snprintf (bad, sizeof bad, "%s.bad", file);
  if (renameat (v->dirfd, file, v->dirfd, bad) < 0 && errno != ENOENT)
    return set_error (-errno, "cannot set aside %s", file);
  fault_point ("log_set_aside");
  return 0;
}

static bool
not_to_be_believed (int rc)
{
  return rc == -ENOENT || rc == -EUCLEAN;
}

static bool
is_clean (const struct nbdm *v)
{
  return le32toh (v->sb.flags) & SUPERBLOCK_CLEAN;
}

/* Higher than any that was stamped: with one slot of the superblock lost the
 * logs may be ahead of it, and a number that came twice would make an old
 * copy of a log look like the one in use.
 */
uint64_t
volume_next_session (const struct nbdm *v)
{
  uint64_t session = le64toh (v->sb.session);
  uint64_t stamped = le64toh (v->activity.header.session);

  session = stamped > session ? stamped : session;
  stamped = le64toh (v->inflight.header.session);
  session = stamped > session ? stamped : session;
  stamped = le64toh (v->local.dm.header.session);
  session = stamped > session ? stamped : session;
  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    stamped = le64toh (v->remotes[i].dm.header.session);
    session = stamped > session ? stamped : session;
  }
  return session + 1;
}

/* A superblock that is clean vouches for the logs of its session alone.  Logs
 * ahead of it are those of a start that did not get far, and then empty; or it
 * is an old copy put back, and they are of a session that nobody closed.
 */
static bool
was_in_use (const struct nbdm *v)
{
  return !is_clean (v) || volume_next_session (v) > le64toh (v->sb.session) + 1;
}

/* A log that was not closed, under a superblock that says all were: an old
 * copy put back.  One session ahead it was merely stamped by a start that
 * did not get far.
 */
static int
check_clean (const struct nbdm *v, const char *file, bool clean,
             uint64_t log_session)
{
  if (clean || !is_clean (v) || log_session != le64toh (v->sb.session))
    return 0;
  return set_message (-EUCLEAN,
                      "%s was in use when the volume was not: an "
                      "old copy was put back",
                      file);
}

/* All dirty, late as well, as nobody knows what was under way, and what an
 * operator assumed is overtaken.
 */
static void
know_nothing (struct remote *r)
{
  mark_regions_locked (r, 0, r->volume->nr_regions, true);
  r->assumed = false;
}

/* Durable before a fresh, empty log takes the place of the lost one: a start
 * that ends between the two must not let the next one find nothing amiss.
 */
static int
forget_log (struct nbdm *v, const char *file)
{
  char what[NBDM_REASON_LEN];
  int rc = 0;

  snprintf (what, sizeof what, "%s", last_error ());
  if (v->local.state == NBDM_LOCAL_FAILED)
    local_miss_range_locked (v, 0, v->size);
  for (uint32_t i = 0; i < v->nr_remotes && rc == 0; i++) {
    know_nothing (&v->remotes[i]);
    rc = dirty_map_persist (&v->remotes[i].dm);
  }
  if (rc == 0)
    rc = dirty_map_persist (&v->local.dm);
  fault_point ("forget_persisted");
  return rc < 0 ? rc : set_aside (v, file, what);
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
    rc = check_clean (v, "activity", clean,
                      le64toh (v->activity.header.session));
    if (rc < 0)
      activity_close (&v->activity);
  }
  if (!not_to_be_believed (rc))
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

  /* Killed before the write was marked in local's map: were it only dirty on
   * the remotes, the failed disk would be the source.
   */
  if (v->local.state == NBDM_LOCAL_FAILED)
    local_miss_range_locked (v, slot->offset, slot->length);
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    mark_dirty_locked (&v->remotes[i], slot->offset, slot->length, true);
}

static bool
page_cache_lived (const struct nbdm *v)
{
  return faccessat (v->dirfd, DISTRUST_FILE, F_OK, 0) < 0
         && memcmp (v->sb.boot_id, v->boot_id, sizeof v->boot_id) == 0
         && memcmp (v->sb.mount_id, v->mount_id, sizeof v->mount_id) == 0;
}

static int
open_inflight (struct nbdm *v)
{
  bool clean;
  int rc = inflight_open (&v->inflight, v->dirfd, v->uuid,
                          le64toh (v->sb.session), RING_SLOTS, &clean);

  if (rc == 0 && was_in_use (v) && !page_cache_lived (v)) {
    /* Nobody made the slots durable: they may be torn, and say nothing that
     * the active extents do not cover.
     */
    inflight_close (&v->inflight);
    return make_inflight (v);
  }
  if (rc == 0) {
    rc = check_clean (v, "inflight", clean,
                      le64toh (v->inflight.header.session));
    if (rc == 0)
      rc = inflight_replay (&v->inflight, v->size, replay_slot, v);
    if (rc < 0)
      inflight_close (&v->inflight);
  }
  if (!not_to_be_believed (rc))
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

static int
make_dirty_map (struct nbdm *v, struct remote *r)
{
  uint64_t session = le64toh (v->sb.session);
  bool clean;
  int rc = dirty_map_create (v->dirfd, r->name, v->uuid, session, v->nr_regions,
                             v->region_size, true);

  if (rc == 0)
    rc = dirty_map_open (&r->dm, v->dirfd, r->name, v->uuid, session,
                         v->nr_regions, v->region_size, &clean);
  return rc;
}

static int
open_dirty_map (struct nbdm *v, struct remote *r, bool stored)
{
  char file[80];
  bool clean;
  int rc;

  snprintf (file, sizeof file, "dirty.%s", r->name);
  if (!stored) /* a remote that was added to the configuration */
    return make_dirty_map (v, r);
  rc = dirty_map_open (&r->dm, v->dirfd, r->name, v->uuid,
                       le64toh (v->sb.session), v->nr_regions, v->region_size,
                       &clean);
  if (rc == 0) {
    rc = check_clean (v, file, clean, le64toh (r->dm.header.session));
    if (rc < 0)
      dirty_map_close (&r->dm);
  }
  if (!not_to_be_believed (rc))
    return rc;
  rc = set_aside (v, file, last_error ());
  if (rc == 0)
    rc = make_dirty_map (v, r);
  if (rc == 0)
    dirty_map_mark (&r->dm, 0, v->nr_regions, true);
  r->assumed = false;
  r->map_lost = true;
  return rc;
}

int
remote_load (struct nbdm *v, const struct nbdm_remote_params *params,
             uint32_t index)
{
  struct remote *r = &v->remotes[index];
  const struct disk_remote *disk = find_stored (v, params->name);

  r->index = index;
  r->deadline_ms = params->deadline_ms;
  r->since = (int64_t)time (NULL);
  r->state = NBDM_OUT_OF_SYNC;
  snprintf (r->name, sizeof r->name, "%s", params->name);
  snprintf (r->reason, sizeof r->reason, "never copied yet");
  if (disk) {
    uint32_t flags = le32toh (disk->flags);
    uint32_t state = le32toh (disk->state);

    if (state >= NBDM_IN_SYNC && state <= NBDM_FAILED)
      r->state = state;
    r->paused = flags & REMOTE_PAUSED;
    r->assumed = flags & REMOTE_ASSUMED;
    r->generation = le64toh (disk->generation);
    r->since = (int64_t)le64toh ((uint64_t)disk->since);
    snprintf (r->reason, sizeof r->reason, "%.159s", disk->reason);
  }
  return open_dirty_map (v, r, disk != NULL);
}

/* Rule 8: in sync is the same generation and no dirty bit.  A superblock that
 * says in sync of another generation contradicts itself.
 */
static void
check_generation (struct nbdm *v, struct remote *r)
{
  if (r->state != NBDM_IN_SYNC || r->generation == v->generation)
    return;
  know_nothing (r);
  snprintf (v->reason, sizeof v->reason,
            "%s was in sync with another generation: everything is copied "
            "again",
            r->name);
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

  /* A write that only remotes got: its mark in local's map is lost, and so may
   * be those of the remotes that did not get it.
   */
  if (v->local.state == NBDM_LOCAL_FAILED)
    miss_extent (v, extent);
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    if (v->remotes[i].state != NBDM_IN_SYNC)
      mark_dirty_locked (&v->remotes[i], offset, length, false);
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    mark_dirty_locked (&v->remotes[i], offset, length, false);
}

/* It was in use, and is not to be had: what it answered and had not flushed
 * may have gone with it, as in a takeover.
 */
static bool
local_went_away (const struct nbdm *v)
{
  return v->local.state == NBDM_LOCAL_FAILED
         && le32toh (v->sb.local_state) != NBDM_LOCAL_FAILED;
}

/* After lost power nobody knows which commands were under way, only that
 * they were to dirty regions (rule 12).
 */
static void
make_all_late (struct nbdm *v)
{
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    bitmap_merge (&v->remotes[i].dm.map[MAP_LATE],
                  &v->remotes[i].dm.map[MAP_DIRTY]);
}

int
volume_recover (struct nbdm *v)
{
  int rc;

  local_map_recover (v);
  rc = open_activity (v);
  if (rc == 0)
    rc = open_inflight (v);
  if (rc < 0)
    return rc;
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    check_generation (v, &v->remotes[i]);
  if (was_in_use (v)) {
    /* Also after a clean stop there is nothing in these, so it is only said
     * here for whom it matters.
     */
    for (uint32_t i = 0; i < v->nr_remotes; i++)
      unflushed_lost_locked (&v->remotes[i]);
    if (local_went_away (v))
      activity_visit (&v->activity, miss_extent, v);
    fault_point ("recover_lost");
    if (!page_cache_lived (v)) {
      activity_visit (&v->activity, mark_extent, v);
      make_all_late (v);
    }
  }
  return 0;
}
