/* SPDX-License-Identifier: BSD-3-Clause */

/* Local fails, and the process is killed before a remote has taken its place.
 * The remotes lose their caches before the kill or after it, or keep them; what
 * was answered is still there.
 */

#define _GNU_SOURCE
#include "api.h"
#include "volume/flush.h"
#include "interrupted.h"

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

#define CHILD_S 60 /* nothing here may hang */
#define FIRST 3u   /* regions that are written last */
#define NR 4u
#define LAST 8u /* one whose write fails */

static struct bench bench;

/* In the first local has a write that no remote has durably; in the others
 * local is not to be believed.
 */
enum failure { WRITE, FLUSH, CLIENTS_FLUSH, BESIDE_ITS_LEG, READ };
enum loss { KEPT, LOST_BEFORE, LOST_AFTER };

static const struct takeover {
  const char *name;
  enum failure failure;
  enum loss loss; /* of the remotes' caches, seen from the kill */
  const char *fault;
} takeovers[] = {
  { "write_failed", WRITE, KEPT, "local_write:11=error,takeover_marked=kill" },
  { "write_failed_lost_after", WRITE, LOST_AFTER,
    "local_write:11=error,takeover_marked=kill" },
  { "write_failed_one_map_emptied", WRITE, LOST_BEFORE,
    "local_write:11=error,lost_merged:1=kill" },
  { "write_failed_lost", WRITE, LOST_BEFORE,
    "local_write:11=error,lost_merged:4=kill" },
  { "write_failed_taking_back", WRITE, LOST_BEFORE,
    "local_write:11=error,takeover_taking_back=kill" },
  { "write_failed_taken_back", WRITE, LOST_BEFORE,
    "local_write:11=error,takeover_done=kill" },
  { "flush_failed", FLUSH, KEPT, "local_flush:3=error,takeover_marked=kill" },
  { "flush_failed_taking_back", FLUSH, LOST_BEFORE,
    "local_flush:3=error,takeover_taking_back=kill" },
  { "flush_failed_taken_back", FLUSH, LOST_BEFORE,
    "local_flush:3=error,takeover_done=kill" },
  { "clients_flush_failed", CLIENTS_FLUSH, KEPT,
    "local_flush:3=error,takeover_marked=kill" },
  { "flush_failed_beside_its_leg", BESIDE_ITS_LEG, KEPT,
    "local_flush:3=error,takeover_marked=kill" },
  { "read_failed", READ, KEPT,
    "local_read:1=error,local_read:2=error,takeover_marked=kill" },
};

static atomic_bool over;

static void *
fail (void *opaque)
{
  const struct takeover *takeover = opaque;
  uint8_t buf[512];

  if (takeover->failure == READ)
    nbdm_pread (bench.volume, buf, sizeof buf, FIRST * BENCH_REGION);
  else if (takeover->failure == CLIENTS_FLUSH)
    nbdm_flush (bench.volume);
  else {
    /* With FUA only its own bytes are made durable on the remotes. */
    memset (buf, 3, sizeof buf);
    bench.board->pending[LAST] = 3;
    nbdm_pwrite (bench.volume, buf, sizeof buf, LAST * BENCH_REGION,
                 takeover->failure == WRITE ? 0 : NBDM_FUA);
  }
  over = true;
  return NULL;
}

static void
live (void *opaque)
{
  const struct takeover *takeover = opaque;
  pthread_t thread;

  alarm (CHILD_S);
  bench_must (bench_open (&bench));
  bench_connect_all (&bench);
  bench_write (&bench, 0, 6, 1);
  bench_must (nbdm_flush (bench.volume));
  bench_write (&bench, FIRST, NR, 2); /* answered, and nowhere flushed */
  if (takeover->loss == LOST_BEFORE || takeover->failure == CLIENTS_FLUSH)
    bench_servers (&bench, SERVERS_HOLD);
  if (takeover->failure == BESIDE_ITS_LEG)
    bench_servers (&bench, SERVERS_HOLD_ALL);
  assert (pthread_create (&thread, NULL, fail, (void *)takeover) == 0);
  if (takeover->loss == LOST_BEFORE) { /* over the takeover's flush */
    bench_wait_outstanding (&bench, &over);
    bench_servers (&bench, SERVERS_LOSE_CACHE);
  }
  pthread_join (thread, NULL);
}

static void
start (void *opaque)
{
  (void)opaque;
  alarm (CHILD_S);
  bench_open_and_mend (&bench);
}

/* It has lost what it could not flush, or cannot read. */
static void
spoil_local (unsigned nr)
{
  int fd = open (bench.local, O_WRONLY | O_CLOEXEC);
  uint8_t old[512];

  memset (old, 1, sizeof old);
  assert (fd >= 0);
  for (unsigned i = FIRST; i < FIRST + nr; i++)
    assert (pwrite (fd, old, sizeof old, i * BENCH_REGION) == sizeof old);
  close (fd);
}

static void
run (const struct takeover *takeover)
{
  printf ("%s\n", takeover->name);
  fflush (stdout);
  bench_make (&bench);
  assert (killed (in_child (takeover->fault, live, (void *)takeover)));
  if (takeover->loss == LOST_AFTER)
    bench_servers (&bench, SERVERS_LOSE_CACHE);
  bench_servers (&bench, SERVERS_GO);
  if (takeover->failure != WRITE && takeover->loss == KEPT)
    spoil_local (takeover->failure == READ ? 1 : NR);
  assert (passed (in_child (NULL, start, NULL)));
  bench_check_disks (&bench);
  bench_remove (&bench);
}

