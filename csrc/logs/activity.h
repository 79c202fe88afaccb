/* SPDX-License-Identifier: BSD-3-Clause */

/* The write-intent log: the extents that may differ.  See activity.c. */

#ifndef NBDM_ACTIVITY_H
#define NBDM_ACTIVITY_H

#include <stdbool.h>
#include <stdint.h>

#include "base/clock.h"
#include "logs/layout.h"

/* The write-intent log: the set of active extents, and the LRU order.  An
 * extent is in one of the states below; only PENDING to ACTIVE, and the
 * reuse of a cold one's place, needs a write.  This file decides and
 * serialises; the caller does the waiting and calls activity_write outside
 * the volume's lock.
 */
enum activity_state {
  ACTIVITY_COLD = 0, /* not in the set */
  ACTIVITY_PENDING,  /* put in, not durable yet: no write may start */
  ACTIVITY_ACTIVE    /* durable */
};

/* Entry i is place i % ACTIVITY_PER_SECTOR of sector i / ACTIVITY_PER_SECTOR.
 * An extent that went cold stays in its place, on disk and in the hash, until
 * the place is taken: coming back before that, it is durable already.
 */
struct activity_entry {
  uint64_t extent;       /* undefined where the place is empty */
  uint64_t used_ns;      /* when last released, CLOCK_MONOTONIC */
  uint32_t users;        /* requests that hold it */
  uint8_t state;         /* enum activity_state */
  bool cooling;          /* picked to go cold; a new user calls it off */
  bool writing;          /* in the sectors being written right now */
  uint32_t hash_next;    /* 1 + index; 0: end */
  uint32_t newer, older; /* in one of the two lists, 1 + index; 0: end */
};

struct activity_lru {
  uint32_t newest, oldest; /* 1 + index; 0: empty */
};

struct activity {
  int fd;
  struct disk_log_header header;
  uint64_t nr_extents;
  uint32_t nr_entries;
  uint32_t nr_sectors;
  struct activity_entry *entries;
  struct disk_activity_sector *sectors; /* what is or will be on disk */
  bool *sector_changed;
  uint32_t *hash; /* 1 + index; 0: end */
  uint32_t hash_mask;
  struct disk_activity_sector *staged; /* what a batch points to */
  uint32_t *staged_index;
  struct activity_lru used;  /* the set, by last use */
  struct activity_lru spare; /* the other places, in the order to take them */
  uint32_t nr_free;          /* spare places */
  uint64_t persists;         /* batches written */
};

int activity_create (int dirfd, const uint8_t *uuid, uint64_t session,
                     uint32_t nr_entries, uint32_t extent_size);
/* Load; then `activity_visit` tells what was active.  -EUCLEAN as above, or
 * a sector is torn, or an extent lies past `nr_extents` or stands twice in it.
 */
int activity_open (struct activity *act, int dirfd, const uint8_t *uuid,
                   uint64_t session, uint32_t nr_entries, uint32_t extent_size,
                   uint64_t nr_extents, bool *clean);
void activity_visit (const struct activity *act,
                     void (*visit) (void *opaque, uint64_t extent),
                     void *opaque);
/* Make the loaded extents, which stay in the set, surely durable, and stamp the
 * session.  No request may hold an extent before this call.
 */
int activity_begin (struct activity *act, uint64_t session);
/* Write an empty set and LOG_CLEAN, durable; no request may hold an extent. */
int activity_finish (struct activity *act);
void activity_close (struct activity *act);

/* Take a user's hold on every extent in [first, last].  All or none:
 *  0        all held and durable: go on
 *  -EINPROGRESS  all held, some not durable yet: have them written
 *           (activity_stage, _write, _written) or wait until they are
 *           (activity_durable), then go on
 *  -EAGAIN  no room: none held; have extents go cold, try again
 *  -EINVAL  wider than the whole set: it will never fit
 */
int activity_hold (struct activity *act, uint64_t first, uint64_t last);
bool activity_durable (const struct activity *act, uint64_t first,
                       uint64_t last);
void activity_release (struct activity *act, uint64_t first, uint64_t last,
                       uint64_t now_ns);

/* A write in three steps.  Under the lock: copy the changed sectors into
 * `batch`; 1, or 0: nothing to write.  Without it: write them and fdatasync.
 * Under it: what was staged is ACTIVE now.  One at a time, for the copies lie
 * in memory of the log's that was taken when it was opened: a write must not
 * need any (it may be what the kernel frees memory with).  If the write failed,
 * activity_discard in the place of _written, and never write again (rule 10):
 * nothing becomes ACTIVE.
 */
struct activity_batch {
  struct disk_activity_sector *sectors;
  uint32_t *index;
  uint32_t count;
};
int activity_stage (struct activity *act, struct activity_batch *batch);
int activity_write (struct activity *act, const struct activity_batch *batch);
void activity_written (struct activity *act, struct activity_batch *batch);
void activity_discard (struct activity_batch *batch);

/* Going cold, in two steps around the caller's flush.  Pick up to `max` extents
 * without users, longest unused first, used last before `before_ns`; returns
 * how many.  Then drop those that no request took meanwhile; returns how many.
 * One pick and drop at a time.  A pick forgets the earlier pick: if the flush
 * of that failed, just do not drop.
 */
uint32_t activity_pick (struct activity *act, uint32_t max, uint64_t before_ns);
uint32_t activity_drop (struct activity *act);
/* Take the cold extents out of their places, so that the next write leaves
 * only the set on disk: for an idle volume, which would otherwise copy what
 * went cold long ago after lost power.
 */
void activity_forget (struct activity *act);
uint32_t activity_count (const struct activity *act); /* in the set */
bool activity_in_set (const struct activity *act, uint64_t extent);
bool activity_is_cooling (const struct activity *act, uint64_t extent);
uint32_t activity_list (const struct activity *act, uint64_t *extents,
                        uint32_t max); /* latest used first */

#endif /* NBDM_ACTIVITY_H */
