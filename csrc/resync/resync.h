/* SPDX-License-Identifier: BSD-3-Clause */

/* Resync: copy to a remote the regions that it misses.  See resync.c. */

#ifndef NBDM_RESYNC_H
#define NBDM_RESYNC_H

#include "volume/volume.h"

struct nbdm_pace;
struct nbdm_resync;

/* Within its bounds, and in whole regions. */
struct resync_pace resync_pace (const struct nbdm *v,
                                const struct nbdm_pace *pace);

/* As nbdm_disk_resync of the local disk. */
int resync_local (struct nbdm *v, struct nbdm_resync *io);

#endif /* NBDM_RESYNC_H */
