/* SPDX-License-Identifier: BSD-3-Clause */

/* The local disk.  See local.c. */

#ifndef NBDM_LOCAL_H
#define NBDM_LOCAL_H

#include <stdbool.h>
#include <stdint.h>

struct nbdm;

/* The functions below return this if the local disk was given up while they
 * waited for it.  It is no error of the disk.
 */
#define LOCAL_GIVEN_UP (-ECANCELED)

/* Between the two calls a failed disk is not replaced: a call that began on it
 * ends on it, and its result never counts for the new disk.  Calls may be
 * nested.  The functions below make both calls themselves.
 */
void local_use (struct nbdm *v);
void local_leave (void);
/* The age of the oldest system call on the disk that has not returned.  The
 * ticker and the guard call it.
 */
uint64_t local_watch (struct nbdm *v);
/* Does any thread use the disk? */
bool local_in_use (const struct nbdm *v);
/* Is the disk smaller than at its open?  Asks the disk; -EIO with a message. */
int local_check_size (struct nbdm *v);
int local_pread (struct nbdm *v, void *buf, uint64_t count, uint64_t offset);
/* Read bytes that the caller can do without.  If no remote may replace the
 * disk, the read waits for at most twice the disk's deadline, if it has one.
 * -ETIMEDOUT.
 */
int local_pread_or_pass (struct nbdm *v, void *buf, uint64_t count,
                         uint64_t offset);
/* Read bytes for an answer.  True: the disk was believed before and after the
 * read (see local_state.h), and was not replaced in between.
 */
bool local_pread_believed (struct nbdm *v, void *buf, uint64_t count,
                           uint64_t offset);
int local_pwrite (struct nbdm *v, const void *buf, uint64_t count,
                  uint64_t offset);
int local_zero (struct nbdm *v, uint64_t count, uint64_t offset, bool may_trim);
bool local_fast_zero (const struct nbdm *v, bool may_trim);
/* Do small reads, or writes, block their thread so briefly that a worker thread
 * for each would cost more?
 */
bool local_is_quick (const struct nbdm *v, bool writing);
int local_flush (struct nbdm *v);
/* A read whose errors do not count. */
int local_sample (struct nbdm *v, void *buf, uint64_t count, uint64_t offset);
/* Advise the kernel that the range will be read soon. */
void local_advise (struct nbdm *v, uint64_t count, uint64_t offset);
/* Return the end of the hole at offset, at most `end`; return offset if there
 * is data.  A disk that cannot report holes has none.  Nor has a disk that may
 * have lost writes or that misses regions.
 */
uint64_t local_hole_end (struct nbdm *v, uint64_t offset, uint64_t end);
uint64_t local_data_end (struct nbdm *v, uint64_t offset, uint64_t end);

/* Run `call (v, opaque)`, which may wait for a disk.  If local has a deadline,
 * return LOCAL_GIVEN_UP after twice that time.  The call then continues, as a
 * use of the local disk, and `drop (opaque)`, if not NULL, follows it.  So
 * neither may use the caller's memory, or the volume's logs, which may be
 * closed.
 */
int local_call (struct nbdm *v, int (*call) (struct nbdm *v, void *opaque),
                void (*drop) (void *opaque), void *opaque);

#endif /* NBDM_LOCAL_H */
