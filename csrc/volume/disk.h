/* SPDX-License-Identifier: BSD-3-Clause */

/* A disk of the volume: the members that the local disk and a remote share.
 *
 * Each disk misses some regions or none, has a reason, is flushed and is copied
 * to.  A disk's state, and the rules of its changes, differ by kind: state.c
 * has those of a remote, local_state.c those of local.
 */

#ifndef NBDM_DISK_H
#define NBDM_DISK_H

#include <stdbool.h>
#include <stdint.h>

#include "api.h"
#include "logs/dirty_map.h"

struct nbdm;

#define LOCAL_NAME "local" /* name of the local disk; no remote may have it */

/* The pace of a resync under way; see struct nbdm_pace. */
struct resync_pace {
  uint32_t depth, copy_bytes, burst_us, rest_us;
  uint32_t command_bytes,
      window; /* of a copy that is longer: so many at once */
};

/* Group commit: a flush that begins when `asked` is N covers every ticket up to
 * N.  One flush runs at a time, and all threads that ask in the meantime share
 * the next.
 */
struct flush_group {
  uint64_t asked, done;
  bool running;
};

struct disk {
  struct nbdm *volume;
  uint32_t index;           /* 0: local; remotes count from 1 */
  char name[NBDM_NAME_LEN]; /* its dirty map is dirty.NAME */
  /* The regions that it misses.  For local only MAP_DIRTY and `copied` are
   * used.
   */
  struct dirty_map dm;
  bool is_node;  /* another node of the volume: its map has doubts */
  bool map_lost; /* at the start: the map is lost, so all is dirty */
  /* Why it is in this state.  For local in state ok: its last error. */
  char reason[NBDM_REASON_LEN];
  int64_t since; /* in this state, seconds since 1970 */
  uint64_t serial;
  struct flush_group flush;
  bool paused;  /* by an operator: no resync; never set for local */
  bool copying; /* a resync call is under way */
  struct resync_pace pace;
  uint64_t copied_bytes; /* bytes made clean since start */
};

/* NULL: no such disk exists. */
struct disk *volume_disk (struct nbdm *v, uint32_t index);
/* Set the message and return -EINVAL. */
int no_such_disk (uint32_t index);

#define FOR_EACH_DISK(d, v)                                                    \
  for (struct disk *d = volume_disk (v, 0); d;                                 \
       d = volume_disk (v, d->index + 1))

void disk_init (struct disk *d, struct nbdm *v, uint32_t index,
                const char *name);
/* Increment the serial, and wake the threads that wait for a change of the
 * disk.
 */
void disk_bump_locked (struct disk *d);
/* The same, and wake the threads that wait for any change of the volume.
 * `other`: the disk's state is a new one from now on.
 */
void disk_changed_locked (struct disk *d, bool other);
/* Set the reason of the disk's state (printf). */
void disk_explain_locked (struct disk *d, const char *fmt, ...)
    __attribute__ ((format (printf, 2, 3)));
/* Open or make the dirty map at a start, for the session in the superblock: see
 * dirty_map_open and dirty_map_create. disk_map_make opens the new map as well.
 */
int disk_map_open (struct disk *d);
int disk_map_make (struct disk *d, unsigned contents);

#endif /* NBDM_DISK_H */
