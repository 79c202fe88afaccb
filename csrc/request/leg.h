/* SPDX-License-Identifier: BSD-3-Clause */

/* A request's part on one remote; see leg.c. */

#ifndef NBDM_LEG_H
#define NBDM_LEG_H

struct leg;
struct request;

/* Send the round that is planned; an error is in its commands. */
void leg_issue (struct leg *leg);
/* Wait for the round that was issued, then plan, issue and await the others;
 * what comes of all is in leg->result.  Blocks, also for a hold.
 */
void leg_finish (struct request *req, struct leg *leg);
/* A leg that has finished well: make durable what was sent without FUA.  It is
 * sent again if the connection is lost over that.  Blocks as leg_finish does.
 */
void leg_secure (struct request *req, struct leg *leg);

#endif /* NBDM_LEG_H */
