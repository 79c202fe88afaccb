/* SPDX-License-Identifier: BSD-3-Clause */

/* The activity log's set: which extents may differ after lost power.
 *
 * A write may start only when its extents are durable in the set (rule 1), so
 * the set is kept in sectors of a small file and written with fdatasync when an
 * extent is added.  Extents in use stay in the set, so that a busy volume
 * seldom waits for the log; they leave the set only after a flush.
 *
 *   PENDING  put in, its sector not durable yet: no write may start
 *   ACTIVE   durable
 *   COLD     out of the set, in its old place until another extent takes that
 *
 * Going cold writes nothing: the extent stays in its sector on disk, so after
 * lost power resync copies more than needed.  If it comes back it is durable
 * already, and no write is needed.  When another extent takes its place, the
 * rewrite of that sector removes the old one and adds the new one; by then a
 * flush on every leg has covered the old one.
 *
 * A write of the log takes no lock: it writes a copy.  An extent that is added
 * during a write waits for the next one, even if its place is in a sector being
 * written.  `writing`, set with the copy, tells the two apart.
 *
 * This file does no I/O; activity_file.c does.
 */

#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/error.h"
#include "logs/activity.h"
#include "logs/activity_set.h"
#include "logs/layout.h"

/* --- Lists and hash -------------------------------------------------- */

static uint32_t
number_of (const struct activity *act, const struct activity_entry *e)
{
  return (uint32_t)(e - act->entries);
}

/* The entry of a link in a list or the hash: 1 + number; 0: end. */
static struct activity_entry *
linked (const struct activity *act, uint32_t link)
{
  return link ? &act->entries[link - 1] : NULL;
}

static void
list_append (struct activity *act, struct activity_lru *list,
             struct activity_entry *e)
{
  const uint32_t link = number_of (act, e) + 1;

  e->newer = 0;
  e->older = list->newest;
  if (list->newest)
    linked (act, list->newest)->newer = link;
  else
    list->oldest = link;
  list->newest = link;
}

static void
list_remove (struct activity *act, struct activity_lru *list,
             struct activity_entry *e)
{
  if (e->newer)
    linked (act, e->newer)->older = e->older;
  else
    list->newest = e->older;
  if (e->older)
    linked (act, e->older)->newer = e->newer;
  else
    list->oldest = e->newer;
}

static void
make_newest (struct activity *act, struct activity_entry *e)
{
  if (e->newer == 0)
    return;
  list_remove (act, &act->used, e);
  list_append (act, &act->used, e);
}

static uint32_t *
bucket (const struct activity *act, uint64_t extent)
{
  /* Fibonacci hashing: neighbours, which are often active together, spread. */
  const uint64_t h = extent * UINT64_C (0x9e3779b97f4a7c15);

  return &act->hash[(uint32_t)(h >> 32) & act->hash_mask];
}

static struct activity_entry *
find (const struct activity *act, uint64_t extent)
{
  struct activity_entry *e = linked (act, *bucket (act, extent));

  while (e && e->extent != extent)
    e = linked (act, e->hash_next);
  return e;
}

static void
hash_add (struct activity *act, struct activity_entry *e)
{
  uint32_t *link = bucket (act, e->extent);

  e->hash_next = *link;
  *link = number_of (act, e) + 1;
}

static void
hash_remove (struct activity *act, struct activity_entry *e)
{
  uint32_t *link = bucket (act, e->extent);

  while (linked (act, *link) != e)
    link = &linked (act, *link)->hash_next;
  *link = e->hash_next;
}

/* --- Places, and what the file's half needs -------------------------- */

static uint32_t
sector_of (const struct activity *act, const struct activity_entry *e)
{
  return number_of (act, e) / ACTIVITY_PER_SECTOR;
}

/* The entry's place: extent + 1, or 0 for an empty one. */
static uint64_t *
place (const struct activity *act, const struct activity_entry *e)
{
  struct disk_activity_sector *sector = &act->sectors[sector_of (act, e)];

  return &sector->extent[number_of (act, e) % ACTIVITY_PER_SECTOR];
}

/* Seal a sector before its write. */
static void
next_sequence (struct disk_activity_sector *sector)
{
  sector->sequence = htole64 (le64toh (sector->sequence) + 1);
  activity_seal_sector (sector);
}

int
activity_set_init (struct activity *act)
{
  uint32_t buckets = 1;

  while (buckets < act->nr_entries)
    buckets *= 2;
  act->hash_mask = buckets - 1;
  act->nr_sectors = activity_sectors (act->nr_entries);
  act->entries = calloc (act->nr_entries, sizeof *act->entries);
  act->sectors = calloc (act->nr_sectors, sizeof *act->sectors);
  act->sector_changed = calloc (act->nr_sectors, sizeof *act->sector_changed);
  act->hash = calloc (buckets, sizeof *act->hash);
  act->staged = calloc (act->nr_sectors, sizeof *act->staged);
  act->staged_index = calloc (act->nr_sectors, sizeof *act->staged_index);
  if (!act->entries || !act->sectors || !act->sector_changed || !act->hash
      || !act->staged || !act->staged_index)
    return set_error (-ENOMEM, "no memory for the activity log");
  return 0;
}

