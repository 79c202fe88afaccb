/* SPDX-License-Identifier: BSD-3-Clause */

/* A request's part on one remote; see leg.c. */

#ifndef NBDM_LEG_H
#define NBDM_LEG_H

struct leg;
struct request;

/* Send the planned round; its commands hold any error. */
void leg_issue (struct leg *leg);
/* Wait for the issued round, then plan, issue and await the other rounds.
 * leg->result has the result.  Blocks, also for a hold.
 */
void leg_finish (struct request *req, struct leg *leg);
/* Make durable the bytes of a successful leg that were sent without FUA.  They
 * are sent again if the connection is lost.  Blocks as leg_finish does.
 */
void leg_secure (struct request *req, struct leg *leg);

#endif /* NBDM_LEG_H */
