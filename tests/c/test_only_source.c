/* SPDX-License-Identifier: BSD-3-Clause */

/* After a kill in a takeover a remote alone has what it had answered and not
 * flushed: it is made durable, no flush is answered before that, and nothing
 * makes the remote lose its place.
 */

#define _GNU_SOURCE
#include "api.h"
#include "killed_takeover.h"

/* --- the cache is lost after the start ----------------------------------- */

/* A flush of local has failed, and the kill came before the remotes' flush: so
 * only the remotes have what they answered, and not durably.  Then these
 * sessions follow, the first with the fault; `fault` and `second` may be NULL.
 */
static void
run_after_failed_flush (const char *fault, void (*first) (void *),
                        void (*second) (void *))
{
  static const struct takeover flush_failed = { .failure = FLUSH };

  bench_make (&bench);
  assert (killed (in_child ("local_flush:3=error,takeover_marked=kill", live,
                            (void *)(uintptr_t)&flush_failed)));
  spoil_local (NR);
  assert (passed (in_child (fault, first, NULL)));
  if (second)
    assert (passed (in_child (NULL, second, NULL)));
  bench_check_disks (&bench);
  bench_remove (&bench);
}

static bool
all_is_flushed (void)
{
  uint64_t nr = 0;

  pthread_mutex_lock (&bench.volume->lock);
  for (uint32_t i = 0; i < BENCH_REMOTES; i++) {
    const struct bitmap *map = bench.volume->remotes[i].disk.dm.map;

    nr += map[MAP_UNFLUSHED0].nr_set + map[MAP_UNFLUSHED1].nr_set;
  }
  pthread_mutex_unlock (&bench.volume->lock);
  return nr == 0;
}

static void
lose_caches_and_mend (void)
{
  bench_servers (&bench, SERVERS_LOSE_CACHE);
  while (!every_remote_is_lost ())
    poll (NULL, 0, 1);
  bench_connect_all (&bench);
  bench_check_reads (&bench);
  bench_mend (&bench);
}

static void
start_and_lose_caches (void *opaque)
{
  (void)opaque;
  alarm (CHILD_S);
  bench.params.flush_ms = 10;
  bench_must (bench_open (&bench));
  bench_connect_all (&bench);
  while (!all_is_flushed ())
    poll (NULL, 0, 1);
  lose_caches_and_mend ();
}

/* A remote has the only copy of what it answered and did not flush: the next
 * start has it flushed, though no client asks for that.
 */
static void
test_cache_lost_after_the_start (void)
{
  run_after_failed_flush (NULL, start_and_lose_caches, NULL);
}

static bool
any_outstanding (void)
{
  struct nbdm_disk_status s = { 0 };

  for (uint32_t i = 0; i < BENCH_REMOTES && s.remote.outstanding == 0; i++)
    assert (nbdm_get_disk_status (bench.volume, i + 1, &s) == 0);
  return s.remote.outstanding > 0;
}

static void
start_and_be_cut_in_a_flush (void *opaque)
{
  (void)opaque;
  alarm (CHILD_S);
  bench.params.flush_ms = 10;
  bench_must (bench_open (&bench));
  bench_servers (&bench, SERVERS_HOLD);
  bench_connect_all (&bench);
  while (!any_outstanding ())
    poll (NULL, 0, 1);
  bench_servers (&bench, SERVERS_TAKE); /* and they lose nothing */
  while (!every_remote_is_lost ())
    poll (NULL, 0, 1);
  bench_stop (&bench);
}

/* The connection ends during that flush, and the server stops before a remote
 * is back.
 */
static void
test_cut_in_the_flush_after_the_start (void)
{
  run_after_failed_flush (NULL, start_and_be_cut_in_a_flush,
                          start_and_lose_caches);
}

/* --- a client flushes before a remote is back ---------------------------- */

static atomic_int flush_result;

static void *
flush_early (void *opaque)
{
  (void)opaque;
  flush_result = nbdm_flush (bench.volume);
  over = true;
  return NULL;
}

static bool
waits_for_a_remote (void)
{
  bool waits = false;

  pthread_mutex_lock (&bench.volume->lock);
  for (uint32_t i = 0; i < BENCH_REMOTES; i++)
    waits = waits || bench.volume->remotes[i].flush_sent.sleep > 0;
  pthread_mutex_unlock (&bench.volume->lock);
  return waits;
}

static void
start_and_flush_early (void *opaque)
{
  pthread_t thread;

  (void)opaque;
  alarm (CHILD_S);
  bench.params.flush_ms = UINT32_MAX; /* only the client flushes */
  bench_must (bench_open (&bench));
  assert (every_remote_is_held ());
  assert (pthread_create (&thread, NULL, flush_early, NULL) == 0);
  while (!waits_for_a_remote ())
    poll (NULL, 0, 1);
  bench_servers (&bench, SERVERS_HOLD);
  bench_connect_all (&bench);
  while (!over && !any_outstanding ())
    poll (NULL, 0, 1);
  assert (!over);
  bench_servers (&bench, SERVERS_GO);
  pthread_join (thread, NULL);
  assert (flush_result == 0);
  lose_caches_and_mend ();
}

/* Only the remotes have what they answered before the kill, and not durably:
 * their return alone does not answer the flush.
 */
static void
test_flush_before_a_remote_is_back (void)
{
  run_after_failed_flush (NULL, start_and_flush_early, NULL);
}

/* --- a client flushes while the source is away --------------------------- */

static void
wait_out_of_sync (uint32_t remote)
{
  struct nbdm_disk_status s;

  do {
    poll (NULL, 0, 1);
    assert (nbdm_get_disk_status (bench.volume, remote + 1, &s) == 0);
  } while (s.state != NBDM_OUT_OF_SYNC);
}

