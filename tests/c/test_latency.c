/* SPDX-License-Identifier: BSD-3-Clause */

/* The histograms of requests' times: the bucket of a time, and whether a
 * request counts as disturbed by copying.
 */

#include "base/clock.h"
#include "base/latency.h"
#include "test.h"

#define LATER (UINT64_C (1) << 62) /* than any clock will be */

static uint64_t
count (struct latency *latency, enum latency_kind kind, bool disturbed,
       unsigned bucket)
{
  return atomic_load (&latency->counts[kind][disturbed][bucket]);
}

/* The lower bound, which nbd_mirror/rules/pace.py assumes too. */
static uint64_t
lower_bound (unsigned bucket)
{
  return (UINT64_C (4) + bucket % 4) << (8 + bucket / 4);
}

static void
test_each_bound_is_its_buckets_first_time (void)
{
  static struct latency latency;

  for (unsigned i = 1; i < NBDM_LATENCY_BUCKETS; i++) {
    uint64_t start = LATER;

    latency_add (&latency, LATENCY_READ, start, start + lower_bound (i));
    assert (count (&latency, LATENCY_READ, false, i) == 1);
    latency_add (&latency, LATENCY_READ, start, start + lower_bound (i) - 1);
    assert (count (&latency, LATENCY_READ, false, i - 1) >= 1);
    assert (count (&latency, LATENCY_READ, false, i) == 1);
    memset (&latency, 0, sizeof latency);
  }
}

static void
test_extremes_are_in_the_outer_buckets (void)
{
  static struct latency latency;

  latency_add (&latency, LATENCY_LOCAL, LATER, LATER);
  latency_add (&latency, LATENCY_LOCAL, 1, UINT64_MAX);
  assert (count (&latency, LATENCY_LOCAL, false, 0) == 1);
  assert (count (&latency, LATENCY_LOCAL, false, NBDM_LATENCY_BUCKETS - 1)
          == 1);
  assert (count (&latency, LATENCY_READ, false, 0) == 0);
}

/* Whether a request met any copying, however many resyncs there are. */
static void
test_what_overlaps_copying_is_disturbed (void)
{
  static struct latency latency;
  uint64_t before = now_ns ();

  latency_add (&latency, LATENCY_MIRRORED, before, before);
  assert (count (&latency, LATENCY_MIRRORED, false, 0) == 1);
  latency_copying (&latency, true);
  latency_copying (&latency, true);
  latency_copying (&latency, false);
  latency_add (&latency, LATENCY_MIRRORED, LATER, LATER);
  assert (count (&latency, LATENCY_MIRRORED, true, 0) == 1);
  latency_copying (&latency, false);
  latency_add (&latency, LATENCY_MIRRORED, before, before); /* began in it */
  assert (count (&latency, LATENCY_MIRRORED, true, 0) == 2);
  latency_add (&latency, LATENCY_MIRRORED, LATER, LATER); /* well after */
  assert (count (&latency, LATENCY_MIRRORED, false, 0) == 2);
}

/* The copying still affects the threads: this is no baseline. */
static void
test_what_begins_just_after_copying_is_disturbed (void)
{
  static struct latency latency;
  uint64_t before, after;

  latency_copying (&latency, true);
  before = now_ns ();
  latency_copying (&latency, false);
  after = now_ns ();
  latency_add (&latency, LATENCY_READ, before + 1000000, before + 1000000);
  assert (count (&latency, LATENCY_READ, true, 0) == 1);
  latency_add (&latency, LATENCY_READ, after + 2000000, after + 2000000);
  assert (count (&latency, LATENCY_READ, false, 0) == 1);
}

int
main (void)
{
  RUN (test_each_bound_is_its_buckets_first_time);
  RUN (test_extremes_are_in_the_outer_buckets);
  RUN (test_what_overlaps_copying_is_disturbed);
  RUN (test_what_begins_just_after_copying_is_disturbed);
  return 0;
}