/* The next start is killed too, and local has lost what it could not flush:
 * what no remote has durably is not read from local then.
 */
static void
test_flush_of_the_next_start (void)
{
  static const char *const faults[]
      = { "local_flush:1=error,open_local_flushed=kill", "local_flush:1=kill" };

  for (unsigned i = 0; i < sizeof faults / sizeof faults[0]; i++) {
    bench_make (&bench);
    assert (killed (
        in_child (takeovers[0].fault, live, (void *)(uintptr_t)&takeovers[0])));
    assert (killed (in_child (faults[i], start, NULL)));
    spoil_local (NR);
    assert (passed (in_child (NULL, start, NULL)));
    bench_check_disks (&bench);
    bench_remove (&bench);
  }
}

/* --- a remote that has failed ------------------------------------------- */

/* It has flushed what the other one, which takes local's place, has not. */
static void
live_beside_a_failed_remote (void *opaque)
{
  (void)opaque;
  alarm (CHILD_S);
  bench_must (bench_open (&bench));
  bench_connect_all (&bench);
  bench_write (&bench, 0, 6, 1);
  bench_must (nbdm_flush (bench.volume));
  bench_write (&bench, FIRST, NR, 2);
  assert (remote_flush_alone (&bench.volume->remotes[1]));
  bench_must (nbdm_remote_fail (bench.volume, 2, "another disk"));
  nbdm_flush (bench.volume);
}

static void
read_beside_a_failed_remote (void *opaque)
{
  (void)opaque;
  alarm (CHILD_S);
  assert (bench_open (&bench) == 0);
  bench_connect (&bench, 0);
  bench_check_reads (&bench);
}

/* The next start does not leave the failed one as the only source. */
static void
test_beside_a_failed_remote (void)
{
  bench_make (&bench);
  assert (killed (in_child ("local_flush:3=error,takeover_marked=kill",
                            live_beside_a_failed_remote, NULL)));
  spoil_local (NR);
  assert (passed (in_child (NULL, read_beside_a_failed_remote, NULL)));
  bench_remove (&bench);
}

/* --- no remote is connected --------------------------------------------- */

static void *
flush (void *opaque)
{
  (void)opaque;
  nbdm_flush (bench.volume);
  return NULL;
}

static bool
every_remote_is_held (void)
{
  struct nbdm_disk_status s = { .state = NBDM_HOLDING };

  for (uint32_t i = 0; i < BENCH_REMOTES && s.state == NBDM_HOLDING; i++)
    assert (nbdm_get_disk_status (bench.volume, i + 1, &s) == 0);
  return s.state == NBDM_HOLDING;
}

static bool
every_remote_is_lost (void)
{
  bool lost = true;

  pthread_mutex_lock (&bench.volume->lock);
  for (uint32_t i = 0; i < BENCH_REMOTES; i++)
    lost = lost && bench.volume->remotes[i].conn == NULL;
  pthread_mutex_unlock (&bench.volume->lock);
  return lost;
}

/* The remotes have flushed what local loses. */
static void
live_while_remotes_are_held (void *opaque)
{
  struct nbdm_disk_status local = { 0 };
  pthread_t thread;

  (void)opaque;
  alarm (CHILD_S);
  bench_must (bench_open (&bench));
  bench_connect_all (&bench);
  bench_write (&bench, 0, 6, 1);
  bench_must (nbdm_flush (bench.volume));
  bench_write (&bench, FIRST, NR, 2);
  for (uint32_t i = 0; i < BENCH_REMOTES; i++)
    assert (remote_flush_alone (&bench.volume->remotes[i]));
  bench_servers (&bench, SERVERS_LOSE_CACHE); /* which is empty */
  while (!every_remote_is_held ())
    poll (NULL, 0, 1);
  assert (pthread_create (&thread, NULL, flush, NULL) == 0);
  while (local.local.errors == 0) {
    assert (nbdm_get_disk_status (bench.volume, NBDM_LOCAL, &local) == 0);
    poll (NULL, 0, 1);
  }
  raise (SIGKILL);
}

/* No remote could take local's place yet.  The next start knows that local may
 * have lost what no flush has covered, and makes the remotes equal to it.
 */
static void
test_while_remotes_are_held (void)
{
  bench_make (&bench);
  assert (killed (
      in_child ("local_flush:3=error", live_while_remotes_are_held, NULL)));
  spoil_local (NR);
  memset (&bench.board->answered[FIRST], 1, NR); /* and no flush was answered */
  assert (passed (in_child (NULL, start, NULL)));
  bench_check_disks (&bench);
  bench_remove (&bench);
}

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
  for (unsigned i = 0; i < sizeof takeovers / sizeof takeovers[0]; i++)
    if (argc < 2 || strcmp (argv[1], takeovers[i].name) == 0)
      run (&takeovers[i]);
  if (argc < 2 || strcmp (argv[1], "flush_of_the_next_start") == 0)
    RUN (test_flush_of_the_next_start);
  if (argc < 2 || strcmp (argv[1], "beside_a_failed_remote") == 0)
    RUN (test_beside_a_failed_remote);
  if (argc < 2 || strcmp (argv[1], "while_remotes_are_held") == 0)
    RUN (test_while_remotes_are_held);
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
