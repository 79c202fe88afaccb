/* SPDX-License-Identifier: BSD-3-Clause */

/* The access of one door thread to an executor; see lane.c. */

#ifndef NBDM_LANE_H
#define NBDM_LANE_H

#include "executor/executor.h"
#include "wire/watch.h"

#define LANE_BATCH 32      /* writes begun before the local disk writes */
#define LANE_KEEP_BEGUN 8u /* structs kept for reuse */

/* Only its thread uses it, except that other threads ring watch.box. */
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

/* This thread is the lane's thread until lane_leave. */
void lane_enter (struct lane *lane);
void lane_leave (struct lane *lane);

/* Begin an io.  It does not wait for a remote, nor for a disk that is not
 * quick: a worker gets such an io.  The io may be done when this returns, or
 * continue with lane_push.
 */
void lane_submit (struct lane *lane, struct io *io);
/* Send the commands of all submitted ios together, then write to the local disk
 * while the remotes work.
 */
void lane_push (struct lane *lane);
/* Wait for the door's own descriptor, for answers of remotes, or until the
 * mailbox is rung.  Sets `own->revents`.  0: nothing came within `timeout_ms`.
 * The door must call mailbox_ring_all afterwards.
 */
int lane_poll (struct lane *lane, struct pollfd *own, int timeout_ms);
/* End the ios whose answers have come. */
void lane_take (struct lane *lane);

#endif /* NBDM_LANE_H */
