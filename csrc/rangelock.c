/* SPDX-License-Identifier: BSD-3-Clause */

/* The range lock: who may touch which bytes, first come, first served.
 *
 * One list holds everybody, holders and waiters, in the order they came.  A
 * range counts the overlapping ones ahead of it; it is held when that count is
 * 0.  Whoever leaves takes itself out of the counts of those behind.  Nothing
 * else is needed: two overlapping ranges are never held together, as the later
 * one counts the earlier one for as long as it is in the list; and nobody is
 * overtaken, as waiters are counted like holders.
 *
 * It cannot deadlock: a range waits only for ranges ahead of it.
 *
 * No tree: the list is as long as the requests under way, and walking tens of
 * them costs less than keeping a tree in balance.
 */

#include <assert.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "internal.h"

static bool
overlap (const struct range *a, const struct range *b)
{
  return a->offset < b->offset + b->length && b->offset < a->offset + a->length;
}

static uint32_t
count_blockers (const struct rangelock *rl, const struct range *range)
{
  const struct range *r;
  uint32_t n = 0;

  for (r = rl->first; r; r = r->next)
    if (overlap (r, range))
      n++;
  return n;
}

bool
rangelock_add (struct rangelock *rl, struct range *range)
{
  assert (range->length > 0);
  assert (range->offset <= UINT64_MAX - range->length);

  range->blockers = count_blockers (rl, range);
  range->next = NULL;
  range->prev = rl->last;
  if (rl->last)
    rl->last->next = range;
  else
    rl->first = range;
  rl->last = range;
  return range->blockers == 0;
}

bool
rangelock_try (struct rangelock *rl, struct range *range)
{
  assert (range->length > 0);
  assert (range->offset <= UINT64_MAX - range->length);

  if (count_blockers (rl, range) > 0)
    return false;
  return rangelock_add (rl, range);
}

/* A waiter that gives up leaves the same way as a holder: those behind counted
 * it, those ahead did not.
 */
void
rangelock_remove (struct rangelock *rl, struct range *range)
{
  struct range *r;

  if (range->prev)
    range->prev->next = range->next;
  else
    rl->first = range->next;
  if (range->next)
    range->next->prev = range->prev;
  else
    rl->last = range->prev;

  for (r = range->next; r; r = r->next) {
    if (!overlap (r, range))
      continue;
    assert (r->blockers > 0);
    /* Broadcast, so that several ranges may share a condition: a signal could
     * wake the one that still waits.
     */
    if (--r->blockers == 0 && r->granted)
      pthread_cond_broadcast (r->granted);
  }
  range->next = range->prev = NULL;
}
