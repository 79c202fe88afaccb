/* SPDX-License-Identifier: BSD-3-Clause */

/* A local disk that keeps a request for too long.  See local_deadline.c. */

#ifndef NBDM_LOCAL_DEADLINE_H
#define NBDM_LOCAL_DEADLINE_H

struct nbdm;

/* No effect without a deadline for local.  Join the guard while the ticker
 * runs, as the ticker bounds a takeover.
 */
int local_guard_start (struct nbdm *v);
void local_guard_join (struct nbdm *v);

#endif /* NBDM_LOCAL_DEADLINE_H */
