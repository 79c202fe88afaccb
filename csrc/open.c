/* SPDX-License-Identifier: BSD-3-Clause */

/* Open a volume: lock, load, check, recover.
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
 * Order at the start: the logs are stamped with the next session first, the
 * superblock last.  Between them nothing is written, so logs one session
 * ahead of their superblock are as good as level.
 */

#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"
#include "volume.h"

int
state_lock (int dirfd, const char *state_dir, int *lock_fd)
{
  char pid[32] = "";
  int fd = openat (dirfd, "lock", O_RDWR | O_CREAT | O_CLOEXEC, 0600);

  if (fd < 0)
    return set_error (-errno, "cannot open the lock in %s", state_dir);
  if (flock (fd, LOCK_EX | LOCK_NB) < 0) {
    int err = errno;
    if (pread (fd, pid, sizeof pid - 1, 0) < 0)
      pid[0] = '\0';
    close (fd);
    if (err != EWOULDBLOCK)
      return set_error (-err, "cannot lock %s", state_dir);
    pid[strcspn (pid, "\n")] = '\0';
    return set_message (-EBUSY, "%s is in use by process %s", state_dir,
                        pid[0] ? pid : "(unknown)");
  }
  snprintf (pid, sizeof pid, "%d\n", (int)getpid ());
  /* Only who asks reads it: a failure here loses a number in a message. */
  if (ftruncate (fd, 0) < 0 || pwrite (fd, pid, strlen (pid), 0) < 0)
    (void)0;
  *lock_fd = fd;
  return 0;
}

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
  dirty_map_mark (&r->dm, 0, r->volume->nr_regions, true);
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
  for (uint32_t i = 0; i < v->nr_remotes && rc == 0; i++) {
    know_nothing (&v->remotes[i]);
    rc = dirty_map_persist (&v->remotes[i].dm);
  }
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

  if (rc == 0 && !is_clean (v) && !page_cache_lived (v)) {
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
    know_nothing (r);
  return rc;
}

static int
open_remote (struct nbdm *v, const struct nbdm_remote_params *params,
             uint32_t index)
{
  struct remote *r = &v->remotes[index];
  const struct disk_remote *disk = find_stored (v, params->name);

  r->volume = v;
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
mark_extent (void *opaque, uint64_t extent)
{
  struct nbdm *v = opaque;
  uint64_t offset = extent * EXTENT_SIZE;
  uint64_t length
      = v->size - offset < EXTENT_SIZE ? v->size - offset : EXTENT_SIZE;

  for (uint32_t i = 0; i < v->nr_remotes; i++)
    mark_dirty_locked (&v->remotes[i], offset, length, false);
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

static int
recover (struct nbdm *v)
{
  int rc = open_activity (v);

  if (rc == 0)
    rc = open_inflight (v);
  if (rc < 0)
    return rc;
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    check_generation (v, &v->remotes[i]);
  if (!is_clean (v)) {
    /* Also after a clean stop there is nothing in these, so it is only said
     * here for whom it matters.
     */
    for (uint32_t i = 0; i < v->nr_remotes; i++)
      dirty_map_lost (&v->remotes[i].dm);
    if (!page_cache_lived (v)) {
      activity_visit (&v->activity, mark_extent, v);
      make_all_late (v);
    }
  }
  return 0;
}

/* Higher than any that was stamped: with one slot of the superblock lost the
 * logs may be ahead of it, and a number that came twice would make an old
 * copy of a log look like the one in use.
 */
static uint64_t
next_session (const struct nbdm *v)
{
  uint64_t session = le64toh (v->sb.session);
  uint64_t stamped = le64toh (v->activity.header.session);

  session = stamped > session ? stamped : session;
  stamped = le64toh (v->inflight.header.session);
  session = stamped > session ? stamped : session;
  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    stamped = le64toh (v->remotes[i].dm.header.session);
    session = stamped > session ? stamped : session;
  }
  return session + 1;
}

/* Stamp the logs, then the superblock: in use, of the next session. */
static int
begin_session (struct nbdm *v)
{
  uint64_t session = next_session (v);
  int rc = activity_begin (&v->activity, session);

  if (rc == 0)
    rc = inflight_begin (&v->inflight, session);
  for (uint32_t i = 0; i < v->nr_remotes && rc == 0; i++)
    rc = dirty_map_begin (&v->remotes[i].dm, session);
  if (rc < 0)
    return rc;
  v->sb.session = htole64 (session);
  memcpy (v->sb.boot_id, v->boot_id, sizeof v->boot_id);
  memcpy (v->sb.mount_id, v->mount_id, sizeof v->mount_id);
  rc = volume_persist_locked (v);
  if (rc == 0 && unlinkat (v->dirfd, DISTRUST_FILE, 0) < 0 && errno != ENOENT)
    rc = set_error (-errno, "cannot remove " DISTRUST_FILE);
  return rc;
}

static int
check_params (const struct nbdm *v, const struct nbdm_params *params,
              uint64_t local_size)
{
  if (strncmp (v->sb.name, params->name, sizeof v->sb.name) != 0)
    return set_message (-EINVAL,
                        "%s is the state of volume \"%.63s\", not of \"%s\"",
                        params->state_dir, v->sb.name, params->name);
  if (params->size && params->size != v->size)
    return set_message (-EINVAL,
                        "size is %llu, but the volume was made with %llu "
                        "bytes",
                        (unsigned long long)params->size,
                        (unsigned long long)v->size);
  if (params->region_size != v->region_size)
    return set_message (-EINVAL,
                        "region_size is %u, but the volume was made with %u "
                        "bytes",
                        params->region_size, v->region_size);
  if (local_size < v->size)
    return set_message (-ERANGE,
                        "the local disk %s has %llu bytes, the volume %llu",
                        params->local, (unsigned long long)local_size,
                        (unsigned long long)v->size);
  return 0;
}

static int
load_superblock (struct nbdm *v, const char *state_dir)
{
  bool torn;
  int rc;

  v->sb_fd = openat (v->dirfd, "superblock", O_RDWR | O_CLOEXEC);
  if (v->sb_fd < 0)
    return errno == ENOENT
               ? set_message (-ENOENT, "there is no volume in %s", state_dir)
               : set_error (-errno, "cannot open the superblock in %s",
                            state_dir);
  rc = superblock_load (v->sb_fd, &v->sb, &torn);
  if (rc < 0)
    return rc;
  if (torn)
    /* The lost slot may be the newer one, which said: in use. */
    v->sb.flags &= htole32 (~(uint32_t)SUPERBLOCK_CLEAN);
  memcpy (v->uuid, v->sb.uuid, sizeof v->uuid);
  v->size = le64toh (v->sb.size);
  v->region_size = le32toh (v->sb.region_size);
  v->generation = le64toh (v->sb.generation);
  v->local_state = NBDM_LOCAL_OK;
  if (v->size == 0 || v->region_size == 0
      || le32toh (v->sb.ring_slots) != RING_SLOTS
      || le32toh (v->sb.activity_slots) != ACTIVITY_EXTENTS
      || le32toh (v->sb.extent_size) != EXTENT_SIZE)
    return set_message (-EUCLEAN, "the superblock in %s is garbled", state_dir);
  v->nr_regions = (v->size - 1) / v->region_size + 1;
  return superblock_identity (v->dirfd, v->boot_id, v->mount_id);
}

/* In sync and not connected yet is holding: early writes wait for the first
 * connection as for a lost one.
 */
static void
begin_states (struct nbdm *v)
{
  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    struct remote *r = &v->remotes[i];

    if (r->state != NBDM_IN_SYNC) {
      if (r->state != NBDM_FAILED)
        r->state = NBDM_OUT_OF_SYNC;
      v->fenced = v->fenced || v->policy == NBDM_STOP;
      continue;
    }
    r->state = NBDM_HOLDING;
    r->hold_until_ns = now_ns () + v->hold_ms * UINT64_C (1000000);
    snprintf (r->reason, sizeof r->reason, "not connected yet");
  }
}

