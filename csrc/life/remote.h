/* SPDX-License-Identifier: BSD-3-Clause */

/* A remote's connection, used or not.  See remote.c. */

#ifndef NBDM_REMOTE_H
#define NBDM_REMOTE_H

struct remote;

/* As nbdm_disk_admit. */
int remote_admit_locked (struct remote *r);

#endif /* NBDM_REMOTE_H */
