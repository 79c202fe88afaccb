/* SPDX-License-Identifier: BSD-3-Clause */

/* What local misses, and which disk serves it.  See local_state.c. */

#ifndef NBDM_LOCAL_STATE_H
#define NBDM_LOCAL_STATE_H

#include <stdbool.h>
#include <stdint.h>

#include "api.h"

struct nbdm;

/* Count an error of the local disk, if `rc` is one, and keep its words (of
 * last_error).
 */
void local_note_error (struct nbdm *v, int rc); /* takes the lock */
void local_note_error_locked (struct nbdm *v, int rc);
/* Local has failed: a remote in sync takes its place, durably.  0: local is
 * failed and a remote serves; -EIO: there is no such remote, or policy stop;
 * nothing has changed but that more may be dirty.  Drops the lock meanwhile;
 * the caller leads no flush.
 */
int local_takeover_relock (struct nbdm *v);
/* Wait until no takeover is under way.  The volume may be drained meanwhile: a
 * thread that a stop does not wait for looks whether it is after this wait, and
 * then begins no takeover.
 */
void local_await_takeover_relock (struct nbdm *v);
/* The same after a failed flush, where else the volume fails. */
int local_flush_lost_relock (struct nbdm *v);
/* Local has lost bytes, see local_check_size: fail it, if a remote can serve.
 * Takes the lock.
 */
void local_give_up (struct nbdm *v);
/* Could a remote take local's place now? */
bool local_may_be_replaced_locked (const struct nbdm *v);
/* A region could not be read on local, and was on a remote: local misses it
 * from now on, so that it is written anew.  Takes the lock.
 */
void local_miss_region (struct nbdm *v, uint64_t region);
/* Does local miss nothing, and has nothing shown that it may have lost a
 * write?  Ask before an answer of the disk and after it, as it may fail
 * meanwhile.  Takes no lock.
 */
bool local_believed (const struct nbdm *v);
/* May it have lost writes, while it is not known yet which disk serves? */
bool local_doubted (const struct nbdm *v);
/* May a region be read from local? */
bool local_has_locked (const struct nbdm *v, uint64_t region);
/* Has every region of the range a leg in use that has it? */
bool range_has_source_locked (const struct nbdm *v, uint64_t offset,
                              uint64_t length);
/* What a restart may believe: see local_state.c on takeovers. */
uint32_t local_persistent_state (const struct nbdm *v);
/* New state, in memory; bumps the serial. */
void local_set_locked (struct nbdm *v, enum nbdm_local_state state);
/* resyncing -> ok when nothing is missing; durable. */
void local_update_state_locked (struct nbdm *v);

#endif /* NBDM_LOCAL_STATE_H */
