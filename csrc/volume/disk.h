/* SPDX-License-Identifier: BSD-3-Clause */

/* A disk of the volume: what the local disk and a remote have in common.
 *
 * Each misses something or nothing, says why, is flushed, and is copied to.
 * Its state and the rules of its changes are its own kind's: state.c has a
 * remote's, local_state.c has local's.
 */

#ifndef NBDM_DISK_H
#define NBDM_DISK_H

#include <stdbool.h>
#include <stdint.h>

#include "api.h"
#include "logs/dirty_map.h"

struct nbdm;

#define LOCAL_NAME "local" /* the local disk's; no remote is called so */

/* How a resync under way goes about it; see struct nbdm_pace. */
struct resync_pace {
  uint32_t depth, copy_bytes, burst_us, rest_us;
  uint32_t command_bytes,
      window; /* of a copy that is longer: so many at once */
};

/* Group commit: a flush begun when `asked` was N covers every ticket up to N;
 * one runs at a time, so threads that come meanwhile share the next.
 */
struct flush_group {
  uint64_t asked, done;
  bool running;
};

struct disk {
  struct nbdm *volume;
  uint32_t index;           /* 0: local; of a remote from 1 */
  char name[NBDM_NAME_LEN]; /* its dirty map is dirty.NAME */
  /* What it misses.  Of local's only MAP_DIRTY and `copied` are used. */
  struct dirty_map dm;
  bool map_lost; /* at the start: all dirty, as nothing is known */
  /* Of the state; of local, while it is ok, the last error. */
  char reason[NBDM_REASON_LEN];
  int64_t since; /* in this state, seconds since 1970 */
  uint64_t serial;
  struct flush_group flush;
  bool paused;  /* by an operator: no resync; not local */
  bool copying; /* a resync call is under way */
  struct resync_pace pace;
  uint64_t copied_bytes; /* made clean, since start */
};

/* NULL: there is no such disk. */
struct disk *volume_disk (struct nbdm *v, uint32_t index);
/* Says so: -EINVAL. */
int no_such_disk (uint32_t index);

#define FOR_EACH_DISK(d, v)                                                    \
  for (struct disk *d = volume_disk (v, 0); d;                                 \
       d = volume_disk (v, d->index + 1))

void disk_init (struct disk *d, struct nbdm *v, uint32_t index,
                const char *name);
/* The serial grows: threads that wait for a change of the disk look at it. */
void disk_bump_locked (struct disk *d);
/* The same for threads that wait for anything to change.  `other`: its state is
 * another one from now on.
 */
void disk_changed_locked (struct disk *d, bool other);
/* Say why its state is what it is (printf). */
void disk_explain_locked (struct disk *d, const char *fmt, ...)
    __attribute__ ((format (printf, 2, 3)));
/* The dirty map at a start, as dirty_map_open and dirty_map_create: of the
 * session that the superblock says.  Make opens it as well.
 */
int disk_map_open (struct disk *d);
int disk_map_make (struct disk *d, unsigned contents);

#endif /* NBDM_DISK_H */
