/* SPDX-License-Identifier: BSD-3-Clause */

/* The status of a volume, and the status in a superblock without a running
 * volume.
 */

#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "api.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/file.h"
#include "base/latency.h"
#include "base/lock.h"
#include "logs/activity.h"
#include "logs/bitmap.h"
#include "logs/dirty_map.h"
#include "logs/inflight.h"
#include "logs/layout.h"
#include "logs/nodes.h"
#include "logs/log_header.h"
#include "logs/superblock.h"
#include "volume/backlog.h"
#include "volume/volume.h"
#include "wire/conn.h"

const char *
nbdm_last_error (void)
{
  return last_error ();
}

int
nbdm_count_client (struct nbdm *v, int change)
{
  LOCK_FOR_SCOPE (&v->lock);
  v->clients += (uint32_t)change;
  return (int)v->clients;
}

void
nbdm_get_status (struct nbdm *v, struct nbdm_status *status)
{
  memset (status, 0, sizeof *status);
  LOCK_FOR_SCOPE (&v->lock);
  memcpy (status->uuid, v->uuid, sizeof status->uuid);
  if (v->has_nodes)
    status->role = v->secondary ? NBDM_SECONDARY : NBDM_PRIMARY;
  status->size = v->size;
  status->region_size = v->region_size;
  status->generation = v->generation;
  status->session = le64toh (v->sb.session);
  status->nr_remotes = v->nr_remotes;
  status->failed = v->failed;
  status->fenced = v->fenced;
  status->policy = v->policy;
  status->fail_fenced_reads = atomic_load (&v->fail_fenced_reads);
  status->stopping = v->stopping;
  status->inflight = v->nr_requests;
  status->active_extents = activity_count (&v->activity);
  status->extent_size = EXTENT_SIZE;
  status->clients = v->clients;
  status->reads = atomic_load (&v->reads);
  status->writes = v->writes;
  status->flushes = v->flushes;
  status->write_ns = atomic_load (&v->write_ns);
  status->activity_persists = v->activity.persists;
  status->superblock_persists = v->superblock_persists;
  FOR_EACH_DISK (d, v)
    status->dirty_persists += d->dm.persists;
  snprintf (status->reason, sizeof status->reason, "%s", v->reason);
}

/* Count the late regions that resync copies only after the late-write window.
 */
static uint64_t
held_back_locked (const struct dirty_map *dm)
{
  const struct bitmap *late = &dm->map[MAP_LATE];
  uint64_t nr = late->nr_set, end = late->nr_bits, region = 0;

  if (nr == 0 || dm->lost.nr_set == 0)
    return nr;
  for (; (region = bitmap_next_set (&dm->lost, region, end)) < end; region++)
    nr -= bitmap_test (late, region);
  return nr;
}

static void
tell_disk_locked (const struct disk *d, struct nbdm_disk_status *status)
{
  memset (status, 0, sizeof *status);
  memcpy (status->name, d->name, sizeof status->name);
  status->dirty_regions = d->dm.map[MAP_DIRTY].nr_set;
  status->copied_bytes = d->copied_bytes;
  status->since = d->since;
  status->serial = d->serial;
  memcpy (status->reason, d->reason, sizeof status->reason);
}

static void
tell_local_locked (const struct nbdm *v, struct nbdm_disk_status *status)
{
  const struct local *l = &v->local;

  tell_disk_locked (&l->disk, status);
  status->state = l->state;
  status->local.attached = l->attached;
  status->local.unproven = l->attached && v->identity.unproven;
  status->local.errors = atomic_load (&l->errors);
  status->local.repaired = l->repaired;
  status->local.silent_ms = atomic_load (&l->silent_ns) / NS_PER_MS;
  memcpy (status->local.note, v->identity.note, sizeof status->local.note);
}

static void
tell_remote_locked (const struct remote *r, struct nbdm_disk_status *status)
{
  struct conn_report report = { .outstanding = 0 };
  const struct dirty_map *dm = &r->disk.dm;

  if (r->conn)
    report = conn_report (r->conn);
  tell_disk_locked (&r->disk, status);
  status->state = r->state;
  if (r->disk.paused
      && (r->state == NBDM_OUT_OF_SYNC || r->state == NBDM_RESYNCING))
    status->state = NBDM_PAUSED;
  status->remote = (struct nbdm_remote_status){
    .paused = r->disk.paused,
    .assumed = r->assumed,
    .connected = r->conn != NULL,
    .admitted = r->admitted,
    .is_node = r->disk.is_node,
    .doubts = dm->map[MAP_DOUBTS].nr_set,
    .late_regions = held_back_locked (dm),
    .unflushed_regions
    = dm->map[MAP_UNFLUSHED0].nr_set + dm->map[MAP_UNFLUSHED1].nr_set,
    .flush_bound = r->backlog.bound.bytes[BACKLOG_DATA],
    .outstanding = report.outstanding,
    .commands = r->commands + report.answered,
    .remote_size = r->remote_size,
    .answered_bytes = r->answered_bytes,
    .answered_zero_bytes = r->answered_zero_bytes,
    .answer_ns = r->answer_ns == UINT64_MAX ? 0 : r->answer_ns,
  };
}