static int
load (struct nbdm *v, const struct nbdm_params *params)
{
  uint64_t local_size = 0;
  int rc;

  v->dirfd = open (params->state_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (v->dirfd < 0)
    return errno == ENOENT
               ? set_message (-ENOENT, "the state directory %s does not exist",
                              params->state_dir)
               : set_error (-errno, "cannot open the state directory %s",
                            params->state_dir);
  rc = state_lock (v->dirfd, params->state_dir, &v->lock_fd);
  if (rc == 0)
    rc = load_superblock (v, params->state_dir);
  if (rc == 0)
    rc = local_open (v, params->local, &local_size);
  if (rc == 0)
    rc = check_params (v, params, local_size);
  /* What was written to it before us is in no extent: not durable, it would
   * be lost with the power, and no map would know.
   */
  if (rc == 0)
    rc = local_flush (v);
  for (uint32_t i = 0; i < v->nr_remotes && rc == 0; i++)
    rc = open_remote (v, &params->remotes[i], i);
  if (rc == 0)
    rc = recover (v);
  if (rc == 0)
    rc = begin_session (v);
  if (rc == 0)
    begin_states (v);
  return rc;
}

static void
init_sync (struct nbdm *v)
{
  pthread_condattr_t attr;

  pthread_mutex_init (&v->lock, NULL);
  pthread_cond_init (&v->changed, NULL);
  pthread_condattr_init (&attr);
  pthread_condattr_setclock (&attr, CLOCK_MONOTONIC);
  pthread_cond_init (&v->events, &attr);
  pthread_cond_init (&v->ticking, &attr);
  pthread_condattr_destroy (&attr);
}

int
nbdm_open (const struct nbdm_params *params, struct nbdm **volume)
{
  struct nbdm *v = calloc (1, sizeof *v);
  int rc;

  fault_init ();
  if (v == NULL)
    return set_error (-ENOMEM, "open");
  v->dirfd = v->lock_fd = v->sb_fd = v->local_fd = -1;
  v->activity.fd = v->inflight.fd = -1;
  v->policy = params->policy;
  v->hold_ms = params->hold_ms;
  v->nr_remotes = params->nr_remotes;
  for (uint32_t i = 0; i < NBDM_MAX_REMOTES; i++)
    v->remotes[i].dm.fd = -1;
  snprintf (v->name, sizeof v->name, "%s", params->name);
  init_sync (v);
  if (params->nr_remotes > NBDM_MAX_REMOTES)
    rc = set_message (-EINVAL, "at most %d remotes", NBDM_MAX_REMOTES);
  else
    rc = load (v, params);
  if (rc < 0) {
    nbdm_close (v);
    return rc;
  }
  *volume = v;
  return 0;
}
