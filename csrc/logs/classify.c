/* SPDX-License-Identifier: BSD-3-Clause */

/* Which bytes of a write go to one remote.
 *
 *   dirty  copied  late | the write goes to the remote
 *   no     -       -    | yes: the region is the same on both and stays so
 *   yes    yes     -    | yes: resync has copied it, only the flush is missing
 *   yes    -       yes  | yes: it is held back from being clean, not stale
 *   yes    no      no   | no: resync will copy the whole region later
 *
 * Policy stop (`always`) answers a write only when both disks have it, so all
 * of it goes.  The local leg always gets the whole request.
 *
 * A dirty region must be all or nothing: a part written remotely would not
 * make it any cleaner.  So the pieces are cut at region borders, and runs of
 * regions that go are merged into one command.
 */

#include <assert.h>
#include <stdbool.h>
#include <stdint.h>

#include "logs/bitmap.h"
#include "logs/classify.h"
#include "logs/dirty_map.h"
#include "logs/layout.h"

bool
classify_goes_remote (const struct dirty_map *dm, uint64_t region, bool always)
{
  return always || !bitmap_test (&dm->map[MAP_DIRTY], region)
         || bitmap_test (&dm->copied, region)
         || bitmap_test (&dm->map[MAP_LATE], region);
}

/* The first region in [region, end) that goes, or `end`.  The maps are mostly
 * empty or mostly full here, so the loop searches each map for its next bit,
 * rather than testing three bits of every region.
 */
static uint64_t
next_that_goes (const struct dirty_map *dm, uint64_t region, uint64_t end)
{
  end = bitmap_next_clear (&dm->map[MAP_DIRTY], region, end);
  end = bitmap_next_set (&dm->copied, region, end);
  return bitmap_next_set (&dm->map[MAP_LATE], region, end);
}

/* The first region in [region, end) that does not go, or `end`. */
static uint64_t
next_that_stays (const struct dirty_map *dm, uint64_t region, uint64_t end)
{
  while (region < end) {
    region = bitmap_next_set (&dm->map[MAP_DIRTY], region, end);
    if (region == end || !classify_goes_remote (dm, region, false))
      break;
    region++;
  }
  return region;
}

bool
classify_next (const struct dirty_map *dm, uint32_t region_size, uint64_t from,
               uint64_t end, uint64_t max, bool always, struct piece *piece)
{
  uint64_t region, end_region;

  assert (from <= end);
  assert (max > 0);
  if (from == end)
    return false;

  if (!always) {
    end_region = (end - 1) / region_size + 1;
    region = next_that_goes (dm, from / region_size, end_region);
    if (region == end_region)
      return false;
    if (region > from / region_size)
      from = region * region_size;

    /* Look no further than the cap: a trim may be as long as the volume. */
    if (end - from > max)
      end = from + max;
    end_region = (end - 1) / region_size + 1;
    region = next_that_stays (dm, region, end_region);
    if (region < end_region)
      end = region * region_size;
  }
  else if (end - from > max)
    end = from + max;

  piece->offset = from;
  piece->length = end - from;
  return true;
}