int
nbdm_get_disk_status (struct nbdm *v, uint32_t disk,
                      struct nbdm_disk_status *status)
{
  if (volume_disk (v, disk) == NULL)
    return no_such_disk (disk);
  LOCK_FOR_SCOPE (&v->lock);
  if (disk == NBDM_LOCAL)
    tell_local_locked (v, status);
  else
    tell_remote_locked (&v->remotes[disk - 1], status);
  return 0;
}

void
nbdm_get_latency (struct nbdm *v, struct nbdm_latency *latency)
{
  for (unsigned i = 0; i < NBDM_LATENCY_KINDS * NBDM_LATENCY_BUCKETS; i++) {
    unsigned kind = i / NBDM_LATENCY_BUCKETS, at = i % NBDM_LATENCY_BUCKETS;

    latency->quiet[i] = atomic_load (&v->latency.counts[kind][false][at]);
    latency->disturbed[i] = atomic_load (&v->latency.counts[kind][true][at]);
  }
}

int
nbdm_get_active_extents (struct nbdm *v, uint64_t *extents, uint32_t max)
{
  LOCK_FOR_SCOPE (&v->lock);
  return (int)activity_list (&v->activity, extents, max);
}

#define MAX_RECENT 256 /* latest writes looked at */

static bool
contains (const uint64_t *regions, uint32_t nr, uint64_t region)
{
  for (uint32_t i = 0; i < nr; i++)
    if (regions[i] == region)
      return true;
  return false;
}

int
nbdm_get_recent_regions (struct nbdm *v, uint64_t *regions, uint32_t max)
{
  uint64_t offsets[MAX_RECENT];
  uint32_t nr_offsets, nr = 0;

  pthread_mutex_lock (&v->lock);
  nr_offsets = inflight_recent (&v->inflight, offsets, MAX_RECENT);
  pthread_mutex_unlock (&v->lock);
  for (uint32_t i = 0; i < nr_offsets && nr < max; i++) {
    uint64_t region = offsets[i] / v->region_size;

    /* A slot's fields are trusted only while it is open.  These are hints. */
    if (region < v->nr_regions && !contains (regions, nr, region))
      regions[nr++] = region;
  }
  return (int)nr;
}

static void
peek_local (const struct disk_superblock *sb, struct nbdm_disk_status *status)
{
  memset (status, 0, sizeof *status);
  snprintf (status->name, sizeof status->name, LOCAL_NAME);
  snprintf (status->reason, sizeof status->reason, "%.159s", sb->local_reason);
  status->state = le32toh (sb->local_state);
  if (status->state < NBDM_LOCAL_OK || status->state > NBDM_LOCAL_RESYNCING)
    status->state = NBDM_LOCAL_FAILED;
  status->since = (int64_t)le64toh ((uint64_t)sb->local_since);
}

static void
peek_remote (const struct disk_remote *disk, struct nbdm_disk_status *status)
{
  uint32_t flags = le32toh (disk->flags);

  memset (status, 0, sizeof *status);
  snprintf (status->name, sizeof status->name, "%.63s", disk->name);
  snprintf (status->reason, sizeof status->reason, "%.159s", disk->reason);
  status->state = le32toh (disk->state);
  if (status->state < NBDM_IN_SYNC || status->state > NBDM_FAILED)
    status->state = NBDM_OUT_OF_SYNC; /* as at a start */
  status->remote.paused = (flags & REMOTE_PAUSED) != 0;
  status->remote.assumed = (flags & REMOTE_ASSUMED) != 0;
  status->since = (int64_t)le64toh ((uint64_t)disk->since);
}

static void
peek_volume (const struct disk_superblock *sb, struct nbdm_status *status)
{
  uint32_t flags = le32toh (sb->flags);

  memset (status, 0, sizeof *status);
  memcpy (status->uuid, sb->uuid, sizeof status->uuid);
  status->size = le64toh (sb->size);
  status->region_size = le32toh (sb->region_size);
  status->extent_size = le32toh (sb->extent_size);
  status->generation = le64toh (sb->generation);
  status->session = le64toh (sb->session);
  status->nr_remotes = le32toh (sb->nr_remotes);
  status->fenced = (flags & SUPERBLOCK_FENCED) != 0;
  status->clean = (flags & SUPERBLOCK_CLEAN) != 0;
}

/* The superblock may belong to another user, who can write anything into it.  A
 * remote's name becomes a file name in the state directory, and must not lead
 * outside it.
 */
static bool
is_plausible (const struct disk_superblock *sb, const struct disk_nodes *nodes)
{
  uint32_t nr = le32toh (sb->nr_remotes);

  if (sb->size == 0 || sb->region_size == 0 || nr > NBDM_MAX_REMOTES)
    return false;
  if (superblock_has_nodes (sb)
      && (le32toh (nodes->nr_peers) > LAYOUT_MAX_REMOTES
          || le32toh (nodes->crash) > NBDM_CRASH_HOST))
    return false;
  for (uint32_t i = 0; i < nr; i++)
    if (memchr (sb->remotes[i].name, '/', sizeof sb->remotes[i].name))
      return false;
  return true;
}

