/* SPDX-License-Identifier: BSD-3-Clause */

/* What the model test in Python (tests/unit/test_bitmap.py) cannot see: memory
 * that may not be touched, and 2^34 bits.
 */

#include "logs/bitmap.h"
#include "logs/layout.h"
#include "test.h"

#include <signal.h>
#include <sys/mman.h>

#define PAGE_BITS BITMAP_PAGE_BITS

static void *
map_memory (uint64_t size, int protection)
{
  void *words = mmap (NULL, size, protection,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

  assert (words != MAP_FAILED);
  return words;
}

static struct bitmap
make (uint64_t nr_bits)
{
  struct bitmap map;
  void *words = map_memory (bitmap_bytes (nr_bits), PROT_READ | PROT_WRITE);

  assert (bitmap_init (&map, words, nr_bits) == 0);
  assert (map.nr_set == 0);
  return map;
}

static void
drop (struct bitmap *map)
{
  munmap (map->words, bitmap_bytes (map->nr_bits));
  bitmap_free (map);
}

static void
count_all (struct bitmap *map)
{
  for (uint64_t page = 0; page < map->nr_pages; page++)
    bitmap_count (map, page, map->words + page * (LAYOUT_PAGE / 8));
}

static void
assert_counts (const struct bitmap *map)
{
  struct bitmap fresh;

  assert (bitmap_init (&fresh, map->words, map->nr_bits) == 0);
  count_all (&fresh);
  assert (fresh.nr_set == map->nr_set);
  assert (fresh.nr_pages == map->nr_pages);
  assert (memcmp (fresh.page_set, map->page_set,
                  map->nr_pages * sizeof *map->page_set)
          == 0);
  bitmap_free (&fresh);
}

static void
test_bitmap_bytes_are_whole_pages (void)
{
  assert (bitmap_bytes (1) == 4096);
  assert (bitmap_bytes (PAGE_BITS) == 4096);
  assert (bitmap_bytes (PAGE_BITS + 1) == 8192);
  assert (bitmap_bytes (UINT64_C (1) << 34) == UINT64_C (1) << 31);
}

/* A new map reads no memory, and no function reads a page that is empty by its
 * count (or full, for next_clear and set).  Here such a page cannot be read, so
 * a read is a SIGSEGV.
 */
static void
test_bitmap_empty_pages_stay_untouched (void)
{
  struct bitmap map, into = make (5 * PAGE_BITS);
  char *words = map_memory (5 * LAYOUT_PAGE, PROT_NONE);

  assert (bitmap_init (&map, words, 5 * PAGE_BITS) == 0);
  assert (bitmap_next_set (&map, 3, map.nr_bits) == map.nr_bits);
  assert (bitmap_next_clear (&map, 3, map.nr_bits) == 3);
  assert (!bitmap_test (&map, 3));
  assert (
      mprotect (words + 3 * LAYOUT_PAGE, LAYOUT_PAGE, PROT_READ | PROT_WRITE)
      == 0);
  bitmap_set (&map, 3 * PAGE_BITS, PAGE_BITS);
  assert (bitmap_next_set (&map, 3, map.nr_bits) == 3 * PAGE_BITS);
  assert (bitmap_merge (&into, &map) == PAGE_BITS);
  assert (mprotect (words + 3 * LAYOUT_PAGE, LAYOUT_PAGE, PROT_NONE) == 0);
  assert (bitmap_next_clear (&map, 3 * PAGE_BITS, 4 * PAGE_BITS)
          == 4 * PAGE_BITS);
  assert (bitmap_set (&map, 3 * PAGE_BITS + 7, 99) == 0);
  assert (bitmap_next_set (&map, 3 * PAGE_BITS + 7, map.nr_bits)
          == 3 * PAGE_BITS + 7);
  assert (
      mprotect (words + 3 * LAYOUT_PAGE, LAYOUT_PAGE, PROT_READ | PROT_WRITE)
      == 0);
  bitmap_clear_all (&map);
  assert (map.nr_set == 0);
  drop (&map);
  drop (&into);
}

/* Clearing clean regions must not dirty a page of the mapped file: the memory
 * is readable only, so a store is a SIGSEGV.
 */
static void
test_bitmap_unchanged_words_are_not_stored (void)
{
  struct bitmap map = make (PAGE_BITS), same = make (PAGE_BITS);

  bitmap_set (&map, 100, 300);
  bitmap_set (&same, 100, 300);
  assert (mprotect (map.words, LAYOUT_PAGE, PROT_READ) == 0);
  assert (bitmap_clear (&map, 0, 100) == 0);
  assert (bitmap_set (&map, 101, 298) == 0);
  assert (bitmap_merge (&map, &same) == 0);
  assert_counts (&map);
  drop (&map);
  drop (&same);
}

/* 1 PiB in 64 KiB regions, in memory that is never all there. */
static void
test_bitmap_of_a_pebibyte_works (void)
{
  uint64_t nr_bits = UINT64_C (1) << 34;
  struct bitmap map, into;
  size_t size = bitmap_bytes (nr_bits);

  assert (bitmap_init (&map, map_memory (size, PROT_READ | PROT_WRITE), nr_bits)
          == 0);
  assert (
      bitmap_init (&into, map_memory (size, PROT_READ | PROT_WRITE), nr_bits)
      == 0);
  assert (bitmap_set (&map, nr_bits - 1, 1) == 1);
  assert (bitmap_set (&map, (UINT64_C (1) << 32) - 2, 4) == 4);
  assert (bitmap_next_set (&map, 0, nr_bits) == (UINT64_C (1) << 32) - 2);
  assert (bitmap_next_clear (&map, (UINT64_C (1) << 32) - 2, nr_bits)
          == (UINT64_C (1) << 32) + 2);
  assert (bitmap_next_set (&map, (UINT64_C (1) << 32) + 2, nr_bits)
          == nr_bits - 1);
  assert (bitmap_merge (&into, &map) == 5);
  bitmap_clear_all (&map);
  assert (map.nr_set == 0 && into.nr_set == 5);
  drop (&map);
  drop (&into);
}

int
main (void)
{
  RUN (test_bitmap_bytes_are_whole_pages);
  RUN (test_bitmap_empty_pages_stay_untouched);
  RUN (test_bitmap_unchanged_words_are_not_stored);
  RUN (test_bitmap_of_a_pebibyte_works);
  return 0;
}
