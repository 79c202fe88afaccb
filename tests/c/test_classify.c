/* SPDX-License-Identifier: BSD-3-Clause */

/* Classification: the table in classify.c row by row, and the boundaries at
 * which a request is cut into pieces.
 */

#include "logs/bitmap.h"
#include "logs/classify.h"
#include "logs/dirty_map.h"
#include "logs/layout.h"
#include "test.h"

#define REGION 4096u
#define NR_REGIONS 40000u /* more than a page of bits */

struct maps {
  struct dirty_map dm;
  void *dirty, *copied, *late;
};

static void *
make_map (struct bitmap *map)
{
  void *words = calloc (1, bitmap_bytes (NR_REGIONS));

  assert (words && bitmap_init (map, words, NR_REGIONS) == 0);
  return words;
}

static struct maps *
maps_make (void)
{
  struct maps *maps = calloc (1, sizeof *maps);

  assert (maps);
  maps->dirty = make_map (&maps->dm.map[MAP_DIRTY]);
  maps->copied = make_map (&maps->dm.copied);
  maps->late = make_map (&maps->dm.map[MAP_LATE]);
  return maps;
}

static void
maps_free (struct maps *maps)
{
  bitmap_free (&maps->dm.map[MAP_DIRTY]);
  bitmap_free (&maps->dm.copied);
  bitmap_free (&maps->dm.map[MAP_LATE]);
  free (maps->dirty);
  free (maps->copied);
  free (maps->late);
  free (maps);
}

static void
assert_piece (const struct maps *maps, uint64_t from, uint64_t end,
              uint64_t max, uint64_t offset, uint64_t length)
{
  struct piece piece;

  assert (classify_next (&maps->dm, REGION, from, end, max, false, &piece));
  assert (piece.offset == offset);
  assert (piece.length == length);
}

static void
test_classify_each_row_of_table_goes_as_said (void)
{
  struct maps *maps = maps_make ();

  for (uint64_t row = 0; row < 8; row++) {
    if (row & 1)
      bitmap_set (&maps->dm.map[MAP_DIRTY], row, 1);
    if (row & 2)
      bitmap_set (&maps->dm.copied, row, 1);
    if (row & 4)
      bitmap_set (&maps->dm.map[MAP_LATE], row, 1);
    assert (classify_goes_remote (&maps->dm, row, false) == (row != 1));
    assert (classify_goes_remote (&maps->dm, row, true));
  }
  maps_free (maps);
}

static void
test_classify_clean_is_one_piece (void)
{
  struct maps *maps = maps_make ();

  assert_piece (maps, 512, 10 * REGION + 512, UINT64_MAX, 512, 10 * REGION);
  maps_free (maps);
}

static void
test_classify_dirty_is_no_piece (void)
{
  struct maps *maps = maps_make ();
  const struct piece untouched = { 7, 7 };
  struct piece piece = untouched;

  bitmap_set (&maps->dm.map[MAP_DIRTY], 0, maps->dm.map[MAP_DIRTY].nr_bits);
  assert (!classify_next (&maps->dm, REGION, 512, NR_REGIONS * (uint64_t)REGION,
                          UINT64_MAX, false, &piece));
  assert (memcmp (&piece, &untouched, sizeof piece) == 0);
  maps_free (maps);
}

static void
test_classify_empty_range_is_no_piece (void)
{
  struct maps *maps = maps_make ();
  struct piece piece;

  assert (!classify_next (&maps->dm, REGION, 512, 512, 1, false, &piece));
  assert (!classify_next (&maps->dm, REGION, 512, 512, 1, true, &piece));
  maps_free (maps);
}

static void
test_classify_mixed_is_cut_at_dirty_regions (void)
{
  struct maps *maps = maps_make ();
  struct piece piece;

  bitmap_set (&maps->dm.map[MAP_DIRTY], 1, 1);
  bitmap_set (&maps->dm.map[MAP_DIRTY], 4, 2);
  bitmap_set (&maps->dm.copied, 5, 1);
  assert_piece (maps, 1024, 7 * REGION, UINT64_MAX, 1024, REGION - 1024);
  assert_piece (maps, REGION, 7 * REGION, UINT64_MAX, 2 * REGION, 2 * REGION);
  assert_piece (maps, 4 * REGION, 6 * REGION + 512, UINT64_MAX, 5 * REGION,
                REGION + 512);
  assert (!classify_next (&maps->dm, REGION, 6 * REGION + 512, 6 * REGION + 512,
                          UINT64_MAX, false, &piece));
  maps_free (maps);
}

static void
test_classify_late_is_sent_with_its_clean_neighbours (void)
{
  struct maps *maps = maps_make ();

  bitmap_set (&maps->dm.map[MAP_DIRTY], 1, 3);
  bitmap_set (&maps->dm.map[MAP_LATE], 2, 1);
  assert_piece (maps, REGION, 9 * REGION, UINT64_MAX, 2 * REGION, REGION);
  bitmap_clear (&maps->dm.map[MAP_DIRTY], 3, 1);
  assert_piece (maps, REGION, 9 * REGION, UINT64_MAX, 2 * REGION, 7 * REGION);
  maps_free (maps);
}

static void
test_classify_max_cuts_inside_a_region (void)
{
  struct maps *maps = maps_make ();

  assert_piece (maps, 512, 9 * REGION, REGION, 512, REGION);
  assert_piece (maps, 512 + REGION, 9 * REGION, 1, 512 + REGION, 1);
  maps_free (maps);
}

static void
test_classify_always_sends_dirty_up_to_max (void)
{
  struct maps *maps = maps_make ();
  struct piece piece;

  bitmap_set (&maps->dm.map[MAP_DIRTY], 0, maps->dm.map[MAP_DIRTY].nr_bits);
  assert (
      classify_next (&maps->dm, REGION, 100, 9 * REGION, 5000, true, &piece));
  assert (piece.offset == 100 && piece.length == 5000);
  assert (classify_next (&maps->dm, REGION, 100, 9 * REGION, UINT64_MAX, true,
                         &piece));
  assert (piece.offset == 100 && piece.length == 9 * REGION - 100);
  maps_free (maps);
}

static void
test_classify_far_clean_region_is_found (void)
{
  struct maps *maps = maps_make ();
  const uint64_t last = NR_REGIONS - 1;

  bitmap_set (&maps->dm.map[MAP_DIRTY], 0, last);
  assert_piece (maps, 0, NR_REGIONS * (uint64_t)REGION, UINT64_MAX,
                last * REGION, REGION);
  maps_free (maps);
}

int
main (void)
{
  RUN (test_classify_each_row_of_table_goes_as_said);
  RUN (test_classify_clean_is_one_piece);
  RUN (test_classify_dirty_is_no_piece);
  RUN (test_classify_empty_range_is_no_piece);
  RUN (test_classify_mixed_is_cut_at_dirty_regions);
  RUN (test_classify_late_is_sent_with_its_clean_neighbours);
  RUN (test_classify_max_cuts_inside_a_region);
  RUN (test_classify_always_sends_dirty_up_to_max);
  RUN (test_classify_far_clean_region_is_found);
  return 0;
}
