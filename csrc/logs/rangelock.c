/* SPDX-License-Identifier: BSD-3-Clause */

/* The range lock: which thread may touch which bytes, first come, first served.
 *
 * One list holds all ranges, held and waiting, in the order they came.  A range
 * counts the ranges ahead of it that exclude it, and is held when that count is
 * 0.  A range excludes every other one that it overlaps, but a reader's
 * excludes no other reader's.  A range that leaves decrements the counts of the
 * later ranges that it excludes.  That is enough: two ranges that exclude each
 * other are never held together, as the later one counts the earlier one while
 * that is in the list; and no range is overtaken, as waiting ranges count like
 * held ones.  The only exception is rangelock_try_part, which goes to the front
 * of the list.
 *
 * It cannot deadlock: a range waits only for ranges ahead of it.
 *
 * No tree: mostly no ranges overlap, and the counters show that without a walk
 * of the list.  A range counts each block of 4 KiB it touches, in the counter
 * of the block's hash (the counting filter of Fan et al., "Summary Cache",
 * 2000).  A range whose counters are all 0 overlaps no other.  If a counter is
 * not 0 the list is walked; it has one entry a request under way.  A wide range
 * would touch all counters, so it is in none; while there is one, the list is
 * walked too.
 */

#include <assert.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "logs/rangelock.h"

static bool
overlap (const struct range *a, const struct range *b)
{
  return a->offset < b->offset + b->length && b->offset < a->offset + a->length;
}

static bool
exclude (const struct range *a, const struct range *b)
{
  return !(a->shared && b->shared) && overlap (a, b);
}

#define BLOCK 4096u
#define MAX_BLOCKS 65u /* 256 KiB, wherever they begin; wide is more */

static uint64_t
first_block (const struct range *range)
{
  return range->offset / BLOCK;
}

static uint64_t
last_block (const struct range *range)
{
  return (range->offset + range->length - 1) / BLOCK;
}

static bool
is_wide (const struct range *range)
{
  return last_block (range) - first_block (range) >= MAX_BLOCKS;
}

/* Not the low bits alone: clients that begin at extent borders would collide.
 */
static uint32_t *
counter (struct rangelock *rl, uint64_t block)
{
  return &rl->counts[(block ^ block >> 10 ^ block >> 20) % RANGE_COUNTERS];
}

/* Add 1 or -1 (modulo 2^32) to the counters of the range. */
static void
count (struct rangelock *rl, const struct range *range, uint32_t one)
{
  if (is_wide (range)) {
    rl->nr_wide += one;
    return;
  }
  for (uint64_t b = first_block (range); b <= last_block (range); b++)
    *counter (rl, b) += one;
}

/* True: no counted range overlaps it, for certain. */
static bool
is_alone (struct rangelock *rl, const struct range *range)
{
  if (rl->nr_wide > 0 || is_wide (range))
    return false;
  for (uint64_t b = first_block (range); b <= last_block (range); b++)
    if (*counter (rl, b) > 0)
      return false;
  return true;
}

static uint32_t
count_blockers (struct rangelock *rl, const struct range *range)
{
  const struct range *r;
  uint32_t n = 0;

  assert (range->length > 0);
  assert (range->offset <= UINT64_MAX - range->length);

  if (is_alone (rl, range))
    return 0;
  for (r = rl->first; r; r = r->next)
    if (exclude (r, range))
      n++;
  return n;
}

static void
append (struct rangelock *rl, struct range *range, uint32_t blockers)
{
  count (rl, range, 1);
  range->blockers = blockers;
  range->next = NULL;
  range->prev = rl->last;
  if (rl->last)
    rl->last->next = range;
  else
    rl->first = range;
  rl->last = range;
}

bool
rangelock_add (struct rangelock *rl, struct range *range)
{
  append (rl, range, count_blockers (rl, range));
  return range->blockers == 0;
}

bool
rangelock_try (struct rangelock *rl, struct range *range)
{
  if (count_blockers (rl, range) > 0)
    return false;
  append (rl, range, 0);
  return true;
}

/* The first held range in the list that covers the byte at `at`, or NULL.
 * `*next` becomes where the next one begins, at most its old value.
 */
static const struct range *
cover (const struct rangelock *rl, uint64_t at, uint64_t *next)
{
  for (const struct range *r = rl->first; r; r = r->next) {
    if (r->blockers > 0)
      continue;
    if (r->offset <= at && at < r->offset + r->length)
      return r;
    if (r->offset > at && r->offset < *next)
      *next = r->offset;
  }
  return NULL;
}

/* Insert it before all others.  It is not shared, and no held range overlaps
 * it.
 */
static void
prepend (struct rangelock *rl, struct range *range)
{
  for (struct range *r = rl->first; r; r = r->next)
    if (overlap (r, range)) {
      assert (r->blockers > 0);
      r->blockers++;
    }
  count (rl, range, 1);
  range->blockers = 0;
  range->prev = NULL;
  range->next = rl->first;
  if (rl->first)
    rl->first->prev = range;
  else
    rl->last = range;
  rl->first = range;
}

bool
rangelock_try_part (struct rangelock *rl, struct range *range)
{
  uint64_t at = range->offset, end = range->offset + range->length;
  uint64_t best_offset = at, best = 0;

  while (at < end) {
    uint64_t next = end;
    const struct range *taken = cover (rl, at, &next);

    if (taken)
      next = taken->offset + taken->length;
    else if (next - at > best) {
      best_offset = at;
      best = next - at;
    }
    at = next;
  }
  if (best == 0)
    return false;
  range->offset = best_offset;
  range->length = best;
  prepend (rl, range);
  return true;
}

/* Release the later ranges that it blocked. */
static void
unblock (const struct range *range)
{
  for (struct range *r = range->next; r; r = r->next) {
    if (!exclude (r, range))
      continue;
    assert (r->blockers > 0);
    /* Broadcast, so that several ranges may share a condition: a signal could
     * wake a thread whose range is not held yet.
     */
    if (--r->blockers == 0 && r->granted)
      pthread_cond_broadcast (r->granted);
  }
}

/* A waiter that gives up leaves in the same way as a holder: later ranges count
 * it, earlier ones do not.
 */
void
rangelock_remove (struct rangelock *rl, struct range *range)
{
  if (range->prev)
    range->prev->next = range->next;
  else
    rl->first = range->next;
  if (range->next)
    range->next->prev = range->prev;
  else
    rl->last = range->prev;

  count (rl, range, (uint32_t)-1);
  if (!is_alone (rl, range))
    unblock (range);
  range->next = range->prev = NULL;
}
