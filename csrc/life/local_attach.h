/* SPDX-License-Identifier: BSD-3-Clause */

/* A disk in the place of the local one that failed.  See local_attach.c. */

#ifndef NBDM_LOCAL_ATTACH_H
#define NBDM_LOCAL_ATTACH_H

struct nbdm;

/* As nbdm_disk_admit and nbdm_disk_drop.  Both take the lock. */
int local_admit (struct nbdm *v);
int local_drop (struct nbdm *v, const char *reason);

#endif /* NBDM_LOCAL_ATTACH_H */
