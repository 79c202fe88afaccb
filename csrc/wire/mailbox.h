/* SPDX-License-Identifier: BSD-3-Clause */

/* Tells a thread that waits in poll which of its waiters are answered; see
 * mailbox.c.
 */

#ifndef NBDM_MAILBOX_H
#define NBDM_MAILBOX_H

#include <stdatomic.h>
#include <stdbool.h>

struct waiter;

struct mailbox {
  atomic_uint users;
  int fd;           /* an eventfd, readable when rung: for its owner's poll */
  atomic_bool rung; /* a thread has rung since the owner looked, or will soon */
  _Atomic (struct waiter *) posted; /* not taken yet, the latest first */
};

/* NULL: no memory or no descriptor.  The caller owns one reference. */
struct mailbox *mailbox_new (void);
void mailbox_put (struct mailbox *box);

/* This thread owns the box from now on, so its own posts do not ring it.  NULL:
 * it owns none.
 */
void mailbox_own (struct mailbox *box);
/* Put an answered waiter into its box.  The caller may hold any lock.  The
 * waiter may be freed when this returns.
 */
void mailbox_post (struct waiter *waiter);
/* Make the owner return from poll.  The caller may hold any lock. */
void mailbox_ring (struct mailbox *box);
/* Wake the owners of the boxes that this thread has rung.  The caller holds no
 * lock.
 */
void mailbox_ring_all (void);
/* The waiters posted since the last call, in that order, linked by `next`;
 * or NULL.  With `woken` it reads the eventfd first.  Only the owner calls
 * it.
 */
struct waiter *mailbox_take (struct mailbox *box, bool woken);

#endif /* NBDM_MAILBOX_H */
