/* SPDX-License-Identifier: BSD-3-Clause */

/* The mailbox of a thread that may wait only in poll.
 *
 * A list to which other threads push without a lock, and an eventfd that makes
 * poll return.  A posting thread writes the eventfd at most once between two
 * looks of the owner, and only after it has released its locks: a thread woken
 * under a lock would only wait for that lock.
 *
 * No waiter is missed: the posting thread adds the waiter, then tests `rung`;
 * the owner clears `rung`, then empties the list.  So either the owner finds
 * the waiter, or the posting thread finds `rung` clear and rings.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "wire/conn.h"
#include "wire/mailbox.h"

#define MAX_TO_RING 16

static _Thread_local struct mailbox *own;
static _Thread_local struct mailbox *to_ring[MAX_TO_RING];
static _Thread_local unsigned nr_to_ring;

struct mailbox *
mailbox_new (void)
{
  struct mailbox *box = calloc (1, sizeof *box);

  if (box == NULL)
    return NULL;
  box->fd = eventfd (0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (box->fd < 0) {
    free (box);
    return NULL;
  }
  atomic_init (&box->users, 1);
  return box;
}

void
mailbox_put (struct mailbox *box)
{
  if (atomic_fetch_sub (&box->users, 1) > 1)
    return;
  close (box->fd);
  free (box);
}

void
mailbox_own (struct mailbox *box)
{
  own = box;
}

void
mailbox_ring (struct mailbox *box)
{
  if (box == own || atomic_exchange (&box->rung, true))
    return;
  if (nr_to_ring == MAX_TO_RING)
    mailbox_ring_all (); /* a ring under a lock is better than none */
  atomic_fetch_add (&box->users, 1);
  to_ring[nr_to_ring++] = box;
}

void
mailbox_ring_all (void)
{
  for (unsigned i = 0; i < nr_to_ring; i++) {
    (void)eventfd_write (to_ring[i]->fd, 1); /* full: it is readable */
    mailbox_put (to_ring[i]);
  }
  nr_to_ring = 0;
}

void
mailbox_post (struct waiter *waiter)
{
  struct mailbox *box = waiter->box;
  struct waiter *before = atomic_load (&box->posted);

  atomic_fetch_add (&box->users, 1); /* its owner may leave once it is posted */
  do
    waiter->next = before;
  while (!atomic_compare_exchange_weak (&box->posted, &before, waiter));
  mailbox_ring (box);
  mailbox_put (box);
}

struct waiter *
mailbox_take (struct mailbox *box, bool woken)
{
  struct waiter *from, *next, *list = NULL;
  eventfd_t count;

  if (woken) {
    (void)eventfd_read (box->fd, &count);
    atomic_store (&box->rung, false);
  }
  for (from = atomic_exchange (&box->posted, NULL); from; from = next) {
    next = from->next;
    from->next = list;
    list = from;
  }
  return list;
}
