/* SPDX-License-Identifier: BSD-3-Clause */

/* What one call of each part on a write's way costs.
 *
 *   micro [CASE...]     run the cases, or all of them
 *   micro --list        their names
 *
 * Prints a line a case: its name, the calls in a batch, nanoseconds a call.
 * Time says little on a machine that is shared, so under callgrind the
 * instructions of one batch are dumped under the case's name instead, and the
 * time is 0: run.py divides.  Only a batch is instrumented, so that a map of
 * 2^28 bits may be filled at full speed before it.
 *
 * A case has a batch of calls that all do the same work.  What such a batch
 * uses up (bits that are clear, slots that are free) `prepare` puts back
 * before the next one, uncounted.
 *
 * The logs lie in anonymous memory: what is measured is instructions, not the
 * page cache, and no function here does any I/O.
 */

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <valgrind/callgrind.h>

#include "activity_set.h"
#include "internal.h"

#define KIB UINT64_C (1024)
#define MIB (KIB * KIB)
#define GIB (KIB * MIB)
#define TIB (KIB * GIB)

#define REGION (64 * KIB)
#define NR_SLOTS 1024
#define NR_EXTENTS 1024
#define MAX_RANGES 65

#define NATIVE_NS 20000000 /* a case's share of the run's time */

/* How a map is filled before the first batch. */
enum fill {
  EMPTY,
  SPARSE,   /* one bit in the middle of each page of bits */
  DENSE,    /* every bit */
  ALTERNATE /* every second bit */
};

struct micro_case {
  const char *name; /* FUNCTION/PARAMETER... */
  void (*setup) (const struct micro_case *c);
  void (*prepare) (const struct micro_case *c); /* before a batch, or NULL */
  void (*batch) (const struct micro_case *c);
  void (*teardown) (void);
  uint64_t calls; /* in a batch */
  uint64_t size;  /* bytes of the volume, where there is a map */
  enum fill fill;
  uint64_t n; /* bytes of a request, regions, extents, or others in the list */
};

/* Of the case that runs: the others' are all zero. */
static struct dirty_map dm;
static struct bitmap *const dirty = &dm.map[MAP_DIRTY];
static struct inflight ring;
static struct rangelock ranges;
static struct range range[MAX_RANGES];
static struct activity act;

/* Results go here, or the compiler could leave a call out. */
static volatile uint64_t sink;

