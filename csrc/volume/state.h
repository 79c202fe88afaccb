/* SPDX-License-Identifier: BSD-3-Clause */

/* Changes of state.  They are durable before any request is answered.  See
 * state.c.
 */

#ifndef NBDM_STATE_H
#define NBDM_STATE_H

#include <stdbool.h>
#include <stdint.h>

#include "api.h"

struct command;
struct conn;
struct nbdm;
struct remote;

/* Write the current state to the superblock.  If that fails, the volume fails.
 */
int volume_persist_locked (struct nbdm *v);
void volume_fail_locked (struct nbdm *v, const char *why);
/* Leave a note for the next start, look for one, remove it: an empty file in
 * the state directory (volume.h).  It outlives this process, and not lost
 * power, which drops the page cache too.
 */
bool volume_note (const struct nbdm *v, const char *file); /* false: no room */
bool volume_noted (const struct nbdm *v, const char *file);
int volume_forget_note (const struct nbdm *v, const char *file);
/* A flush of local has failed: note it, without room for a file in the
 * superblock, which has room.  volume_trust_locked: local's state and map say
 * all that a flush of it has told; persists, and takes the note back.
 */
void volume_distrust_locked (struct nbdm *v);
void volume_trust_locked (struct nbdm *v);
/* Set a new state and reason (printf) in memory; increments the serial. */
void remote_set_locked (struct remote *r, enum nbdm_remote_state state,
                        const char *fmt, ...)
    __attribute__ ((format (printf, 3, 4)));
/* -ESHUTDOWN once a stop has begun: operators' commands then change nothing.
 * The logs are closed or will be soon, and a bit set after a map's CRC was
 * computed would make the next start reject the map.
 */
int command_gate_locked (const struct nbdm *v);
/* Must writes to its clean and late regions be sent to the remote? */
bool remote_used_locked (const struct remote *r);
/* The remote's connection is dead: begin a hold, or make the remote out of
 * sync.  Does nothing if the remote already has another connection.  Drops the
 * remote's reference.
 */
void remote_lost_locked (struct remote *r, struct conn *conn);
/* Make the remote out of sync, durably; requests in flight become dirty. */
void remote_degrade_locked (struct remote *r);
/* The remote answered an error, or the keeper dropped it: kill the connection,
 * then degrade.
 */
void remote_broken_locked (struct remote *r, struct conn *conn,
                           const char *why);
/* After an answered error: does the server refuse the WRITE_ZEROES that it
 * offered?
 */
void remote_heed_refusal (struct remote *r, const struct command *cmd);
/* A remote that is in use lacks regions from now on, which are dirty: it is
 * resyncing.  A node that has not stored that it is copied to is met again
 * first, so its connection ends: it would take later writes into an image that
 * lacks an earlier one, and call that image whole.  Persists nothing.
 */
void remote_lacks_locked (struct remote *r, const char *fmt, ...)
    __attribute__ ((format (printf, 2, 3)));
/* Is it a node that would take later writes so? */
bool remote_unaware_locked (const struct remote *r);
/* Set in_sync if that is proven (rule 8), else resyncing; durable. */
void remote_update_state_locked (struct remote *r);
/* This remote misses a write: the first such write begins a new generation,
 * durably; false: it had begun already.
 */
bool generation_advance_locked (struct nbdm *v, struct remote *r);
/* The regions that a byte range touches, rounded outwards. */
void region_span (const struct nbdm *v, uint64_t offset, uint64_t length,
                  uint64_t *first, uint64_t *count);
/* Mark the regions dirty, except those of which this remote holds the only copy
 * because local and every other remote miss them.  With `late` also mark them
 * late.
 */
void mark_regions_locked (struct remote *r, uint64_t first, uint64_t count,
                          bool late);
void mark_dirty_locked (struct remote *r, uint64_t offset, uint64_t length,
                        bool late);
/* A takeover ends.  A remote that kept a region clean as its only source gets
 * the deferred mark if another remote has the region now.
 */
void remotes_pay_locked (struct nbdm *v);
/* The connection is lost: make the unflushed regions dirty, with the exception
 * of mark_regions_locked.  Those stay unflushed.
 */
void unflushed_lost_locked (struct remote *r);
/* Lift the fence of policy stop once every remote is in sync. */
void lift_fence_locked (struct nbdm *v);

#endif /* NBDM_STATE_H */
