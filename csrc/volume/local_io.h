/* SPDX-License-Identifier: BSD-3-Clause */

/* Threads that may hang at the local disk; see local_io.c. */

#ifndef NBDM_LOCAL_IO_H
#define NBDM_LOCAL_IO_H

#include <stdbool.h>
#include <stdint.h>

struct nbdm;

enum local_act {
  LOCAL_READ,
  LOCAL_SAMPLE, /* a read of which no error counts */
  LOCAL_WRITE,
  LOCAL_ZERO,
  LOCAL_FLUSH,
  LOCAL_SEEK,
  LOCAL_SIZE,
  LOCAL_ADVISE,
  LOCAL_CALL /* also where the disk has been given up */
};

struct local_job {
  enum local_act act;
  uint64_t count, offset;
  void *buf; /* to be read into, or written */
  bool may_trim;
  int whence;
  uint32_t wait_ms; /* for the disk, if nothing gives it up; 0: no limit */
  /* Of LOCAL_CALL.  If nobody waits any more, `drop` is called in the end, or
   * in place of a call that is not begun; or NULL.
   */
  int (*call) (struct nbdm *v, void *opaque);
  void (*drop) (void *opaque);
  void *opaque;
};

/* What the call that the job stands for returns, with its words (last_error)
 * and its errno; LOCAL_GIVEN_UP: the local disk was given up first;
 * -ETIMEDOUT.  After these two the call may still be under way on the disk.
 */
int64_t local_io_run (struct nbdm *v, const struct local_job *job);
/* The disk has failed: all askers go on, and nothing begins on the disk. */
void local_io_give_up (struct nbdm *v);
/* Another disk, or the same one, is open in its place. */
void local_io_renew (struct nbdm *v);

/* The volume begins and ends: with them, if it has a deadline for local. */
int local_io_start (struct nbdm *v);
/* No thread asks any more.  False: a call is still under way, and its carrier
 * calls volume_free when it has ended.
 */
bool local_io_end (struct nbdm *v);

/* local.c: do it, on this thread. */
int64_t local_carry_out (struct nbdm *v, const struct local_job *job);

#endif /* NBDM_LOCAL_IO_H */
