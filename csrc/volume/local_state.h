/* SPDX-License-Identifier: BSD-3-Clause */

/* The regions that local misses, and the disk that serves instead.  See
 * local_state.c.
 */

#ifndef NBDM_LOCAL_STATE_H
#define NBDM_LOCAL_STATE_H

#include <stdbool.h>
#include <stdint.h>

#include "api.h"

struct nbdm;

/* Count an error of the local disk, if `rc` is one, and keep its message
 * (last_error).
 */
void local_note_error (struct nbdm *v, int rc); /* takes the lock */
void local_note_error_locked (struct nbdm *v, int rc);
/* Local has failed: let a remote in sync replace it, durably.  0: local is
 * failed and a remote serves.  -EIO: no such remote exists, or the policy is
 * stop; then nothing has changed, except that more regions may be dirty.
 * Releases the lock; the caller must lead no flush.
 */
int local_takeover_relock (struct nbdm *v);
/* Wait until no takeover is under way.  The volume may become drained during
 * the wait.  A thread for which a stop does not wait must check that
 * afterwards, and must then begin no takeover.
 */
void local_await_takeover_relock (struct nbdm *v);
/* Take over after a failed flush of local.  If no remote can replace it, the
 * volume fails.
 */
int local_flush_lost_relock (struct nbdm *v);
/* The same for a flush without a client's request.  Waits for a remote on hold
 * that may replace local.  -EIO: the volume has failed, or it is drained, or
 * the policy threads end (nbdm_wake) and the remote is still on hold: then the
 * stop flushes too, and finds the error.
 */
int local_flush_failed_relock (struct nbdm *v);
/* A policy thread calls this.  If a flush of local has failed and a remote can
 * replace it, the remote does so at once.  The call does not wait for a
 * takeover that another thread has begun.
 */
void local_replace_doubted_relock (struct nbdm *v);
/* Local may have lost writes unnoticed, and copies to a remote may have read
 * the old bytes.  Make dirty all regions that may have been copied in this way.
 */
void local_doubt_copies_locked (struct nbdm *v);
/* Local has lost bytes, see local_check_size: fail it if a remote can serve
 * instead.  Takes the lock.
 */
void local_give_up (struct nbdm *v);
/* Could a remote replace local now? */
bool local_may_be_replaced_locked (const struct nbdm *v);
/* Local cannot read the regions.  Mark those that a remote has as missing on
 * local, so that they are rewritten.  Takes the lock.
 */
void local_miss_regions (struct nbdm *v, uint64_t first, uint64_t count);
/* Does local miss nothing, and is there no sign that it lost a write?  Ask
 * before and after a call on the disk, because the disk may fail in between.
 * Takes no lock.
 */
bool local_believed (const struct nbdm *v);
/* May local have lost writes, while it is not decided yet which disk serves? */
bool local_doubted (const struct nbdm *v);
/* May a region be read from local? */
bool local_has_locked (const struct nbdm *v, uint64_t region);
/* Does each region of the range have at least one disk in use that holds it? */
bool range_has_source_locked (const struct nbdm *v, uint64_t offset,
                              uint64_t length);
/* The state to store for a restart.  During a takeover it differs from
 * local.state: see local_state.c.
 */
uint32_t local_persistent_state (const struct nbdm *v);
/* Is there a takeover after which local may have what it misses now? */
bool local_undecided (const struct nbdm *v);
/* Set a new state in memory; increments the serial. */
void local_set_locked (struct nbdm *v, enum nbdm_local_state state);
/* resyncing -> ok when nothing is missing; durable. */
void local_update_state_locked (struct nbdm *v);

#endif /* NBDM_LOCAL_STATE_H */
