/* SPDX-License-Identifier: BSD-3-Clause */

/* Carries out a request on all disks; see engine.c. */

#ifndef NBDM_ENGINE_H
#define NBDM_ENGINE_H

#include <stdbool.h>
#include <stdint.h>

#include "logs/inflight.h"

struct long_zero;
struct nbdm;
struct request;
struct sector;

/* Do the local leg of an admitted request.  The request keeps the error
 * message: another thread may complete it.
 */
int request_write_local (struct nbdm *v, struct request *req);
/* The local leg ended with local_rc, and the commands are issued: wait for
 * them, account for their results, retire the request.  Returns the request's
 * answer.
 */
int request_complete (struct nbdm *v, struct request *req, int local_rc);
/* The same for a request that succeeded on local and on each leg, without a
 * wait.  False: local has failed in between, and nothing is done.
 */
bool request_try_complete (struct nbdm *v, struct request *req, int *rc);

/* Carry out one logged request: at most MAX_PIECE bytes, in whole sectors.
 * `sector` or NULL: its buffer is filled after the admission, see sector.c.
 */
int request_run (struct nbdm *v, enum slot_kind kind, const void *buf,
                 uint64_t length, uint64_t offset, uint32_t flags,
                 const struct sector *sector, struct long_zero *long_zero);

/* -EINVAL with a message if a client's range lies outside this volume. */
int check_range (const struct nbdm *v, uint64_t count, uint64_t offset);
/* Does the range consist of whole sectors? */
bool in_sectors (const struct nbdm *v, uint64_t count, uint64_t offset);

#endif /* NBDM_ENGINE_H */
