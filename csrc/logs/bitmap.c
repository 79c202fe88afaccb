/* SPDX-License-Identifier: BSD-3-Clause */

/* Bits over the caller's memory, with counts.
 *
 * The format on disk is by bytes (bit i in bit i % 8 of byte i / 8), the work
 * is by 64-bit words: read as little-endian, a word holds bits 64 w to
 * 64 w + 63 in order, so both are the same memory.
 *
 * A volume of 1 PiB in 64 KiB regions has 2^34 bits, 2 GiB a map, nearly all of
 * them zero most of the time.  So the set bits of each page are counted: a
 * search, a clear or a merge reads a count of 4 bytes instead of 4096 bytes
 * that it can skip, and never touches sparse memory that was never written.  A
 * word is stored only if it changes: otherwise clearing clean regions would
 * make the kernel write pages of the mapped file.
 */

#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "logs/bitmap.h"
#include "logs/layout.h"

#define WORD_BITS UINT64_C (64)
#define PAGE_WORDS (LAYOUT_PAGE / sizeof (uint64_t))

uint64_t
bitmap_bytes (uint64_t nr_bits)
{
  uint64_t pages = nr_bits / BITMAP_PAGE_BITS;

  if (nr_bits % BITMAP_PAGE_BITS)
    pages++;
  return pages * LAYOUT_PAGE;
}

static uint64_t
min_u64 (uint64_t a, uint64_t b)
{
  return a < b ? a : b;
}

/* The bits of the page that exist: fewer in the last one. */
static uint64_t
page_size (const struct bitmap *map, uint64_t page)
{
  return min_u64 (BITMAP_PAGE_BITS, map->nr_bits - page * BITMAP_PAGE_BITS);
}

/* By the count: every bit of the page is `value`. */
static bool
is_all (const struct bitmap *map, uint64_t page, bool value)
{
  uint32_t set = map->page_set[page];

  return value ? set == page_size (map, page) : set == 0;
}

/* The bits [first, end) of the word that `first` is in. */
static uint64_t
word_mask (uint64_t first, uint64_t end)
{
  uint64_t skip = first % WORD_BITS;
  uint64_t count = min_u64 (WORD_BITS - skip, end - first);

  return (~UINT64_C (0) >> (WORD_BITS - count)) << skip;
}

void
bitmap_clear_padding (struct bitmap *map)
{
  uint64_t end = map->nr_pages * BITMAP_PAGE_BITS;

  for (uint64_t bit = map->nr_bits; bit < end;) {
    uint64_t *word = &map->words[bit / WORD_BITS];
    uint64_t keep = le64toh (*word) & ~word_mask (bit, end);

    if (le64toh (*word) != keep)
      *word = htole64 (keep);
    bit = (bit / WORD_BITS + 1) * WORD_BITS;
  }
}

/* How many of a page's first `nr_bits` are set. */
static uint32_t
count_bits (const char *page, uint64_t nr_bits)
{
  uint32_t n = 0;

  for (uint64_t bit = 0; bit < nr_bits; bit += WORD_BITS) {
    uint64_t word;

    memcpy (&word, page + bit / 8, sizeof word);
    if (word)
      n += (uint32_t)__builtin_popcountll (le64toh (word)
                                           & word_mask (bit, nr_bits));
  }
  return n;
}

int
bitmap_init (struct bitmap *map, void *words, uint64_t nr_bits)
{
  uint64_t nr_pages = bitmap_bytes (nr_bits) / LAYOUT_PAGE;
  uint32_t *page_set = calloc (nr_pages ? nr_pages : 1, sizeof *page_set);

  if (page_set == NULL)
    return set_error (-ENOMEM, "bitmap of %" PRIu64 " bits", nr_bits);
  *map = (struct bitmap){
    .words = words,
    .nr_bits = nr_bits,
    .page_set = page_set,
    .nr_pages = nr_pages,
  };
  return 0;
}

void
bitmap_count (struct bitmap *map, uint64_t page, const void *content)
{
  assert (page < map->nr_pages);
  map->nr_set -= map->page_set[page];
  map->page_set[page] = count_bits (content, page_size (map, page));
  map->nr_set += map->page_set[page];
}

void
bitmap_free (struct bitmap *map)
{
  free (map->page_set);
  *map = (struct bitmap){ 0 };
}