static void *
allocate (uint64_t size)
{
  void *memory = mmap (NULL, size, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

  if (memory == MAP_FAILED) {
    perror ("micro: mmap");
    exit (1);
  }
  return memory;
}

static void
require (int r)
{
  if (r < 0) {
    fprintf (stderr, "micro: %s\n", last_error ());
    exit (1);
  }
}

/* Call `i` of a batch has a place of its own, far from the one before: the
 * multiplier is odd and `nr` a power of two.
 */
static uint64_t
scatter (uint64_t i, uint64_t nr)
{
  return i * UINT64_C (0x9e3779b1) & (nr - 1);
}

/* --- The empty loop: what all others pay as well ---------------------- */

static void
batch_nothing (const struct micro_case *c)
{
  for (uint64_t i = 0; i < c->calls; i++)
    sink = scatter (i, MIB);
}

/* --- The bitmap and the dirty map -------------------------------------- */

static void
fill_map (const struct micro_case *c)
{
  switch (c->fill) {
  case EMPTY:
    break;
  case SPARSE:
    for (uint64_t bit = BITMAP_PAGE_BITS / 2; bit < dirty->nr_bits;
         bit += BITMAP_PAGE_BITS)
      bitmap_set (dirty, bit, 1);
    break;
  case DENSE:
    bitmap_set_all (dirty);
    break;
  case ALTERNATE:
    for (uint64_t bit = 0; bit < dirty->nr_bits; bit += 2)
      bitmap_set (dirty, bit, 1);
    break;
  }
}

static void
setup_map (const struct micro_case *c)
{
  uint64_t nr = c->size / REGION;

  for (int i = 0; i < NR_MAPS; i++)
    require (bitmap_init (&dm.map[i], allocate (bitmap_bytes (nr)), nr));
  require (bitmap_init (&dm.copied, allocate (bitmap_bytes (nr)), nr));
  fill_map (c);
}

static void
teardown_map (void)
{
  for (int i = 0; i < NR_MAPS; i++) {
    munmap (dm.map[i].words, bitmap_bytes (dm.map[i].nr_bits));
    bitmap_free (&dm.map[i]);
  }
  munmap (dm.copied.words, bitmap_bytes (dm.copied.nr_bits));
  bitmap_free (&dm.copied);
}

/* The `n` regions of call `i`. */
static uint64_t
first_region (const struct micro_case *c, uint64_t i)
{
  return scatter (i, c->size / REGION / c->n) * c->n;
}

static void
prepare_clear (const struct micro_case *c)
{
  for (uint64_t i = 0; i < c->calls; i++)
    bitmap_clear (dirty, first_region (c, i), c->n);
}

static void
prepare_set (const struct micro_case *c)
{
  for (uint64_t i = 0; i < c->calls; i++)
    bitmap_set (dirty, first_region (c, i), c->n);
}

static void
batch_set (const struct micro_case *c)
{
  for (uint64_t i = 0; i < c->calls; i++)
    sink = bitmap_set (dirty, first_region (c, i), c->n);
}

static void
batch_clear (const struct micro_case *c)
{
  for (uint64_t i = 0; i < c->calls; i++)
    sink = bitmap_clear (dirty, first_region (c, i), c->n);
}

static void
batch_test (const struct micro_case *c)
{
  for (uint64_t i = 0; i < c->calls; i++)
    sink = bitmap_test (dirty, first_region (c, i));
}

/* Over the whole map each time. */
static void
batch_next_set (const struct micro_case *c)
{
  for (uint64_t i = 0; i < c->calls; i++)
    sink = bitmap_next_set (dirty, 0, dirty->nr_bits);
}

static void
batch_next_clear (const struct micro_case *c)
{
  for (uint64_t i = 0; i < c->calls; i++)
    sink = bitmap_next_clear (dirty, 0, dirty->nr_bits);
}

/* From run to run, as resync goes; a run is `n` regions at most. */
static void
batch_next_run (const struct micro_case *c)
{
  uint64_t bit = 0;

  for (uint64_t i = 0; i < c->calls; i++) {
    uint64_t first = bitmap_next_set (dirty, bit, dirty->nr_bits);
    uint64_t most = first + c->n;

    if (first == dirty->nr_bits) {
      bit = 0;
      continue;
    }
    if (most > dirty->nr_bits)
      most = dirty->nr_bits;
    bit = bitmap_next_clear (dirty, first, most);
  }
  sink = bit;
}

static void
batch_mark (const struct micro_case *c)
{
  for (uint64_t i = 0; i < c->calls; i++)
    dirty_map_mark (&dm, first_region (c, i), c->n, false);
}

static void
prepare_copied (const struct micro_case *c)
{
  prepare_set (c);
  for (uint64_t i = 0; i < c->calls; i++)
    bitmap_set (&dm.copied, first_region (c, i), c->n);
}

static void
batch_clean (const struct micro_case *c)
{
  for (uint64_t i = 0; i < c->calls; i++)
    sink = dirty_map_clean (&dm, first_region (c, i), c->n);
}

/* `n` regions unflushed, all over the map. */
static void
prepare_unflushed (const struct micro_case *c)
{
  bitmap_clear_all (dirty);
  for (uint64_t i = 0; i < c->n; i++)
    bitmap_set (&dm.map[MAP_UNFLUSHED0], scatter (i, c->size / REGION), 1);
}

static void
batch_lost (const struct micro_case *c)
{
  for (uint64_t i = 0; i < c->calls; i++)
    dirty_map_lost (&dm);
}

/* What a write, and the flush after `n` of them, do to the unflushed set. */
static void
batch_unflushed (const struct micro_case *c)
{
  struct bitmap *map = &dm.map[MAP_UNFLUSHED0];

  for (uint64_t i = 0; i < c->calls; i++) {
    for (uint64_t k = 0; k < c->n; k++)
      bitmap_set (map, scatter (k, c->size / REGION), 1);
    bitmap_clear_all (map);
  }
}

/* Every piece of a request of `n` bytes, as admit.c asks for them. */
static void
batch_classify (const struct micro_case *c)
{
  uint64_t nr = c->size / (c->n > REGION ? c->n : REGION);
  struct piece piece;

  for (uint64_t i = 0; i < c->calls; i++) {
    uint64_t from = scatter (i, nr) * (c->size / nr), end = from + c->n;

    while (classify_next (&dm, REGION, from, end, 32 * MIB, false, &piece))
      from = piece.offset + piece.length;
    sink = from;
  }
}

/* --- The ring ------------------------------------------------------------ */

static int slot[NR_SLOTS];

static void
reserve_one (uint64_t i)
{
  slot[i]
      = inflight_reserve (&ring, scatter (i, MIB) * 4096, 4096, SLOT_WRITE, 0);
}

static void
setup_ring (const struct micro_case *c)
{
  (void)c;
  ring.slots = allocate (NR_SLOTS * sizeof *ring.slots);
  ring.nr_slots = NR_SLOTS;
}

static void
teardown_ring (void)
{
  munmap (ring.slots, NR_SLOTS * sizeof *ring.slots);
  memset (&ring, 0, sizeof ring);
}

/* All free but `n`, the oldest. */
static void
prepare_free (const struct micro_case *c)
{
  memset (ring.slots, 0, NR_SLOTS * sizeof *ring.slots);
  ring.nr_open = ring.next = 0;
  for (uint64_t i = 0; i < c->n; i++)
    reserve_one (i);
}

static void
prepare_open (const struct micro_case *c)
{
  prepare_free (c);
  for (uint64_t i = 0; i < c->calls; i++)
    reserve_one (i);
}

static void
batch_reserve (const struct micro_case *c)
{
  for (uint64_t i = 0; i < c->calls; i++)
    reserve_one (c->n + i);
}

static void
batch_retire (const struct micro_case *c)
{
  for (uint64_t i = 0; i < c->calls; i++)
    inflight_retire (&ring, slot[i]);
}

/* With `n` others that stay open: the ring passes over them. */
static void
batch_ring_turn (const struct micro_case *c)
{
  for (uint64_t i = 0; i < c->calls; i++) {
    reserve_one (c->n);
    inflight_issued (&ring, slot[c->n], 3);
    inflight_done (&ring, slot[c->n], 3);
    inflight_retire (&ring, slot[c->n]);
  }
}

/* --- The range lock -------------------------------------------------- */

static void
add_range (uint64_t i)
{
  range[i].offset = i * MIB;
  range[i].length = 4096;
  sink = rangelock_add (&ranges, &range[i]);
}

/* `n` ranges held, none of which overlap. */
static void
setup_ranges (const struct micro_case *c)
{
  for (uint64_t i = 0; i < c->n; i++)
    add_range (i);
}

static void
teardown_ranges (void)
{
  memset (&ranges, 0, sizeof ranges);
  memset (range, 0, sizeof range);
}

/* The newest leaves: it has nobody behind it. */
static void
batch_range_newest (const struct micro_case *c)
{
  for (uint64_t i = 0; i < c->calls; i++) {
    add_range (c->n);
    rangelock_remove (&ranges, &range[c->n]);
  }
}

/* The oldest of `n` leaves and comes again: it has all others behind it. */
static void
batch_range_oldest (const struct micro_case *c)
{
  for (uint64_t i = 0; i < c->calls; i++) {
    uint64_t oldest = i % c->n;

    rangelock_remove (&ranges, &range[oldest]);
    add_range (oldest);
  }
}

/* The newest wants what the oldest of `n` holds, and is given it. */
static void
batch_range_wait (const struct micro_case *c)
{
  struct range *first = &range[MAX_RANGES - 1], *second = first - 1;

  for (uint64_t i = 0; i < c->calls; i++) {
    first->offset = second->offset = TIB;
    first->length = second->length = 4096;
    rangelock_add (&ranges, first);
    rangelock_add (&ranges, second);
    rangelock_remove (&ranges, first);
    sink = second->blockers;
    rangelock_remove (&ranges, second);
  }
}

/* --- The activity set -------------------------------------------------- */

static void
written (void)
{
  struct activity_batch b;

  if (activity_stage (&act, &b) == 1)
    activity_written (&act, &b);
}

/* `n` extents hot, and durable as far as the set can tell. */
static void
setup_activity (const struct micro_case *c)
{
  act.nr_entries = NR_EXTENTS;
  act.nr_extents = 16 * TIB / (4 * MIB);
  require (activity_set_init (&act));
  activity_set_loaded (&act);
  for (uint64_t i = 0; i < c->n; i++) {
    activity_hold (&act, i, i);
    activity_release (&act, i, i, i);
  }
  written ();
}

static void
teardown_activity (void)
{
  activity_set_free (&act);
  memset (&act, 0, sizeof act);
}

static void
batch_hold (const struct micro_case *c)
{
  for (uint64_t i = 0; i < c->calls; i++) {
    uint64_t extent = scatter (i, c->n);

    sink = activity_hold (&act, extent, extent);
    activity_release (&act, extent, extent, i);
  }
}

/* A request of 32 MiB. */
static void
batch_hold_wide (const struct micro_case *c)
{
  for (uint64_t i = 0; i < c->calls; i++) {
    sink = activity_hold (&act, 0, 7);
    activity_release (&act, 0, 7, c->n + i);
  }
}

/* An extent comes into a full set: one goes cold, the sector is staged and
 * sealed.  Only the write itself and the flush before it are left out.
 */
static void
batch_newcomer (const struct micro_case *c)
{
  static uint64_t extent = NR_EXTENTS;

  for (uint64_t i = 0; i < c->calls; i++) {
    activity_pick (&act, 1, UINT64_MAX);
    activity_drop (&act);
    sink = activity_hold (&act, extent, extent);
    written ();
    activity_release (&act, extent, extent, c->n + i);
    extent++;
  }
}

/* --- The table --------------------------------------------------------- */

#define MAP(NAME, PREPARE, BATCH, CALLS, SIZE, FILL, N)                        \
  {                                                                            \
    NAME, setup_map, PREPARE, BATCH, teardown_map, CALLS, SIZE, FILL, N        \
  }
#define RING(NAME, PREPARE, BATCH, CALLS, N)                                   \
  {                                                                            \
    NAME, setup_ring, PREPARE, BATCH, teardown_ring, CALLS, 0, EMPTY, N        \
  }
#define RANGE(NAME, BATCH, N)                                                  \
  {                                                                            \
    NAME, setup_ranges, NULL, BATCH, teardown_ranges, 2048, 0, EMPTY, N        \
  }
#define ACTIVITY(NAME, BATCH, CALLS, N)                                        \
  {                                                                            \
    NAME, setup_activity, NULL, BATCH, teardown_activity, CALLS, 0, EMPTY, N   \
  }

static const struct micro_case cases[] = {
  { "loop", NULL, NULL, batch_nothing, NULL, 4096, 0, EMPTY, 0 },

  MAP ("bitmap_test/1GiB", NULL, batch_test, 4096, GIB, EMPTY, 1),
  MAP ("bitmap_test/16TiB", NULL, batch_test, 4096, 16 * TIB, EMPTY, 1),
  MAP ("bitmap_set/1GiB/clear", prepare_clear, batch_set, 4096, GIB, EMPTY, 1),
  MAP ("bitmap_set/16TiB/clear", prepare_clear, batch_set, 4096, 16 * TIB,
       EMPTY, 1),
  MAP ("bitmap_set/16TiB/set", prepare_set, batch_set, 4096, 16 * TIB, EMPTY,
       1),
  MAP ("bitmap_set/16TiB/full", NULL, batch_set, 4096, 16 * TIB, DENSE, 1),
  MAP ("bitmap_clear/1GiB/set", prepare_set, batch_clear, 4096, GIB, EMPTY, 1),
  MAP ("bitmap_clear/16TiB/set", prepare_set, batch_clear, 4096, 16 * TIB,
       EMPTY, 1),
  MAP ("bitmap_clear/16TiB/empty", NULL, batch_clear, 4096, 16 * TIB, EMPTY, 1),
  MAP ("bitmap_next_set/1GiB/empty", NULL, batch_next_set, 1024, GIB, EMPTY, 1),
  MAP ("bitmap_next_set/16TiB/empty", NULL, batch_next_set, 16, 16 * TIB, EMPTY,
       1),
  MAP ("bitmap_next_clear/1GiB/full", NULL, batch_next_clear, 1024, GIB, DENSE,
       1),
  MAP ("bitmap_next_clear/16TiB/full", NULL, batch_next_clear, 16, 16 * TIB,
       DENSE, 1),
  MAP ("next_run/1GiB/alternate", NULL, batch_next_run, 8192, GIB, ALTERNATE,
       512),
  MAP ("next_run/16TiB/sparse", NULL, batch_next_run, 4096, 16 * TIB, SPARSE,
       512),
  MAP ("next_run/16TiB/full", NULL, batch_next_run, 4096, 16 * TIB, DENSE, 512),

  MAP ("dirty_map_mark/1GiB/1", prepare_clear, batch_mark, 4096, GIB, EMPTY, 1),
  MAP ("dirty_map_mark/16TiB/1", prepare_clear, batch_mark, 4096, 16 * TIB,
       EMPTY, 1),
  MAP ("dirty_map_mark/16TiB/1/again", prepare_set, batch_mark, 4096, 16 * TIB,
       EMPTY, 1),
  MAP ("dirty_map_mark/16TiB/16", prepare_clear, batch_mark, 4096, 16 * TIB,
       EMPTY, 16),
  MAP ("dirty_map_mark/16TiB/512", prepare_clear, batch_mark, 1024, 16 * TIB,
       EMPTY, 512),
  MAP ("dirty_map_clean/1GiB/1", prepare_copied, batch_clean, 4096, GIB, EMPTY,
       1),
  MAP ("dirty_map_clean/16TiB/1", prepare_copied, batch_clean, 4096, 16 * TIB,
       EMPTY, 1),
  MAP ("dirty_map_clean/16TiB/16", prepare_copied, batch_clean, 4096, 16 * TIB,
       EMPTY, 16),
  MAP ("dirty_map_clean/16TiB/512", prepare_copied, batch_clean, 1024, 16 * TIB,
       EMPTY, 512),
  MAP ("dirty_map_lost/16TiB/1000", prepare_unflushed, batch_lost, 1, 16 * TIB,
       EMPTY, 1000),
  MAP ("unflushed/1GiB/32", NULL, batch_unflushed, 128, GIB, EMPTY, 32),
  MAP ("unflushed/16TiB/32", NULL, batch_unflushed, 16, 16 * TIB, EMPTY, 32),

  MAP ("classify/1GiB/4KiB/clean", NULL, batch_classify, 4096, GIB, EMPTY,
       4 * KIB),
  MAP ("classify/16TiB/4KiB/clean", NULL, batch_classify, 4096, 16 * TIB, EMPTY,
       4 * KIB),
  MAP ("classify/16TiB/4KiB/sparse", NULL, batch_classify, 4096, 16 * TIB,
       SPARSE, 4 * KIB),
  MAP ("classify/16TiB/4KiB/full", NULL, batch_classify, 4096, 16 * TIB, DENSE,
       4 * KIB),
  MAP ("classify/16TiB/1MiB/clean", NULL, batch_classify, 4096, 16 * TIB, EMPTY,
       MIB),
  MAP ("classify/1GiB/1MiB/alternate", NULL, batch_classify, 1024, GIB,
       ALTERNATE, MIB),
  MAP ("classify/16TiB/32MiB/sparse", NULL, batch_classify, 1024, 16 * TIB,
       SPARSE, 32 * MIB),

  RING ("inflight_reserve/0", prepare_free, batch_reserve, 512, 0),
  RING ("inflight_reserve/64", prepare_free, batch_reserve, 512, 64),
  RING ("inflight_retire", prepare_open, batch_retire, 512, 0),
  RING ("inflight_turn/0", prepare_free, batch_ring_turn, 4096, 0),
  RING ("inflight_turn/64", prepare_free, batch_ring_turn, 4096, 64),

  RANGE ("rangelock_newest/1", batch_range_newest, 1),
  RANGE ("rangelock_newest/16", batch_range_newest, 16),
  RANGE ("rangelock_newest/64", batch_range_newest, 64),
  RANGE ("rangelock_oldest/1", batch_range_oldest, 1),
  RANGE ("rangelock_oldest/16", batch_range_oldest, 16),
  RANGE ("rangelock_oldest/64", batch_range_oldest, 64),
  RANGE ("rangelock_wait/16", batch_range_wait, 16),

  ACTIVITY ("activity_hold/hot/1", batch_hold, 4096, 1),
  ACTIVITY ("activity_hold/hot/1024", batch_hold, 4096, NR_EXTENTS),
  ACTIVITY ("activity_hold/8/hot", batch_hold_wide, 1024, NR_EXTENTS),
  ACTIVITY ("activity_newcomer/1024", batch_newcomer, 256, NR_EXTENTS),
};
#define NR_CASES (sizeof cases / sizeof cases[0])

/* --- Running ---------------------------------------------------------------
 */

static uint64_t
now_ns (void)
{
  struct timespec ts;

  clock_gettime (CLOCK_MONOTONIC, &ts);
  return (uint64_t)ts.tv_sec * UINT64_C (1000000000) + (uint64_t)ts.tv_nsec;
}

static void
prepare (const struct micro_case *c)
{
  if (c->prepare)
    c->prepare (c);
}

/* Nanoseconds of the quickest batch: the others were disturbed. */
static uint64_t
time_batches (const struct micro_case *c)
{
  const uint64_t end = now_ns () + NATIVE_NS;
  uint64_t least = UINT64_MAX;

  for (int i = 0; i < 3 || now_ns () < end; i++) {
    uint64_t begin, taken;

    prepare (c);
    begin = now_ns ();
    c->batch (c);
    taken = now_ns () - begin;
    if (taken < least)
      least = taken;
  }
  return least;
}

static void
count_batch (const struct micro_case *c)
{
  /* The first batch may go other ways: what it finds is not as it leaves it. */
  prepare (c);
  c->batch (c);
  prepare (c);
  CALLGRIND_START_INSTRUMENTATION;
  CALLGRIND_ZERO_STATS;
  c->batch (c);
  CALLGRIND_STOP_INSTRUMENTATION;
  CALLGRIND_DUMP_STATS_AT (c->name);
}

static void
run_case (const struct micro_case *c)
{
  uint64_t ns = 0;

  if (c->setup)
    c->setup (c);
  if (RUNNING_ON_VALGRIND)
    count_batch (c);
  else
    ns = time_batches (c);
  if (c->teardown)
    c->teardown ();
  printf ("%s %" PRIu64 " %.3f\n", c->name, c->calls,
          (double)ns / (double)c->calls);
  fflush (stdout);
}

static const struct micro_case *
find_case (const char *name)
{
  for (size_t i = 0; i < NR_CASES; i++)
    if (strcmp (cases[i].name, name) == 0)
      return &cases[i];
  fprintf (stderr, "micro: there is no case \"%s\"\n", name);
  exit (2);
}

int
main (int argc, char *argv[])
{
  if (argc == 2 && strcmp (argv[1], "--list") == 0) {
    for (size_t i = 0; i < NR_CASES; i++)
      puts (cases[i].name);
    return 0;
  }
  for (int i = 1; i < argc; i++)
    find_case (argv[i]);
  for (int i = 1; i < argc; i++)
    run_case (find_case (argv[i]));
  for (size_t i = 0; argc == 1 && i < NR_CASES; i++)
    run_case (&cases[i]);
  return 0;
}
