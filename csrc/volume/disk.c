/* SPDX-License-Identifier: BSD-3-Clause */

/* Operations that are the same for the local disk and for a remote. */

#include <endian.h>
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <time.h>

#include "base/error.h"
#include "volume/disk.h"
#include "volume/volume.h"

struct disk *
volume_disk (struct nbdm *v, uint32_t index)
{
  if (index == 0)
    return &v->local.disk;
  return index <= v->nr_remotes ? &v->remotes[index - 1].disk : NULL;
}

int
no_such_disk (uint32_t index)
{
  return set_message (-EINVAL, "there is no disk %u", index);
}

void
disk_init (struct disk *d, struct nbdm *v, uint32_t index, const char *name)
{
  d->volume = v;
  d->index = index;
  d->dm.fd = -1;
  snprintf (d->name, sizeof d->name, "%s", name);
}

void
disk_bump_locked (struct disk *d)
{
  d->serial++;
  pthread_cond_broadcast (&d->volume->events);
}

void
disk_changed_locked (struct disk *d, bool other)
{
  if (other)
    d->since = (int64_t)time (NULL);
  disk_bump_locked (d);
  pthread_cond_broadcast (&d->volume->changed);
}

void
disk_explain_locked (struct disk *d, const char *fmt, ...)
{
  va_list args;

  va_start (args, fmt);
  vsnprintf (d->reason, sizeof d->reason, fmt, args);
  va_end (args);
}

int
disk_map_open (struct disk *d)
{
  const struct nbdm *v = d->volume;
  bool clean;
  int rc = dirty_map_open (&d->dm, v->dirfd, d->name, v->uuid,
                           le64toh (v->sb.session), v->nr_regions,
                           v->region_size, &clean);

  if (rc == 0 && d->is_node && d->dm.nr_maps < NR_NODE_MAPS) {
    dirty_map_close (&d->dm);
    rc = set_message (-EUCLEAN, "dirty.%s has no map of doubts", d->name);
  }
  return rc;
}

int
disk_map_make (struct disk *d, unsigned contents)
{
  const struct nbdm *v = d->volume;
  int rc
      = dirty_map_create (v->dirfd, d->name, v->uuid, le64toh (v->sb.session),
                          v->nr_regions, v->region_size,
                          contents | (d->map_lost ? NEW_MAP_RENEWED : 0)
                              | (d->is_node ? NEW_MAP_NODE : 0));

  return rc == 0 ? disk_map_open (d) : rc;
}
