/* SPDX-License-Identifier: BSD-3-Clause */

/* What one call of a part on a write's way costs, in instructions.
 *
 * callgrind counts the same on every run of one build, however busy the machine
 * is, so a bound on a count is no timed test.  The program dumps the
 * instructions of each case's batch under the case's name, and prints a line a
 * case: its name and the calls in its batch.  Only a batch is instrumented, so
 * that a map of 2^28 bits is made at full speed.
 *
 * All lies in anonymous memory, and no function here does any I/O.
 */

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <valgrind/callgrind.h>

#include "base/error.h"
#include "logs/bitmap.h"
#include "logs/dirty_map.h"
#include "logs/layout.h"
#include "logs/rangelock.h"

#define GIB (UINT64_C (1) << 30)
#define TIB (UINT64_C (1) << 40)
#define REGION (UINT64_C (64) << 10)
#define MAX_RANGES 64u

struct counted {
  const char *name;
  void (*batch) (uint64_t calls, uint64_t n);
  uint64_t calls;
  uint64_t size; /* bytes of the volume, where there is a map */
  uint64_t n;    /* ranges held */
};

static struct dirty_map dm;
static struct rangelock ranges;
static struct range range[MAX_RANGES];

/* Results go here, or the compiler could leave a call out. */
static volatile uint64_t sink;

static void
require (int rc)
{
  if (rc == 0)
    return;
  fprintf (stderr, "instructions: %s\n", last_error ());
  exit (1);
}

static void
map_init (struct bitmap *map, uint64_t nr)
{
  void *memory = mmap (NULL, bitmap_bytes (nr), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

  if (memory == MAP_FAILED) {
    perror ("instructions: mmap");
    exit (1);
  }
  require (bitmap_init (map, memory, nr));
}

/* Call `i` has a place of its own, far from the one before: the multiplier is
 * odd and `nr` a power of two.
 */
static uint64_t
scatter (uint64_t i, uint64_t nr)
{
  return i * UINT64_C (0x9e3779b1) & (nr - 1);
}

static void
search (uint64_t calls, uint64_t n)
{
  (void)n;
  for (uint64_t i = 0; i < calls; i++)
    sink = bitmap_next_set (&dm.map[MAP_DIRTY], 0, dm.map[MAP_DIRTY].nr_bits);
}

static void
mark (uint64_t calls, uint64_t n)
{
  (void)n;
  for (uint64_t i = 0; i < calls; i++)
    dirty_map_mark (&dm, scatter (i, dm.map[MAP_DIRTY].nr_bits), 1, false);
}

static void
add_range (uint64_t i)
{
  range[i].offset = i * REGION;
  range[i].length = 4096;
  rangelock_add (&ranges, &range[i]);
}

/* The newest of `n` ends, and is held again. */
static void
lock_newest (uint64_t calls, uint64_t n)
{
  for (uint64_t i = 0; i < calls; i++) {
    rangelock_remove (&ranges, &range[n - 1]);
    add_range (n - 1);
  }
}

static const struct counted cases[] = {
  { "search/1GiB", search, 1024, GIB, 0 },
  { "search/16TiB", search, 16, 16 * TIB, 0 },
  { "mark/1GiB", mark, 4096, GIB, 0 },
  { "mark/16TiB", mark, 4096, 16 * TIB, 0 },
  { "lock/1", lock_newest, 2048, 0, 1 },
  { "lock/16", lock_newest, 2048, 0, 16 },
  { "lock/64", lock_newest, 2048, 0, MAX_RANGES },
};

static void
prepare (const struct counted *c)
{
  memset (&dm, 0, sizeof dm);
  if (c->size) {
    for (int i = 0; i < NR_MAPS; i++)
      map_init (&dm.map[i], c->size / REGION);
    map_init (&dm.copied, c->size / REGION);
  }
  memset (&ranges, 0, sizeof ranges);
  for (uint64_t i = 0; i < c->n; i++)
    add_range (i);
}

int
main (void)
{
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    const struct counted *c = &cases[i];

    prepare (c);
    CALLGRIND_START_INSTRUMENTATION;
    CALLGRIND_ZERO_STATS;
    c->batch (c->calls, c->n);
    CALLGRIND_STOP_INSTRUMENTATION;
    CALLGRIND_DUMP_STATS_AT (c->name);
    printf ("%s %" PRIu64 "\n", c->name, c->calls);
  }
  return 0;
}
