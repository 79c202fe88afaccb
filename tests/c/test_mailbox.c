/* SPDX-License-Identifier: BSD-3-Clause */

/* No mail is missed: each waiter that is posted is taken exactly once, and the
 * owner, which sleeps only in poll, is always woken.
 */

#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>

#include "wire/conn.h"
#include "wire/mailbox.h"
#include "test.h"

#define TELLERS 4
#define ROUNDS 20000
#define DEADLINE_MS 30000

static struct mailbox *box;

/* A poster has one waiter, and posts it again once the owner has taken it. */
static struct teller {
  struct waiter waiter;
  atomic_uint taken;
} tellers[TELLERS];

static void *
tell (void *opaque)
{
  struct teller *teller = opaque;

  for (unsigned i = 0; i < ROUNDS; i++) {
    mailbox_post (&teller->waiter);
    mailbox_ring_all ();
    while (atomic_load (&teller->taken) == i)
      ; /* the owner is at work, or was woken */
  }
  return NULL;
}

static unsigned
take (bool woken)
{
  struct waiter *waiter = mailbox_take (box, woken);
  unsigned nr = 0;

  while (waiter) {
    struct waiter *next = waiter->next;
    struct teller *teller = waiter->owner;

    atomic_fetch_add (&teller->taken, 1);
    waiter = next;
    nr++;
  }
  return nr;
}

static void
test_nothing_is_missed (void)
{
  pthread_t threads[TELLERS];
  unsigned left = TELLERS * ROUNDS;

  box = mailbox_new ();
  assert (box);
  mailbox_own (box);
  for (int i = 0; i < TELLERS; i++) {
    tellers[i].waiter = (struct waiter){ .box = box, .owner = &tellers[i] };
    assert (pthread_create (&threads[i], NULL, tell, &tellers[i]) == 0);
  }
  while (left > 0) {
    struct pollfd fd = { .fd = box->fd, .events = POLLIN };

    assert (poll (&fd, 1, DEADLINE_MS) == 1);
    left -= take (true);
  }
  for (int i = 0; i < TELLERS; i++) {
    pthread_join (threads[i], NULL);
    assert (tellers[i].taken == ROUNDS);
  }
  mailbox_own (NULL);
  mailbox_put (box);
}

static void
test_own_mail_does_not_ring (void)
{
  struct waiter first = { .pending = 0 }, second = { .pending = 0 };
  struct pollfd fd;

  box = mailbox_new ();
  first.box = second.box = box;
  mailbox_own (box);
  mailbox_post (&first);
  mailbox_post (&second);
  mailbox_ring_all ();
  fd = (struct pollfd){ .fd = box->fd, .events = POLLIN };
  assert (poll (&fd, 1, 0) == 0);
  /* They arrive in the order in which they were posted. */
  assert (mailbox_take (box, false) == &first && first.next == &second
          && second.next == NULL);
  assert (mailbox_take (box, false) == NULL);
  mailbox_own (NULL);
  mailbox_put (box);
}

static void
test_ring_outlives_the_owner (void)
{
  struct mailbox *gone = mailbox_new ();

  mailbox_ring (gone); /* holds it until it has rung */
  mailbox_put (gone);
  mailbox_ring_all ();
}

int
main (void)
{
  RUN (test_nothing_is_missed);
  RUN (test_own_mail_does_not_ring);
  RUN (test_ring_outlives_the_owner);
  return 0;
}
