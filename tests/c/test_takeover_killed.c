/* SPDX-License-Identifier: BSD-3-Clause */

/* Local fails, and the process is killed before a remote has taken its place.
 * The remotes lose their caches before the kill or after it, or keep them; what
 * was answered is still there.
 */

#define _GNU_SOURCE
#include "api.h"
#include "volume/flush.h"
#include "killed_takeover.h"

static const struct takeover takeovers[] = {
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

static void
start (void *opaque)
{
  (void)opaque;
  alarm (CHILD_S);
  bench_open_and_mend (&bench);
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
  return 0;
}
