/* SPDX-License-Identifier: BSD-3-Clause */

/* Policies degrade and stop, and the switch between them.  See policy.c. */

#ifndef NBDM_POLICY_H
#define NBDM_POLICY_H

struct nbdm;

/* -EIO: the volume is fenced, and the configuration makes fenced reads fail. */
int fenced_read_check (struct nbdm *v);

#endif /* NBDM_POLICY_H */
