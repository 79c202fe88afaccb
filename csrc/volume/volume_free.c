/* SPDX-License-Identifier: BSD-3-Clause */

/* The last step of a volume's end.  It stands here, as a thread that the local
 * disk still keeps takes it (local_io.c).
 */

#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

#include "volume/volume.h"
#include "volume/volume_free.h"

/* A file that is closed writes nothing, a block device may: so the disk is
 * last, and a thread that it still keeps does it.
 */
void
volume_free (struct nbdm *v)
{
  if (v->local.file.fd >= 0)
    close (v->local.file.fd);
  pthread_mutex_destroy (&v->lock);
  pthread_cond_destroy (&v->changed);
  pthread_cond_destroy (&v->events);
  pthread_cond_destroy (&v->ticking);
  free (v);
}