void
activity_set_free (struct activity *act)
{
  free (act->entries);
  free (act->sectors);
  free (act->sector_changed);
  free (act->hash);
  free (act->staged);
  free (act->staged_index);
}

const char *
activity_set_load (struct activity *act, uint32_t number)
{
  struct activity_entry *e = &act->entries[number];
  const struct activity_entry *other;

  if (*place (act, e) == 0)
    return NULL;
  e->extent = le64toh (*place (act, e)) - 1;
  if (e->extent >= act->nr_extents)
    return "an extent past the volume's end";
  other = find (act, e->extent);
  if (other && sector_of (act, other) == sector_of (act, e))
    return "an extent stands twice";
  if (other) {
    /* The next write removes it, so that the extent cannot be twice in this
     * sector.
     */
    *place (act, e) = 0;
    act->sector_changed[sector_of (act, e)] = true;
    return NULL;
  }
  e->state = ACTIVITY_ACTIVE;
  hash_add (act, e);
  list_append (act, &act->used, e);
  return NULL;
}

void
activity_set_loaded (struct activity *act)
{
  for (uint32_t i = 0; i < act->nr_entries; i++)
    if (act->entries[i].state == ACTIVITY_COLD) {
      list_append (act, &act->spare, &act->entries[i]);
      act->nr_free++;
    }
}

int
activity_set_clear (struct activity *act)
{
  for (uint32_t link = act->used.oldest; link;
       link = act->entries[link - 1].newer)
    if (act->entries[link - 1].users > 0)
      return set_message (-EBUSY, "activity extent %" PRIu64 " is in use",
                          act->entries[link - 1].extent);

  memset (act->entries, 0, act->nr_entries * sizeof *act->entries);
  memset (act->hash, 0, (act->hash_mask + UINT64_C (1)) * sizeof *act->hash);
  for (uint32_t i = 0; i < act->nr_sectors; i++)
    memset (act->sectors[i].extent, 0, sizeof act->sectors[i].extent);
  act->used = act->spare = (struct activity_lru){ 0 };
  act->nr_free = 0;
  activity_set_loaded (act);
  return 0;
}

void
activity_set_seal (struct activity *act)
{
  for (uint32_t i = 0; i < act->nr_sectors; i++) {
    next_sequence (&act->sectors[i]);
    act->sector_changed[i] = false;
  }
}

/* --- Holding --------------------------------------------------------- */

/* A cold extent comes back to its own place, where it is durable. */
static void
revive (struct activity *act, struct activity_entry *e)
{
  list_remove (act, &act->spare, e);
  list_append (act, &act->used, e);
  act->nr_free--;
  e->state = ACTIVITY_ACTIVE;
}

static struct activity_entry *
take_place (struct activity *act, uint64_t extent)
{
  struct activity_entry *e = linked (act, act->spare.oldest);

  list_remove (act, &act->spare, e);
  list_append (act, &act->used, e);
  act->nr_free--;
  if (*place (act, e) != 0)
    hash_remove (act, e);
  e->extent = extent;
  e->used_ns = 0;
  e->state = ACTIVITY_PENDING;
  hash_add (act, e);
  *place (act, e) = htole64 (extent + 1);
  act->sector_changed[sector_of (act, e)] = true;
  return e;
}

/* Put all of [first, last] into the set. */
static int
put_in (struct activity *act, uint64_t first, uint64_t last)
{
  struct activity_entry *e;
  uint32_t missing = 0;
  for (uint64_t x = first; x <= last; x++) {
    e = find (act, x);
    if (e == NULL || e->state == ACTIVITY_COLD)
      missing++;
  }
  if (missing == 0)
    return 0;
  if (missing > act->nr_free)
    return -EAGAIN;

  /* First the cold ones, before a new extent takes the place of one of them. */
  for (uint64_t x = first; x <= last; x++) {
    e = find (act, x);
    if (e && e->state == ACTIVITY_COLD)
      revive (act, e);
  }
  for (uint64_t x = first; x <= last; x++)
    if (find (act, x) == NULL)
      take_place (act, x);
  return 0;
}

int
activity_hold (struct activity *act, uint64_t first, uint64_t last)
{
  bool durable = true;
  int r;

  assert (first <= last && last < act->nr_extents);
  if (last - first >= act->nr_entries)
    return set_message (-EINVAL,
                        "the request spans %" PRIu64 " activity extents, the "
                        "log holds %" PRIu32,
                        last - first + 1, act->nr_entries);
  r = put_in (act, first, last);
  if (r < 0)
    return r;
  for (uint64_t x = first; x <= last; x++) {
    struct activity_entry *e = find (act, x);

    e->users++;
    e->cooling = false;
    make_newest (act, e);
    if (e->state != ACTIVITY_ACTIVE)
      durable = false;
  }
  return durable ? 0 : -EINPROGRESS;
}