/* No flush is answered until the sources have made it durable. */
static void
flush_with_all_back (void)
{
  assert (nbdm_flush (bench.volume) == -EIO);
  bench_connect_all (&bench);
  assert (nbdm_flush (bench.volume) == 0);
  lose_caches_and_mend ();
}

static void
start_with_a_short_hold (void)
{
  alarm (CHILD_S);
  bench.params.flush_ms = UINT32_MAX; /* only the client flushes */
  bench.params.hold_ms = 100;
  bench_must (bench_open (&bench));
}

/* The hold ends before the flush, or during it. */
static void
start_and_flush_without_remotes (void *opaque)
{
  (void)opaque;
  start_with_a_short_hold ();
  assert (nbdm_flush (bench.volume) == -EIO);
  for (uint32_t i = 0; i < BENCH_REMOTES; i++)
    wait_out_of_sync (i);
  assert (nbdm_flush (bench.volume) == -EIO);
  flush_with_all_back ();
}

/* The second remote keeps what both have. */
static void
start_and_flush_without_the_source (void *opaque)
{
  (void)opaque;
  start_with_a_short_hold ();
  bench_connect (&bench, 0);
  wait_out_of_sync (1);
  assert (nbdm_flush (bench.volume) == -EIO);
  ASSERT_SAYS ("b alone has some of the data");
  nbdm_disk_drop (bench.volume, 1, "for the test");
  flush_with_all_back ();
}

static void
start_and_be_cut_in_a_clients_flush (void *opaque)
{
  pthread_t thread;

  (void)opaque;
  start_with_a_short_hold ();
  bench_servers (&bench, SERVERS_HOLD);
  bench_connect_all (&bench);
  assert (pthread_create (&thread, NULL, flush_early, NULL) == 0);
  bench_wait_outstanding (&bench, &over);
  bench_servers (&bench, SERVERS_TAKE); /* and they lose nothing */
  pthread_join (thread, NULL);
  assert (flush_result == -EIO);
  assert (every_remote_is_lost ());
  assert (nbdm_flush (bench.volume) == -EIO);
  flush_with_all_back ();
}

static void *
read_first (void *opaque)
{
  uint8_t buf[512];

  (void)opaque;
  bench_must (nbdm_pread (bench.volume, buf, sizeof buf, 0));
  over = true;
  return NULL;
}

/* Local cannot read a region that was copied back, and the remotes are lost
 * before they have flushed: nothing changes for the regions that local missed
 * before.
 */
static void
start_and_be_cut_in_a_takeover (void *opaque)
{
  struct nbdm_resync batch
      = { .max_bytes = BENCH_REGION, .pace.copy_bytes = BENCH_REGION };
  pthread_t thread;

  (void)opaque;
  start_with_a_short_hold ();
  bench_connect_all (&bench);
  bench_must (nbdm_disk_resync (bench.volume, NBDM_LOCAL, &batch));
  bench_servers (&bench, SERVERS_HOLD);
  assert (pthread_create (&thread, NULL, read_first, NULL) == 0);
  bench_wait_outstanding (&bench, &over);
  bench_servers (&bench, SERVERS_TAKE);
  pthread_join (thread, NULL);
  assert (every_remote_is_lost ());
  flush_with_all_back ();
}

/* A flush that covers what only a remote has fails while that remote is lost,
 * though all other disks have flushed.
 */
static void
test_flush_while_the_source_is_away (void)
{
  run_after_failed_flush (NULL, start_and_flush_without_remotes, NULL);
  run_after_failed_flush (NULL, start_and_flush_without_the_source, NULL);
  run_after_failed_flush (NULL, start_and_be_cut_in_a_clients_flush, NULL);
  run_after_failed_flush ("local_read:1=error,local_read:2=error",
                          start_and_be_cut_in_a_takeover, NULL);
}

/* --- local is away at the next start ------------------------------------- */

static void
start_without_local (void *opaque)
{
  char away[100];

  (void)opaque;
  alarm (CHILD_S);
  snprintf (away, sizeof away, "%s.away", bench.local);
  assert (rename (bench.local, away) == 0);
  assert (bench_open (&bench) == 0);
  assert (bench.board->found.local_state == NBDM_LOCAL_FAILED);
  bench_connect_all (&bench);
  bench_check_reads (&bench);
  assert (rename (away, bench.local) == 0);
  bench_mend (&bench);
}

/* Local could not read a region, and then it was gone: what it had not flushed
 * may be lost with it, and the remotes have all of it.
 */
static void
test_local_away_at_the_next_start (void)
{
  static const struct takeover read_failed = { .failure = READ };

  bench_make (&bench);
  assert (killed (
      in_child ("local_read:1=error,local_read:2=error,takeover_marked=kill",
                live, (void *)(uintptr_t)&read_failed)));
  spoil_local (NR);
  assert (passed (in_child (NULL, start_without_local, NULL)));
  bench_check_disks (&bench);
  bench_remove (&bench);
}

int
main (int argc, char *argv[])
{
  if (argc < 2 || strcmp (argv[1], "cache_lost_after_the_start") == 0)
    RUN (test_cache_lost_after_the_start);
  if (argc < 2 || strcmp (argv[1], "cut_in_the_flush_after_the_start") == 0)
    RUN (test_cut_in_the_flush_after_the_start);
  if (argc < 2 || strcmp (argv[1], "flush_before_a_remote_is_back") == 0)
    RUN (test_flush_before_a_remote_is_back);
  if (argc < 2 || strcmp (argv[1], "flush_while_the_source_is_away") == 0)
    RUN (test_flush_while_the_source_is_away);
  if (argc < 2 || strcmp (argv[1], "local_away_at_the_next_start") == 0)
    RUN (test_local_away_at_the_next_start);
  return 0;
}