/* The directory's descriptor, which the caller closes, or -errno. */
static int
peek_superblock (const char *state_dir, struct disk_superblock *sb,
                 struct disk_nodes *nodes, bool *torn)
{
  int rc, fd, dirfd = open (state_dir, O_PATH | O_DIRECTORY | O_CLOEXEC);

  if (dirfd < 0)
    return set_error (-errno, "cannot open the state directory %s", state_dir);
  fd = openat (dirfd, "superblock", O_RDONLY | PLAIN_FILE);
  if (fd >= 0) {
    rc = superblock_load (fd, sb, nodes, torn);
    close (fd);
    if (rc == 0 && !is_plausible (sb, nodes))
      rc = set_message (-EUCLEAN, "the superblock in %s is garbled", state_dir);
  }
  else if (errno == ENOENT)
    rc = set_message (-ENOENT, "there is no volume in %s", state_dir);
  else
    rc = set_error (-errno, "cannot open the superblock in %s", state_dir);
  if (rc < 0)
    close (dirfd);
  return rc < 0 ? rc : dirfd;
}

int
nbdm_peek_map (const char *state_dir, const char *disk)
{
  struct disk_superblock sb;
  struct disk_nodes nodes;
  struct disk_log_header header;
  char file[80];
  bool torn;
  int rc, dirfd = peek_superblock (state_dir, &sb, &nodes, &torn);

  if (dirfd < 0)
    return dirfd;
  if (torn) /* as a start takes it */
    sb.flags &= htole32 (~(uint32_t)SUPERBLOCK_CLEAN);
  snprintf (file, sizeof file, "dirty.%.63s", disk);
  rc = dirty_map_check (dirfd, disk, sb.uuid, le64toh (sb.session),
                        (le64toh (sb.size) - 1) / le32toh (sb.region_size) + 1,
                        le32toh (sb.region_size), &header);
  close (dirfd);
  if (rc == 0)
    rc = log_header_check_closed (file, &header, &sb);
  if (rc == 0 && le32toh (header.flags) & LOG_RENEWED)
    rc = set_message (-EUCLEAN, "%s was lost", file);
  return rc;
}

/* Check the header of a log that is no map.  Only a start reads its content. */
static int
peek_log (int dirfd, const char *file, const char *magic, uint64_t entries,
          uint64_t entry_size, const struct disk_superblock *sb)
{
  struct disk_log_header expect, header;
  uint64_t session = le64toh (sb->session), is;
  int rc, fd = openat (dirfd, file, O_RDONLY | PLAIN_FILE);

  if (fd < 0)
    return set_error (-errno, "cannot open %s", file);
  log_header_init (&expect, magic, "", sb->uuid, session, entries, entry_size);
  rc = log_header_load (fd, file, &expect, LAYOUT_PAGE, &header);
  close (fd);
  if (rc < 0)
    return rc;
  is = le64toh (header.session);
  if (is != session && is != session + 1)
    return set_message (
        -EUCLEAN, "%s is of session %" PRIu64 ", the volume is at %" PRIu64,
        file, is, session);
  return log_header_check_closed (file, &header, sb);
}

int
nbdm_peek_logs (const char *state_dir)
{
  struct disk_superblock sb;
  struct disk_nodes nodes;
  bool torn;
  int rc, dirfd = peek_superblock (state_dir, &sb, &nodes, &torn);

  if (dirfd < 0)
    return dirfd;
  if (torn) /* as a start takes it */
    sb.flags &= htole32 (~(uint32_t)SUPERBLOCK_CLEAN);
  rc = peek_log (dirfd, "activity", ACTIVITY_MAGIC, ACTIVITY_EXTENTS,
                 EXTENT_SIZE, &sb);
  if (rc == 0)
    rc = peek_log (dirfd, "inflight", INFLIGHT_MAGIC, RING_SLOTS,
                   sizeof (struct disk_slot), &sb);
  close (dirfd);
  return rc;
}

int
nbdm_peek (const char *state_dir, char *name, struct nbdm_status *status,
           struct nbdm_disk_status *disks, struct nbdm_node *node)
{
  struct disk_superblock sb;
  struct disk_nodes nodes;
  bool torn;
  int dirfd = peek_superblock (state_dir, &sb, &nodes, &torn);

  if (dirfd < 0)
    return dirfd;
  close (dirfd);
  snprintf (name, NBDM_NAME_LEN, "%.63s", sb.name);
  peek_volume (&sb, status);
  peek_local (&sb, &disks[NBDM_LOCAL]);
  for (uint32_t i = 0; i < status->nr_remotes; i++)
    peek_remote (&sb.remotes[i], &disks[1 + i]);
  if (node)
    nodes_get (&sb, &nodes, node);
  return 0;
}
