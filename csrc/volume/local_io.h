/* SPDX-License-Identifier: BSD-3-Clause */

/* Threads that make the local disk's system calls, in which they may hang; see
 * local_io.c.
 */

#ifndef NBDM_LOCAL_IO_H
#define NBDM_LOCAL_IO_H

#include <stdbool.h>
#include <stdint.h>

struct nbdm;

enum local_act {
  LOCAL_READ,
  LOCAL_SAMPLE, /* a read whose errors do not count */
  LOCAL_WRITE,
  LOCAL_ZERO,
  LOCAL_FLUSH,
  LOCAL_SEEK,
  LOCAL_SIZE,
  LOCAL_ADVISE,
  LOCAL_CALL /* also runs if the disk is given up */
};

struct local_job {
  enum local_act act;
  uint64_t count, offset;
  void *buf; /* destination of a read, or the bytes to write */
  bool may_trim;
  int whence;
  uint32_t wait_ms; /* limit of the wait; 0: until the disk is given up */
  /* For LOCAL_CALL.  `drop`, if not NULL, runs when no thread waits for the job
   * any more: after `call`, or instead of it.
   */
  int (*call) (struct nbdm *v, void *opaque);
  void (*drop) (void *opaque);
  void *opaque;
};

/* Run the job.  Returns the result of its call, and sets the call's message
 * (last_error) and errno.  LOCAL_GIVEN_UP: the local disk was given up first;
 * -ETIMEDOUT: wait_ms has passed.  In both cases the call may still be under
 * way on the disk.
 */
int64_t local_io_run (struct nbdm *v, const struct local_job *job);
/* The disk has failed: release all waiting threads, and start no call on the
 * disk.
 */
void local_io_give_up (struct nbdm *v);
/* The same or another disk is open again. */
void local_io_renew (struct nbdm *v);

/* Start and end the carriers with the volume, if local has a deadline. */
int local_io_start (struct nbdm *v);
/* Called when no thread asks any more.  False: a call is still under way, and
 * its carrier calls volume_free when the call ends.
 */
bool local_io_end (struct nbdm *v);

/* In local.c: run the job on the calling thread. */
int64_t local_carry_out (struct nbdm *v, const struct local_job *job);

#endif /* NBDM_LOCAL_IO_H */