bool
bitmap_test (const struct bitmap *map, uint64_t bit)
{
  assert (bit < map->nr_bits);
  return map->page_set[bit / BITMAP_PAGE_BITS] > 0
         && le64toh (map->words[bit / WORD_BITS]) >> bit % WORD_BITS & 1;
}

/* Make [first, end), which lies in one page, `value`; the bits changed. */
static uint64_t
change_in_page (struct bitmap *map, uint64_t first, uint64_t end, bool value)
{
  uint64_t changed = 0;

  for (uint64_t bit = first; bit < end;
       bit = (bit / WORD_BITS + 1) * WORD_BITS) {
    uint64_t *word = &map->words[bit / WORD_BITS];
    uint64_t old = le64toh (*word);
    uint64_t mask = word_mask (bit, end);
    uint64_t new = value ? old | mask : old & ~mask;

    if (new != old) {
      *word = htole64 (new);
      changed += (uint64_t)__builtin_popcountll (new ^ old);
    }
  }
  return changed;
}

static uint64_t
change (struct bitmap *map, uint64_t first, uint64_t count, bool value)
{
  uint64_t end = first + count;
  uint64_t total = 0;

  assert (first <= map->nr_bits && count <= map->nr_bits - first);
  for (uint64_t bit = first; bit < end && (value || total < map->nr_set);) {
    uint64_t page = bit / BITMAP_PAGE_BITS;
    uint64_t stop = min_u64 (end, (page + 1) * BITMAP_PAGE_BITS);

    if (!is_all (map, page, value)) {
      uint64_t changed = change_in_page (map, bit, stop, value);

      map->page_set[page] += (uint32_t)(value ? changed : -changed);
      total += changed;
    }
    bit = stop;
  }
  map->nr_set += value ? total : -total;
  return total;
}

uint64_t
bitmap_set (struct bitmap *map, uint64_t first, uint64_t count)
{
  return change (map, first, count, true);
}

uint64_t
bitmap_clear (struct bitmap *map, uint64_t first, uint64_t count)
{
  return change (map, first, count, false);
}

void
bitmap_clear_all (struct bitmap *map)
{
  change (map, 0, map->nr_bits, false);
}

static uint64_t
merge_page (struct bitmap *into, const struct bitmap *from, uint64_t page)
{
  uint64_t *to = into->words + page * PAGE_WORDS;
  const uint64_t *words = from->words + page * PAGE_WORDS;
  uint64_t changed = 0;

  for (size_t i = 0; i < PAGE_WORDS; i++) {
    uint64_t added = words[i] & ~to[i];

    if (added) {
      to[i] |= added;
      changed += (uint64_t)__builtin_popcountll (added);
    }
  }
  into->page_set[page] += (uint32_t)changed;
  return changed;
}

uint64_t
bitmap_merge (struct bitmap *into, const struct bitmap *from)
{
  uint64_t total = 0, left = from->nr_set;

  assert (into->nr_bits == from->nr_bits);
  for (uint64_t page = 0; left > 0; page++) {
    if (from->page_set[page])
      total += merge_page (into, from, page);
    left -= from->page_set[page];
  }
  into->nr_set += total;
  return total;
}

/* The first bit of [from, end) that is `value`.  The count identifies a page
 * with no such bit or with only such bits.  So at most one page at each end of
 * the range is read without a result, and none when the remote is in sync.
 */
static uint64_t
next (const struct bitmap *map, uint64_t from, uint64_t end, bool value)
{
  assert (end <= map->nr_bits);
  for (uint64_t bit = from; bit < end;) {
    uint64_t page = bit / BITMAP_PAGE_BITS;
    uint64_t stop = min_u64 (end, (page + 1) * BITMAP_PAGE_BITS);

    if (is_all (map, page, !value)) {
      bit = stop;
      continue;
    }
    if (is_all (map, page, value))
      return bit;
    while (bit < stop) {
      uint64_t word = le64toh (map->words[bit / WORD_BITS]);
      uint64_t hits = (value ? word : ~word) & word_mask (bit, stop);

      if (hits)
        return bit / WORD_BITS * WORD_BITS + (uint64_t)__builtin_ctzll (hits);
      bit = min_u64 (stop, (bit / WORD_BITS + 1) * WORD_BITS);
    }
  }
  return end;
}

uint64_t
bitmap_next_set (const struct bitmap *map, uint64_t from, uint64_t end)
{
  return next (map, from, end, true);
}

uint64_t
bitmap_next_clear (const struct bitmap *map, uint64_t from, uint64_t end)
{
  return next (map, from, end, false);
}
