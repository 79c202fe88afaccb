/* SPDX-License-Identifier: BSD-3-Clause */

/* What the model test in Python (tests/unit/test_rangelock.py) does not have:
 * ranges taken in part, readers, threads that wait, and a caller's error.
 */

#include "logs/rangelock.h"
#include "test.h"

static struct range
range_of (uint64_t offset, uint64_t length)
{
  return (struct range){ .offset = offset, .length = length };
}

static void
test_rangelock_try_part_takes_the_longest (void)
{
  struct rangelock rl = { 0 };
  struct range first = range_of (0, 10), second = range_of (15, 5);
  struct range waiter = range_of (16, 20), all = range_of (5, 95);
  struct range none = range_of (0, 100), rest = range_of (8, 8);

  assert (rangelock_add (&rl, &first) && rangelock_add (&rl, &second));
  assert (!rangelock_add (&rl, &waiter));
  assert (rangelock_try_part (&rl, &all));
  assert (all.offset == 20 && all.length == 80);
  assert (rangelock_try_part (&rl, &rest));
  assert (rest.offset == 10 && rest.length == 5);
  assert (!rangelock_try_part (&rl, &none));
  assert (none.offset == 0 && none.length == 100);
  /* The waiter was overtaken, and is held when all are gone. */
  assert (waiter.blockers == 2);
  rangelock_remove (&rl, &all);
  rangelock_remove (&rl, &second);
  assert (waiter.blockers == 0);
  rangelock_remove (&rl, &first);
  rangelock_remove (&rl, &waiter);
  rangelock_remove (&rl, &rest);
  assert (rl.first == NULL && rl.last == NULL);
}

static void
test_rangelock_at_the_end_of_64_bits_works (void)
{
  struct rangelock rl = { 0 };
  struct range a = range_of (UINT64_MAX - 10, 10);
  struct range b = range_of (UINT64_MAX - 1, 1), c = range_of (0, 1);

  assert (rangelock_add (&rl, &a));
  assert (!rangelock_add (&rl, &b));
  assert (rangelock_add (&rl, &c));
  rangelock_remove (&rl, &a);
  assert (b.blockers == 0);
  rangelock_remove (&rl, &b);
  rangelock_remove (&rl, &c);
}

static struct range
reader_of (uint64_t offset, uint64_t length)
{
  return (struct range){ .offset = offset, .length = length, .shared = true };
}

static void
test_rangelock_readers_hold_it_together (void)
{
  struct rangelock rl = { 0 };
  struct range a = reader_of (0, 10), b = reader_of (5, 10);
  struct range writer = range_of (0, 8), late = reader_of (0, 4);
  struct range part = range_of (0, 20);

  assert (rangelock_add (&rl, &a) && rangelock_add (&rl, &b));
  assert (!rangelock_add (&rl, &writer) && writer.blockers == 2);
  assert (!rangelock_add (&rl, &late)); /* the writer came first */
  assert (rangelock_try_part (&rl, &part));
  assert (part.offset == 15 && part.length == 5);
  rangelock_remove (&rl, &b);
  assert (writer.blockers == 1 && late.blockers == 1);
  rangelock_remove (&rl, &a);
  assert (writer.blockers == 0 && late.blockers == 1);
  rangelock_remove (&rl, &writer);
  assert (late.blockers == 0);
  rangelock_remove (&rl, &late);
  rangelock_remove (&rl, &part);
  assert (rl.first == NULL && rl.last == NULL);
}

struct shared {
  pthread_mutex_t lock;
  struct rangelock rl;
  pthread_cond_t granted;
  pthread_cond_t waiting;
  bool is_waiting, done;
};

static void *
wait_for_range (void *opaque)
{
  struct shared *s = opaque;
  struct range range = range_of (0, 1);

  range.granted = &s->granted;
  pthread_mutex_lock (&s->lock);
  assert (!rangelock_add (&s->rl, &range));
  s->is_waiting = true;
  pthread_cond_signal (&s->waiting);
  while (range.blockers > 0)
    pthread_cond_wait (&s->granted, &s->lock);
  s->done = true;
  rangelock_remove (&s->rl, &range);
  pthread_mutex_unlock (&s->lock);
  return NULL;
}

/* A lost wake-up hangs here, until the runner's time-out. */
static void
test_rangelock_remove_wakes_waiting_thread (void)
{
  struct shared s = { .lock = PTHREAD_MUTEX_INITIALIZER,
                      .granted = PTHREAD_COND_INITIALIZER,
                      .waiting = PTHREAD_COND_INITIALIZER };
  struct range range = range_of (0, 4096);
  pthread_t thread;

  assert (rangelock_add (&s.rl, &range));
  pthread_mutex_lock (&s.lock);
  assert (pthread_create (&thread, NULL, wait_for_range, &s) == 0);
  while (!s.is_waiting)
    pthread_cond_wait (&s.waiting, &s.lock);
  assert (!s.done);
  rangelock_remove (&s.rl, &range);
  pthread_mutex_unlock (&s.lock);
  assert (pthread_join (thread, NULL) == 0);
  assert (s.done && s.rl.first == NULL);
}

static void
add_range (void *opaque)
{
  struct rangelock rl = { 0 };

  rangelock_add (&rl, opaque);
}

static void
test_rangelock_impossible_range_aborts (void)
{
  struct range empty = range_of (0, 0), past = range_of (UINT64_MAX, 2);
  int status = in_child (NULL, add_range, &empty);

  assert (WIFSIGNALED (status) && WTERMSIG (status) == SIGABRT);
  status = in_child (NULL, add_range, &past);
  assert (WIFSIGNALED (status) && WTERMSIG (status) == SIGABRT);
}

int
main (void)
{
  RUN (test_rangelock_try_part_takes_the_longest);
  RUN (test_rangelock_at_the_end_of_64_bits_works);
  RUN (test_rangelock_readers_hold_it_together);
  RUN (test_rangelock_remove_wakes_waiting_thread);
  RUN (test_rangelock_impossible_range_aborts);
  return 0;
}
