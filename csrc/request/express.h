/* SPDX-License-Identifier: BSD-3-Clause */

/* A small write on the thread that reads the client's socket; see express.c. */

#ifndef NBDM_EXPRESS_H
#define NBDM_EXPRESS_H

#include <stdbool.h>
#include <stdint.h>

#include "volume/volume.h"

struct waiter;
struct watch;

struct express {
  struct request request;
  unsigned legs_left; /* whose waiters the thread has not taken yet */
  int local_rc;
};

/* Admit a write and issue its commands, for watch_push to send; does not block.
 * Its legs' waiters are posted to the watch, for express_answered.  False: the
 * write would have to wait, or is invalid; nothing is held, and the caller uses
 * nbdm_pwrite, which also reports the error.  `buf` must stay until the end.
 */
bool express_begin (struct nbdm *v, struct express *x, const void *buf,
                    uint32_t count, uint64_t offset, uint32_t flags,
                    struct watch *watch);
/* Take a waiter from watch_take.  Returns its write if this was its last leg,
 * else NULL.  The waiter may be freed when the write ends.
 */
struct express *express_answered (struct watch *watch, struct waiter *waiter);
/* Do the local leg; blocks as long as a quick disk does. */
void express_local (struct nbdm *v, struct express *x);
/* Call it when local and all legs are done.  True: the answer is in `*rc`.
 * False: something failed, and the caller must call express_complete.
 */
bool express_end (struct nbdm *v, struct express *x, int *rc);
/* Get the answer of a write that failed somewhere; blocks for a hold or a
 * change of state.
 */
int express_complete (struct nbdm *v, struct express *x);

/* May the caller try express_read for that size? */
bool express_readable (const struct nbdm *v, uint32_t count);
/* False: the read failed, or needs more than local; the caller uses nbdm_pread.
 * Blocks as long as a quick disk does.
 */
bool express_read (struct nbdm *v, void *buf, uint32_t count, uint64_t offset);

#endif /* NBDM_EXPRESS_H */
