/* SPDX-License-Identifier: BSD-3-Clause */

/* Log a request before it is issued; see admit.c. */

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
 * durable, a slot is free, local and every remote in use are well, and each
 * remote gets it in one command.  False: nothing is held.
 */
bool request_try_admit (struct nbdm *v, struct request *req);
/* Plan the next round of a leg's commands, from its cursor. */
void leg_plan_locked (struct request *req, struct leg *leg);
/* The round is over: count it in the remote's backlog. */
void leg_count_locked (const struct request *req, struct leg *leg,
                       bool succeeded);
enum backlog_kind leg_kind (const struct request *req, const struct leg *leg);
/* Undo the plan: nothing of this admitted request was sent. */
void request_unplan_locked (struct nbdm *v, struct request *req);
/* The remote does not get the request: mark its range dirty there, before any
 * byte is written.
 */
void remote_miss_locked (struct remote *r, const struct request *req);
/* Give back slot, extents and range. */
void request_retire_locked (struct nbdm *v, struct request *req);

#endif /* NBDM_ADMIT_H */
