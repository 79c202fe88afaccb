/* SPDX-License-Identifier: BSD-3-Clause */

/* Two remotes whose addresses were exchanged are known by these, whatever a
 * sample would have found; so is the address of one that was left out.
 */

#include "api.h"
#include "interrupted.h"

static struct bench bench;
static struct left created;

static void
mends (void *opaque)
{
  (void)opaque;
  bench_open_and_mend (&bench);
}

static void
exchange_uris (void)
{
  char kept[sizeof bench.uri[0]];

  memcpy (kept, bench.uri[0], sizeof kept);
  memcpy (bench.uri[0], bench.uri[1], sizeof kept);
  memcpy (bench.uri[1], kept, sizeof kept);
}

static void
leaves_b_behind (void *opaque)
{
  (void)opaque;
  assert (bench_open (&bench) == 0);
  bench_connect_all (&bench);
  bench_write (&bench, 0, 6, 1);
  nbdm_disk_drop (bench.volume, 2, "the test dropped it");
  bench_write (&bench, 3, 8, 2);
  bench_stop (&bench);
}

static void
all_is_copied_to_a (void *opaque)
{
  struct nbdm_disk_status status;

  (void)opaque;
  assert (bench_open (&bench) == 0);
  bench_connect (&bench, 0);
  assert (nbdm_get_disk_status (bench.volume, 1, &status) == 0);
  assert (status.state == NBDM_RESYNCING);
  assert (status.dirty_regions == BENCH_REGIONS);
  bench_stop (&bench);
}

static unsigned first_connected;

static void
mends_in_this_order (void *opaque)
{
  (void)opaque;
  assert (bench_open (&bench) == 0);
  bench_connect (&bench, first_connected);
  bench_connect (&bench, 1 - first_connected);
  bench_check_reads (&bench);
  bench_mend (&bench);
}

/* Killed as soon as the first one is connected, whatever was copied then. */
static void
connects_one (void *opaque)
{
  (void)opaque;
  assert (bench_open (&bench) == 0);
  bench_connect (&bench, first_connected);
}

static void
test_exchanged_addresses_are_known (void)
{
  for (unsigned i = 0; i < 4; i++) {
    bench_put (&bench, &created);
    bench_session (NULL, leaves_b_behind);
    exchange_uris ();
    first_connected = i & 1;
    if (i & 2)
      bench_session (NULL, connects_one);
    bench_session (NULL, mends_in_this_order);
    bench_check_disks (&bench);
    exchange_uris ();
  }
}

/* The addresses are corrected while it is served: no start looks at them. */
static void
exchanges_while_served (void *opaque)
{
  leaves_b_behind (opaque);
  assert (bench_open (&bench) == 0);
  bench_connect_all (&bench);
  for (uint32_t i = 0; i < 2; i++)
    nbdm_disk_drop (bench.volume, i + 1, "the test dropped it");
  exchange_uris ();
  bench_connect_all (&bench);
  bench_mend (&bench);
}

static void
test_addresses_exchanged_while_served_are_known (void)
{
  bench_put (&bench, &created);
  bench_session (NULL, exchanges_while_served);
  bench_check_disks (&bench);
}

static void
leaves_b_behind_a_alone (void *opaque)
{
  (void)opaque;
  assert (bench_open (&bench) == 0);
  bench_connect_all (&bench);
  bench_write (&bench, 0, 6, 1); /* the first one fails on local */
  nbdm_disk_drop (bench.volume, 2, "the test dropped it");
  bench_write (&bench, 3, 8, 2);
  bench_stop (&bench);
}

static void
is_not_used_there (void *opaque)
{
  (void)opaque;
  assert (bench_open (&bench) == 0);
  for (uint32_t i = 0; i < 2; i++) {
    assert (nbdm_remote_connect (bench.volume, i + 1, bench.uri[i], 10000)
            == -EINVAL);
    ASSERT_SAYS ("the local disk is not ok");
    ASSERT_SAYS ("exchange the addresses back");
  }
  bench_stop (&bench);
}

/* Where a remote is the only source an older disk would be served instead. */
static void
test_exchanged_addresses_are_refused_while_local_is_not_ok (void)
{
  bench_put (&bench, &created);
  bench_session ("local_write:1=error", leaves_b_behind_a_alone);
  exchange_uris ();
  bench_session (NULL, is_not_used_there);
  exchange_uris ();
  bench_session (NULL, mends);
  bench_check_disks (&bench);
}

static void
opens_and_stops (void *opaque)
{
  (void)opaque;
  if (bench_open (&bench) == 0)
    bench_stop (&bench);
}

/* b leaves the configuration, and a is given its address by mistake: in the
 * session in which b left, or in a later one.  The one in which b left may not
 * even have begun.
 */
