/* SPDX-License-Identifier: BSD-3-Clause */

/* The way of one thread of a door into an executor; see lane.c. */

#ifndef NBDM_LANE_H
#define NBDM_LANE_H

#include "executor/executor.h"
#include "wire/watch.h"

#define LANE_BATCH 32      /* writes begun, before the disk has its turn */
#define LANE_KEEP_BEGUN 8u /* of their memory, for the next */

/* All of it is its thread's own, but that others ring watch.box. */
struct lane {
  struct watch watch;
  struct executor *executor; /* set by the door before the first io */
  struct begun *begun[LANE_BATCH];
  unsigned nr_begun;
  struct begun *kept;
  unsigned nr_kept;
};

/* -ENOMEM: no memory or no descriptor for a mailbox. */
int lane_init (struct lane *lane);
/* No io is under way. */
void lane_destroy (struct lane *lane);

/* From now on, until lane_leave, this thread is the lane's. */
void lane_enter (struct lane *lane);
void lane_leave (struct lane *lane);

/* Take an io in.  It does not wait for a remote, nor for a disk that is not
 * quick: such an io is left to a worker.  The io may be done when this returns,
 * or go on with lane_push.
 */
void lane_submit (struct lane *lane, struct io *io);
/* Send the commands of what was submitted, together; then write to the local
 * disk, while the remotes are at work.
 */
void lane_push (struct lane *lane);
/* Wait for the door's own descriptor, for answers of remotes, or until the
 * mailbox is rung.  `own->revents` is set.  0: none within `timeout_ms`.  What
 * the thread has to ring (mailbox_ring_all) is left to the door.
 */
int lane_poll (struct lane *lane, struct pollfd *own, int timeout_ms);
/* End the ios whose answers have come. */
void lane_take (struct lane *lane);

#endif /* NBDM_LANE_H */
