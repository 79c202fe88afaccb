/* SPDX-License-Identifier: BSD-3-Clause */

/* The functions that the policy threads call for any disk, by its number. */

#include <errno.h>

#include "api.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/lock.h"
#include "life/local_attach.h"
#include "life/remote.h"
#include "logs/dirty_map.h"
#include "volume/local_state.h"
#include "volume/state.h"
#include "volume/volume.h"

/* A flush of local may have failed while no remote could take its place, and
 * perhaps no client waits for one.
 */
static int
admit_remote (struct remote *r)
{
  struct nbdm *v = r->disk.volume;
  int rc;

  LOCK_FOR_SCOPE (&v->lock);
  r->filled = true;
  rc = remote_admit_locked (r);
  if (rc == 0)
    local_replace_doubted_relock (v);
  return rc;
}

int
nbdm_disk_admit (struct nbdm *v, uint32_t disk)
{
  if (volume_disk (v, disk) == NULL)
    return no_such_disk (disk);
  return disk == NBDM_LOCAL ? local_admit (v)
                            : admit_remote (&v->remotes[disk - 1]);
}

/* A write that is under way has marked what the node lacks, as it began. */
static int
admit_whole_node (struct remote *r)
{
  LOCK_FOR_SCOPE (&r->disk.volume->lock);
  if (r->disk.dm.map[MAP_DIRTY].nr_set > 0)
    return set_message (-EAGAIN, "it has missed a write in the meantime");
  r->filled = false;
  return remote_admit_locked (r);
}

static int
make_whole (struct remote *r)
{
  LOCK_FOR_SCOPE (&r->disk.volume->lock);
  if (!r->admitted || r->disk.dm.map[MAP_DIRTY].nr_set > 0)
    return set_message (-EAGAIN, "it lacks a region");
  r->filled = false;
  return 0;
}

int
nbdm_node_admit (struct nbdm *v, uint32_t disk)
{
  const struct disk *d = volume_disk (v, disk);

  if (d == NULL || !d->is_node)
    return no_such_disk (disk);
  return admit_whole_node (&v->remotes[disk - 1]);
}

int
nbdm_node_whole (struct nbdm *v, uint32_t disk)
{
  const struct disk *d = volume_disk (v, disk);

  if (d == NULL || !d->is_node)
    return no_such_disk (disk);
  return make_whole (&v->remotes[disk - 1]);
}

int
nbdm_disk_drop (struct nbdm *v, uint32_t disk, const char *reason)
{
  struct remote *r;

  if (volume_disk (v, disk) == NULL)
    return no_such_disk (disk);
  if (disk == NBDM_LOCAL)
    return local_drop (v, reason);
  r = &v->remotes[disk - 1];
  LOCK_FOR_SCOPE (&v->lock);
  remote_broken_locked (r, r->conn, reason);
  return 0;
}

uint64_t
nbdm_disk_wait (struct nbdm *v, uint32_t disk, uint64_t seen,
                uint32_t timeout_ms)
{
  uint64_t until_ns = now_ns () + timeout_ms * NS_PER_MS;
  const struct disk *d = volume_disk (v, disk);
  bool in_time = true;

  if (d == NULL)
    return 0;
  LOCK_FOR_SCOPE (&v->lock);
  while (d->serial == seen && !v->waking && in_time)
    in_time = wait_until (&v->events, &v->lock, until_ns);
  return d->serial;
}

void
nbdm_wake (struct nbdm *v)
{
  LOCK_FOR_SCOPE (&v->lock);
  v->waking = true;
  pthread_cond_broadcast (&v->events);
  pthread_cond_broadcast (&v->changed);
}
