/* SPDX-License-Identifier: BSD-3-Clause */

/* Where a thread that waits for several things at once learns that waiters of
 * its are answered; see mailbox.c.
 */

#ifndef NBDM_MAILBOX_H
#define NBDM_MAILBOX_H

#include <stdatomic.h>
#include <stdbool.h>

struct waiter;

struct mailbox {
  atomic_uint users;
  int fd;           /* an eventfd, readable when rung: for its owner's poll */
  atomic_bool rung; /* since the owner last looked; or about to be */
  _Atomic (struct waiter *) posted; /* and not taken: the latest first */
};

/* NULL: no memory or no descriptor.  The caller owns one reference. */
struct mailbox *mailbox_new (void);
void mailbox_put (struct mailbox *box);

/* From now on this thread reads the box: it is not rung by itself.  NULL: none
 * any more.
 */
void mailbox_own (struct mailbox *box);
/* Put a waiter into its box: it is answered.  Under any lock.  The waiter may
 * be gone when this returns.
 */
void mailbox_post (struct waiter *waiter);
/* Have the owner look, whatever for; under any lock. */
void mailbox_ring (struct mailbox *box);
/* What this thread has rung does ring now; with no lock held. */
void mailbox_ring_all (void);
/* The owner's: those posted since the last time, in that order, linked by
 * `next`; or NULL.  With `woken` the eventfd is read first.
 */
struct waiter *mailbox_take (struct mailbox *box, bool woken);

#endif /* NBDM_MAILBOX_H */
