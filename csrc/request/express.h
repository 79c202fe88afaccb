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
  unsigned legs_left; /* whose waiters have not been taken */
  int local_rc;
};

/* Admit a write and issue its commands, for watch_push to send; does not block.
 * Its legs' waiters are posted to the watch, for express_answered.  False: it
 * would have to wait for something, or is wrong; nothing is held, nbdm_pwrite
 * does it or says why not.  `buf` must stay until the end.
 */
bool express_begin (struct nbdm *v, struct express *x, const void *buf,
                    uint32_t count, uint64_t offset, uint32_t flags,
                    struct watch *watch);
/* A waiter of watch_take's.  Returns its write if that was the last leg it
 * waits for, else NULL; the waiter may be gone once that write is ended.
 */
struct express *express_answered (struct watch *watch, struct waiter *waiter);
/* The local disk's part; blocks as long as a quick disk does. */
void express_local (struct nbdm *v, struct express *x);
/* Local is done and all legs are answered: true, and the answer is in `*rc`.
 * False: something failed, and express_complete must follow.
 */
bool express_end (struct nbdm *v, struct express *x, int *rc);
/* The answer after all; blocks, for a hold or a change of state. */
int express_complete (struct nbdm *v, struct express *x);

/* Can a read of that size be done at once, by express_read? */
bool express_readable (const struct nbdm *v, uint32_t count);
/* False: it failed, or may not be read from local alone; nbdm_pread knows.
 * Blocks as long as a quick disk does.
 */
bool express_read (struct nbdm *v, void *buf, uint32_t count, uint64_t offset);

#endif /* NBDM_EXPRESS_H */
