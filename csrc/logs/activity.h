/* SPDX-License-Identifier: BSD-3-Clause */

/* The write-intent log; see activity.c. */

#ifndef NBDM_ACTIVITY_H
#define NBDM_ACTIVITY_H

#include <stdbool.h>
#include <stdint.h>

#include "base/clock.h"
#include "logs/layout.h"

/* The write-intent log: the set of active extents, and the LRU order.  An
 * extent is in one of the states below; only the step from PENDING to ACTIVE
 * and the reuse of a cold extent's place need a write.  This module decides and
 * serialises; the caller waits, and calls activity_write without the volume's
 * lock.
 */
enum activity_state {
  ACTIVITY_COLD = 0, /* not in the set */
  ACTIVITY_PENDING,  /* in the set, not durable yet: no write may start */
  ACTIVITY_ACTIVE    /* durable */
};

/* Entry i is place i % ACTIVITY_PER_SECTOR of sector i / ACTIVITY_PER_SECTOR.
 * An extent that went cold stays in its place, on disk and in the hash, until
 * another extent takes the place: if it comes back before that, it is durable
 * already.
 */
struct activity_entry {
  uint64_t extent;       /* undefined where the place is empty */
  uint64_t used_ns;      /* when last released, CLOCK_MONOTONIC */
  uint32_t users;        /* requests that hold it */
  uint8_t state;         /* enum activity_state */
  bool cooling;          /* picked to go cold; a new user cancels that */
  bool writing;          /* in a sector that is being written now */
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
  struct disk_activity_sector
      *sectors; /* as on disk, or as to be written next */
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
/* Load the log; then `activity_visit` reports the active extents.  -EUCLEAN: as
 * log_header_load, or a sector is torn, or an extent lies past `nr_extents` or
 * twice in a sector.
 */
int activity_open (struct activity *act, int dirfd, const uint8_t *uuid,
                   uint64_t session, uint32_t nr_entries, uint32_t extent_size,
                   uint64_t nr_extents, bool *clean);
void activity_visit (const struct activity *act,
                     void (*visit) (void *opaque, uint64_t extent),
                     void *opaque);
/* Write the loaded extents, which stay in the set, once more, durably, and
 * stamp the session.  No request may hold an extent before this call.
 */
int activity_begin (struct activity *act, uint64_t session);
/* Write an empty set and LOG_CLEAN, durably.  No request may hold an extent. */
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

/* A write in three steps.  Under the lock, activity_stage copies the changed
 * sectors into `batch` (1; 0: nothing to write).  Without it, activity_write
 * writes them and calls fdatasync.  Under it, activity_written makes the staged
 * extents ACTIVE.  One write at a time: the copies lie in memory that the open
 * allocated, as a write must not need memory (the kernel may need this write to
 * free some).  If the write failed, the caller calls activity_discard instead
 * of _written and never writes again (rule 10): no extent becomes ACTIVE.
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

/* Extents go cold in two steps around the caller's flush. activity_pick picks
 * up to `max` extents without users and last used before `before_ns`, the
 * longest unused first, and returns how many.  After the flush, activity_drop
 * drops those that no request has taken since the pick, and returns how many.
 * One pick and drop at a time.  A new pick replaces the earlier one: if the
 * flush failed, the caller does not call activity_drop.
 */
uint32_t activity_pick (struct activity *act, uint32_t max, uint64_t before_ns);
uint32_t activity_drop (struct activity *act);
/* Remove the cold extents from their places, so that after the next write only
 * the set is on disk.  Otherwise an idle volume would copy long-cold extents
 * again after lost power.
 */
void activity_forget (struct activity *act);
uint32_t activity_count (const struct activity *act); /* in the set */
bool activity_in_set (const struct activity *act, uint64_t extent);
bool activity_is_cooling (const struct activity *act, uint64_t extent);
uint32_t activity_list (const struct activity *act, uint64_t *extents,
                        uint32_t max); /* the last used first */

#endif /* NBDM_ACTIVITY_H */
