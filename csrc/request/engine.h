/* SPDX-License-Identifier: BSD-3-Clause */

/* A request's way through the disks.  See engine.c. */

#ifndef NBDM_ENGINE_H
#define NBDM_ENGINE_H

#include <stdbool.h>
#include <stdint.h>

#include "logs/inflight.h"

struct long_zero;
struct nbdm;
struct request;
struct sector;

/* The local leg's part of an admitted request.  An error's words are kept in
 * the request: another thread may complete it.
 */
int request_write_local (struct nbdm *v, struct request *req);
/* Local's part is done, with local_rc, and the commands are issued: wait for
 * them, account for what became of them, retire.  The request's answer.
 */
int request_complete (struct nbdm *v, struct request *req, int local_rc);
/* The same of a request that succeeded on local and on each leg, if it is done
 * at once: false, and nothing is, if local has failed meanwhile.
 */
bool request_try_complete (struct nbdm *v, struct request *req, int *rc);

/* Carry out a request that is one in the logs too: at most MAX_PIECE bytes, in
 * whole sectors.  `sector`: its buffer is filled when it is admitted, see
 * sector.c; or NULL.
 */
int request_run (struct nbdm *v, enum slot_kind kind, const void *buf,
                 uint64_t length, uint64_t offset, uint32_t flags,
                 const struct sector *sector, struct long_zero *long_zero);

/* -EINVAL with a message if a client's range lies outside this volume. */
int check_range (const struct nbdm *v, uint64_t count, uint64_t offset);
/* Is it in whole sectors? */
bool in_sectors (const struct nbdm *v, uint64_t count, uint64_t offset);

#endif /* NBDM_ENGINE_H */
