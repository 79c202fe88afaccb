/* SPDX-License-Identifier: BSD-3-Clause */

/* Changes of state, durable before anybody is answered.  See state.c. */

#ifndef NBDM_STATE_H
#define NBDM_STATE_H

#include <stdbool.h>
#include <stdint.h>

#include "api.h"

struct command;
struct conn;
struct nbdm;
struct remote;

/* Write the superblock as things are.  A failure makes the volume failed. */
int volume_persist_locked (struct nbdm *v);
void volume_fail_locked (struct nbdm *v, const char *why);
/* The kernel may have dropped what it could not write: leave word for the next
 * start, which then recovers as after lost power.  Is there such word?
 */
void volume_distrust (const struct nbdm *v);
bool volume_distrusted (const struct nbdm *v);
/* New state and reason (printf), in memory; bumps the serial. */
void remote_set_locked (struct remote *r, enum nbdm_remote_state state,
                        const char *fmt, ...)
    __attribute__ ((format (printf, 3, 4)));
/* -ESHUTDOWN once a stop has begun: commands change nothing any more.  The logs
 * are closed by then, or about to be, and a bit set in a map behind its CRC
 * would make the next start disbelieve it.
 */
int command_gate_locked (const struct nbdm *v);
/* Its clean and late regions' writes are to be sent to it. */
bool remote_used_locked (const struct remote *r);
/* Its connection is dead: hold, or go out of sync.  No effect if it has
 * another one by now.  Drops the remote's reference.
 */
void remote_lost_locked (struct remote *r, struct conn *conn);
/* Out of sync from now on, durably: what is in flight becomes dirty. */
void remote_degrade_locked (struct remote *r);
/* It answered an error, or was dropped: kill the connection, then degrade. */
void remote_broken_locked (struct remote *r, struct conn *conn,
                           const char *why);
/* An error it answered: does it refuse to zero what it offered to? */
void remote_heed_refusal (struct remote *r, const struct command *cmd);
/* in_sync if that is proven (rule 8), else resyncing; durable. */
void remote_update_state_locked (struct remote *r);
/* A write that this remote misses: a new generation begins with the first. */
void generation_advance_locked (struct nbdm *v, struct remote *r);
/* The regions a byte range touches: rounded outwards. */
void region_span (const struct nbdm *v, uint64_t offset, uint64_t length,
                  uint64_t *first, uint64_t *count);
/* Mark the regions dirty, except those of which this remote holds the only
 * copy, as local and every other remote misses them.  With `late` also late.
 */
void mark_regions_locked (struct remote *r, uint64_t first, uint64_t count,
                          bool late);
void mark_dirty_locked (struct remote *r, uint64_t offset, uint64_t length,
                        bool late);
/* A takeover ends: a remote that was spared a mark as the only source gets it
 * if another remote has the region by now.
 */
void remotes_pay_locked (struct nbdm *v);
/* The connection is lost: unflushed becomes dirty, with that exception. */
void unflushed_lost_locked (struct remote *r);
/* Policy stop's fence, once everything is in sync. */
void lift_fence_locked (struct nbdm *v);

#endif /* NBDM_STATE_H */
