/* SPDX-License-Identifier: BSD-3-Clause */

/* Mail for a thread that waits in poll, and must not wait anywhere else.
 *
 * A list that others push to without a lock, and an eventfd that makes poll
 * return.  The eventfd is written once between two looks at the list, and only
 * when the thread that posts has released its locks: a wake-up under a lock
 * wakes a thread to wait for it.
 *
 * Nothing is missed: the thread that posts puts the waiter in and then looks
 * whether it has rung; the owner takes the mark away and then empties the list.
 * So either the owner finds the waiter, or the other thread finds no mark and
 * rings.
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
    mailbox_ring_all (); /* better under a lock than never */
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

  atomic_fetch_add (&box->users, 1); /* its owner may go once it is posted */
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