static void
test_address_of_one_that_was_left_out_is_known (void)
{
  static const char *const between[] = { NULL,
                                         "",
                                         "open_recovered=kill",
                                         "superblock_write=error",
                                         "superblock_sync=error",
                                         "superblock_synced=kill",
                                         "begin_superblock=kill",
                                         "open_begun=kill" };
  struct nbdm_params kept = bench.params;

  for (unsigned i = 0; i < sizeof between / sizeof between[0]; i++) {
    bench_put (&bench, &created);
    bench_session (NULL, leaves_b_behind);
    bench.params.nr_remotes = 1;
    if (between[i])
      (void)in_child (between[i][0] ? between[i] : NULL, opens_and_stops, NULL);
    exchange_uris ();
    bench_session (NULL, all_is_copied_to_a);
    exchange_uris ();
    bench.params = kept;
    bench_session (NULL, mends);
    bench_check_disks (&bench);
  }
}

static void
connects_a (void *opaque)
{
  (void)opaque;
  assert (bench_open (&bench) == 0);
  bench_connect (&bench, 0);
  bench_write (&bench, 3, 2, 3);
  bench_stop (&bench);
}

static void
nothing_is_dirty_on_a (void)
{
  struct nbdm_disk_status status;

  assert (nbdm_get_disk_status (bench.volume, 1, &status) == 0);
  assert (status.state == NBDM_IN_SYNC && status.dirty_regions == 0);
}

static void
nothing_is_copied_to_a (void *opaque)
{
  (void)opaque;
  assert (bench_open (&bench) == 0);
  bench_connect (&bench, 0);
  nothing_is_dirty_on_a ();
  bench_stop (&bench);
}

static int
copies (void)
{
  struct nbdm_resync batch = { .max_bytes = UINT64_MAX, .pace.depth = 4 };

  bench_must (nbdm_remote_release_late (bench.volume, 1));
  return nbdm_disk_resync (bench.volume, 1, &batch);
}

static void
copies_to_a (void *opaque)
{
  (void)opaque;
  assert (bench_open (&bench) == 0);
  bench_connect (&bench, 0);
  bench_must (copies ());
  nothing_is_dirty_on_a ();
  bench_stop (&bench);
}

/* Once it is a's own again, the address is no news any more. */
static void
test_address_that_was_left_out_is_copied_to_once (void)
{
  struct nbdm_params kept = bench.params;

  bench_put (&bench, &created);
  bench_session (NULL, leaves_b_behind);
  bench.params.nr_remotes = 1;
  bench_session (NULL, connects_a);
  exchange_uris ();
  bench_session (NULL, copies_to_a);
  bench_session (NULL, nothing_is_copied_to_a);
  exchange_uris ();
  bench.params = kept;
}

/* The address of b's disk as it is spelled for its nth life. */
static void
spell_uri (char uri[sizeof bench.uri[0]], unsigned nth)
{
  const char *path = strchr (uri, '=') + 1;
  char spelled[sizeof bench.uri[0]];

  snprintf (spelled, sizeof spelled, "%.*s/%.*s%s", (int)(path - uri), uri,
            (int)nth, "////////////////", path + 1);
  memcpy (uri, spelled, sizeof spelled);
}

/* Nine remotes leave, one after the other: the latest eight are remembered. */
static void
test_as_many_that_were_left_out_are_known_as_there_is_room (void)
{
  static char names[LAYOUT_MAX_LEFT_OUT + 1][8];
  struct nbdm_params kept = bench.params;
  char uris[2][sizeof bench.uri[0]];

  memcpy (uris, bench.uri, sizeof uris);
  bench_put (&bench, &created);
  for (unsigned i = 0; i <= LAYOUT_MAX_LEFT_OUT; i++) {
    snprintf (names[i], sizeof names[i], "b%u", i);
    bench.params.remotes[1].name = names[i];
    memcpy (bench.uri[1], uris[1], sizeof uris[1]);
    spell_uri (bench.uri[1], i);
    bench_session (NULL, mends);
  }
  bench.params.nr_remotes = 1;
  bench_session (NULL, opens_and_stops);
  for (unsigned i = 0; i <= LAYOUT_MAX_LEFT_OUT; i++) {
    memcpy (bench.uri[0], uris[1], sizeof uris[1]);
    spell_uri (bench.uri[0], i);
    bench_session (NULL, i == 0 ? nothing_is_copied_to_a : all_is_copied_to_a);
    bench_session (NULL, copies_to_a);
  }
  memcpy (bench.uri, uris, sizeof uris);
  bench.params = kept;
}

int
main (void)
{
  alarm (150); /* nothing here may hang */
  bench_make (&bench);
  bench_take (&bench, &created);
  RUN (test_exchanged_addresses_are_known);
  RUN (test_addresses_exchanged_while_served_are_known);
  RUN (test_exchanged_addresses_are_refused_while_local_is_not_ok);
  RUN (test_address_of_one_that_was_left_out_is_known);
  RUN (test_address_that_was_left_out_is_copied_to_once);
  RUN (test_as_many_that_were_left_out_are_known_as_there_is_room);
  bench_free (&created);
  bench_remove (&bench);
  return 0;
}