bool
activity_durable (const struct activity *act, uint64_t first, uint64_t last)
{
  for (uint64_t x = first; x <= last; x++) {
    const struct activity_entry *e = find (act, x);

    if (e == NULL || e->state != ACTIVITY_ACTIVE)
      return false;
  }
  return true;
}

void
activity_release (struct activity *act, uint64_t first, uint64_t last,
                  uint64_t now_ns)
{
  for (uint64_t x = first; x <= last; x++) {
    struct activity_entry *e = find (act, x);

    assert (e && e->users > 0);
    e->users--;
    e->used_ns = now_ns;
    make_newest (act, e);
  }
}

/* --- Writing --------------------------------------------------------- */

/* The entries of a sector, from *first up to and without *end. */
static void
sector_entries (const struct activity *act, uint32_t index,
                struct activity_entry **first, struct activity_entry **end)
{
  const uint32_t number = index * ACTIVITY_PER_SECTOR;
  const uint32_t left = act->nr_entries - number;

  *first = &act->entries[number];
  *end = *first + (left < ACTIVITY_PER_SECTOR ? left : ACTIVITY_PER_SECTOR);
}

static void
stage_sector (struct activity *act, uint32_t index,
              struct activity_batch *batch)
{
  struct activity_entry *e, *end;

  next_sequence (&act->sectors[index]);
  act->sector_changed[index] = false;
  batch->sectors[batch->count] = act->sectors[index];
  batch->index[batch->count] = index;
  batch->count++;
  for (sector_entries (act, index, &e, &end); e < end; e++)
    e->writing = e->state == ACTIVITY_PENDING;
}

int
activity_stage (struct activity *act, struct activity_batch *batch)
{
  struct activity_batch b
      = { .sectors = act->staged, .index = act->staged_index };

  for (uint32_t i = 0; i < act->nr_sectors; i++)
    if (act->sector_changed[i])
      stage_sector (act, i, &b);
  if (b.count == 0)
    return 0;
  *batch = b;
  return 1;
}

void
activity_written (struct activity *act, struct activity_batch *batch)
{
  for (uint32_t i = 0; i < batch->count; i++) {
    struct activity_entry *e, *end;

    for (sector_entries (act, batch->index[i], &e, &end); e < end; e++)
      if (e->writing) {
        e->writing = false;
        e->state = ACTIVITY_ACTIVE;
      }
  }
  act->persists++;
  activity_discard (batch);
}

void
activity_discard (struct activity_batch *batch)
{
  memset (batch, 0, sizeof *batch);
}

/* --- Going cold ------------------------------------------------------ */

/* PENDING extents stay: a write under way will make them ACTIVE. */
uint32_t
activity_pick (struct activity *act, uint32_t max, uint64_t before_ns)
{
  struct activity_entry *e;
  uint32_t n = 0;

  for (e = linked (act, act->used.oldest); e; e = linked (act, e->newer)) {
    e->cooling = n < max && e->users == 0 && e->state == ACTIVITY_ACTIVE
                 && e->used_ns < before_ns;
    n += e->cooling;
  }
  return n;
}

uint32_t
activity_drop (struct activity *act)
{
  struct activity_entry *e, *newer;
  uint32_t n = 0;

  for (e = linked (act, act->used.oldest); e; e = newer) {
    newer = linked (act, e->newer);
    if (!e->cooling)
      continue;
    e->cooling = false;
    e->state = ACTIVITY_COLD;
    list_remove (act, &act->used, e);
    list_append (act, &act->spare, e);
    act->nr_free++;
    n++;
  }
  return n;
}

void
activity_forget (struct activity *act)
{
  for (uint32_t link = act->spare.oldest; link;
       link = act->entries[link - 1].newer) {
    struct activity_entry *e = &act->entries[link - 1];

    if (*place (act, e) == 0)
      continue;
    hash_remove (act, e);
    *place (act, e) = 0;
    act->sector_changed[sector_of (act, e)] = true;
  }
}

/* --- Looking at it --------------------------------------------------- */

void
activity_visit (const struct activity *act,
                void (*visit) (void *opaque, uint64_t extent), void *opaque)
{
  const struct activity_entry *e;

  for (e = linked (act, act->used.oldest); e; e = linked (act, e->newer))
    visit (opaque, e->extent);
}

uint32_t
activity_count (const struct activity *act)
{
  return act->nr_entries - act->nr_free;
}

bool
activity_in_set (const struct activity *act, uint64_t extent)
{
  const struct activity_entry *e = find (act, extent);

  return e && e->state != ACTIVITY_COLD;
}

bool
activity_is_cooling (const struct activity *act, uint64_t extent)
{
  const struct activity_entry *e = find (act, extent);

  return e && e->cooling;
}

uint32_t
activity_list (const struct activity *act, uint64_t *extents, uint32_t max)
{
  const struct activity_entry *e;
  uint32_t n = 0;

  for (e = linked (act, act->used.newest); e && n < max;
       e = linked (act, e->older))
    extents[n++] = e->extent;
  return n;
}
