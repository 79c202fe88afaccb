/* SPDX-License-Identifier: BSD-3-Clause */

/* Free the volume.  See volume_free.c. */

#ifndef NBDM_VOLUME_FREE_H
#define NBDM_VOLUME_FREE_H

struct nbdm;

/* The last step of nbdm_close: free what a late carrier may still use. */
void volume_free (struct nbdm *v);

#endif /* NBDM_VOLUME_FREE_H */
