/* SPDX-License-Identifier: BSD-3-Clause */

/* The bitmap's edges, and what the model test in Python cannot see: the bytes
 * on disk, the memory that may not be touched, and 2^34 bits.
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

static void
test_bitmap_bit_lies_in_its_byte (void)
{
  struct bitmap map = make (100);
  const uint8_t *bytes = (const uint8_t *)map.words;

  for (uint64_t bit = 0; bit < 100; bit++) {
    assert (bitmap_set (&map, bit, 1) == 1);
    assert (bytes[bit / 8] == 1 << bit % 8);
    assert (bitmap_test (&map, bit));
    assert (bitmap_clear (&map, bit, 1) == 1);
    assert (bytes[bit / 8] == 0);
    assert (!bitmap_test (&map, bit));
  }
  drop (&map);
}

static void
test_bitmap_change_counts_only_what_changed (void)
{
  struct bitmap map = make (3 * PAGE_BITS + 5);

  assert (bitmap_set (&map, 10, 0) == 0);
  assert (bitmap_set (&map, PAGE_BITS - 3, 70) == 70);
  assert (bitmap_set (&map, PAGE_BITS - 5, 70) == 2);
  assert (map.nr_set == 72);
  assert (map.page_set[0] == 5 && map.page_set[1] == 67);
  assert (bitmap_clear (&map, 0, PAGE_BITS) == 5);
  assert (bitmap_clear (&map, 0, map.nr_bits) == 67);
  assert (map.nr_set == 0);
  assert (bitmap_clear (&map, map.nr_bits, 0) == 0);
  assert_counts (&map);
  drop (&map);
}

static void
test_bitmap_set_all_leaves_padding_zero (void)
{
  struct bitmap map = make (2 * PAGE_BITS + 77);
  const uint8_t *bytes = (const uint8_t *)map.words;

  bitmap_set (&map, 0, map.nr_bits);
  assert (map.nr_set == map.nr_bits);
  assert (map.page_set[0] == PAGE_BITS && map.page_set[2] == 77);
  assert (bytes[2 * LAYOUT_PAGE + 9] == (1 << 77 % 8) - 1);
  for (int i = 10; i < LAYOUT_PAGE; i++)
    assert (bytes[2 * LAYOUT_PAGE + i] == 0);
  assert (bitmap_next_clear (&map, 0, map.nr_bits) == map.nr_bits);
  assert_counts (&map);
  bitmap_clear_all (&map);
  assert (map.nr_set == 0);
  assert (bitmap_next_set (&map, 0, map.nr_bits) == map.nr_bits);
  assert_counts (&map);
  drop (&map);
}

static void
test_bitmap_count_leaves_out_padding (void)
{
  struct bitmap map;
  uint8_t *bytes = map_memory (8192, PROT_READ | PROT_WRITE);

  memset (bytes, 0xff, 8192);
  assert (bitmap_init (&map, bytes, PAGE_BITS + 13) == 0);
  count_all (&map);
  count_all (&map); /* a second count counts no bit twice */
  assert (map.nr_set == PAGE_BITS + 13);
  assert (map.page_set[0] == PAGE_BITS && map.page_set[1] == 13);
  assert (bytes[4097] == 0xff); /* counting changes nothing */
  bitmap_clear_padding (&map);
  assert_counts (&map);
  assert (bytes[4096] == 0xff && bytes[4097] == 0x1f);
  for (int i = 4098; i < 8192; i++)
    assert (bytes[i] == 0);
  drop (&map);
}

static void
test_bitmap_next_stops_at_end (void)
{
  struct bitmap map = make (4 * PAGE_BITS);

  bitmap_set (&map, 3 * PAGE_BITS + 100, 50);
  assert (bitmap_next_set (&map, 0, map.nr_bits) == 3 * PAGE_BITS + 100);
  assert (bitmap_next_set (&map, 0, 3 * PAGE_BITS + 100)
          == 3 * PAGE_BITS + 100);
  assert (bitmap_next_set (&map, 5, 60) == 60);
  assert (bitmap_next_set (&map, 60, 60) == 60);
  assert (bitmap_next_set (&map, 3 * PAGE_BITS + 149, map.nr_bits)
          == 3 * PAGE_BITS + 149);
  assert (bitmap_next_set (&map, 3 * PAGE_BITS + 150, map.nr_bits)
          == map.nr_bits);
  assert (bitmap_next_clear (&map, 3 * PAGE_BITS + 100, map.nr_bits)
          == 3 * PAGE_BITS + 150);
  assert (bitmap_next_clear (&map, 3 * PAGE_BITS + 100, 3 * PAGE_BITS + 120)
          == 3 * PAGE_BITS + 120);
  drop (&map);
}

static void
test_bitmap_merge_adds_and_keeps_from (void)
{
  struct bitmap into = make (3 * PAGE_BITS + 9),
                from = make (3 * PAGE_BITS + 9);

  bitmap_set (&into, 0, 100);
  bitmap_set (&from, 50, 100);
  bitmap_set (&from, 3 * PAGE_BITS, 9);
  assert (bitmap_merge (&into, &from) == 59);
  assert (into.nr_set == 159 && from.nr_set == 109);
  assert (bitmap_next_clear (&into, 0, into.nr_bits) == 150);
  assert (bitmap_merge (&into, &from) == 0);
  assert_counts (&into);
  drop (&into);
  drop (&from);
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
  RUN (test_bitmap_bit_lies_in_its_byte);
  RUN (test_bitmap_change_counts_only_what_changed);
  RUN (test_bitmap_set_all_leaves_padding_zero);
  RUN (test_bitmap_count_leaves_out_padding);
  RUN (test_bitmap_next_stops_at_end);
  RUN (test_bitmap_merge_adds_and_keeps_from);
  RUN (test_bitmap_empty_pages_stay_untouched);
  RUN (test_bitmap_unchanged_words_are_not_stored);
  RUN (test_bitmap_of_a_pebibyte_works);
  return 0;
}
