/* SPDX-License-Identifier: BSD-3-Clause */

/* The last step of a volume's end.  It is a module of its own because a carrier
 * thread that the local disk keeps may have to run it (local_io.c).
 */

#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

#include "volume/volume.h"
#include "volume/volume_free.h"

/* Closing a block device may write and wait, so this closes the disk last.  If
 * a carrier still uses the disk, the carrier does it.
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
