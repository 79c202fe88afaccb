/* SPDX-License-Identifier: BSD-3-Clause */

/* A limit on how long the local disk may keep a request.  See local_deadline.c.
 */

#ifndef NBDM_LOCAL_DEADLINE_H
#define NBDM_LOCAL_DEADLINE_H

struct nbdm;

/* Both do nothing if local has no deadline.  Join the guard while the ticker
 * runs, because the ticker bounds a takeover.
 */
int local_guard_start (struct nbdm *v);
void local_guard_join (struct nbdm *v);

#endif /* NBDM_LOCAL_DEADLINE_H */
