/* SPDX-License-Identifier: BSD-3-Clause */

/* A request is logged, and then it may be issued.  See admit.c. */

#ifndef NBDM_ADMIT_H
#define NBDM_ADMIT_H

#include <stdbool.h>

#include "volume/backlog.h"

struct leg;
struct nbdm;
struct remote;
struct request;

/* Log a request: range lock, activity extents durable, slot, classification;
 * then it may be issued.  -errno: nothing is held.
 */
int request_admit (struct nbdm *v, struct request *req);
/* The same, but only if it needs no wait: the range is free, its extents are
 * durable, there is a slot, local and every remote in use are well, and each
 * remote gets it in one command.  False: nothing is held.
 */
bool request_try_admit (struct nbdm *v, struct request *req);
/* The next round of a leg's commands, from its cursor. */
void leg_plan_locked (struct request *req, struct leg *leg);
/* The round is over, and counted in the remote's backlog. */
void leg_count_locked (const struct request *req, struct leg *leg,
                       bool succeeded);
enum backlog_kind leg_kind (const struct request *req, const struct leg *leg);
/* Nothing of an admitted request was sent. */
void request_unplan_locked (struct nbdm *v, struct request *req);
/* The remote will not be sent the request: it is dirty there, before a byte
 * moves.
 */
void remote_miss_locked (struct remote *r, const struct request *req);
/* Give back slot, extents and range. */
void request_retire_locked (struct nbdm *v, struct request *req);

#endif /* NBDM_ADMIT_H */
