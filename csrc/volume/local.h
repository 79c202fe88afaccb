/* SPDX-License-Identifier: BSD-3-Clause */

/* The local disk.  See local.c. */

#ifndef NBDM_LOCAL_H
#define NBDM_LOCAL_H

#include <stdbool.h>
#include <stdint.h>

struct nbdm;

/* What the functions below return where the local disk was given up while they
 * waited for it: no error of the disk's.
 */
#define LOCAL_GIVEN_UP (-ECANCELED)

/* Between the two a disk that failed is not replaced, so that what a thread
 * began on it ends on it, and what comes of it is not taken for the new disk's.
 * May be nested.  The functions below do it for themselves.
 */
void local_use (struct nbdm *v);
void local_leave (void);
/* The ticker's and the guard's: how long has the longest system call on it not
 * returned? */
uint64_t local_watch (struct nbdm *v);
/* Does any thread use it? */
bool local_in_use (const struct nbdm *v);
/* Is it smaller than it was?  Asks the disk; -EIO with a message. */
int local_check_size (struct nbdm *v);
int local_pread (struct nbdm *v, void *buf, uint64_t count, uint64_t offset);
/* A read for a thread that can do without the bytes.  Where no remote may take
 * the disk's place it waits for twice the disk's deadline, if there is one.
 * -ETIMEDOUT.
 */
int local_pread_or_pass (struct nbdm *v, void *buf, uint64_t count,
                         uint64_t offset);
/* Read what may be answered: the disk was believed before and afterwards (see
 * local_state.h), and no other took its place in between.
 */
bool local_pread_believed (struct nbdm *v, void *buf, uint64_t count,
                           uint64_t offset);
int local_pwrite (struct nbdm *v, const void *buf, uint64_t count,
                  uint64_t offset);
int local_zero (struct nbdm *v, uint64_t count, uint64_t offset, bool may_trim);
bool local_fast_zero (const struct nbdm *v, bool may_trim);
/* Do small reads, or writes, keep their thread awake, or asleep so shortly that
 * a thread of its own for each would cost more?
 */
bool local_is_quick (const struct nbdm *v, bool writing);
int local_flush (struct nbdm *v);
/* A read of which no error counts. */
int local_sample (struct nbdm *v, void *buf, uint64_t count, uint64_t offset);
/* The range will be read. */
void local_advise (struct nbdm *v, uint64_t count, uint64_t offset);
/* The end of the hole that begins at offset, at most `end`; offset if there
 * is data.  A disk that cannot tell has no holes, nor has one that may have
 * lost writes, or misses something.
 */
uint64_t local_hole_end (struct nbdm *v, uint64_t offset, uint64_t end);
uint64_t local_data_end (struct nbdm *v, uint64_t offset, uint64_t end);

/* Do something else that may wait for a disk: `call (v, opaque)`.  Where local
 * has a deadline, LOCAL_GIVEN_UP after twice that: the call goes on, as a use
 * of the local disk, and `drop (opaque)`, if it is not NULL, follows it.  So
 * neither may look at what is the caller's, nor at the volume's logs, which may
 * be closed.
 */
int local_call (struct nbdm *v, int (*call) (struct nbdm *v, void *opaque),
                void (*drop) (void *opaque), void *opaque);

#endif /* NBDM_LOCAL_H */
