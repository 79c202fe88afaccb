/* SPDX-License-Identifier: BSD-3-Clause */

/* Once a stop has begun no command changes a file: the next start is clean. */

#include "api.h"
#include "interrupted.h"

static struct bench bench;
static struct left created;

static int
connects (void)
{
  return nbdm_remote_connect (bench.volume, 1, bench.uri[0], 1000);
}

static int
admits (void)
{
  return nbdm_disk_admit (bench.volume, 1);
}

static int
compares (void)
{
  return nbdm_remote_compare (bench.volume, 1, 0);
}

static int
drops (void)
{
  nbdm_disk_drop (bench.volume, 1, "too late");
  return 0;
}

static int
explains (void)
{
  return nbdm_remote_explain (bench.volume, 1, "too late");
}

static int
fails (void)
{
  return nbdm_remote_fail (bench.volume, 1, "too late");
}

static int
resets (void)
{
  return nbdm_remote_reset (bench.volume, 1);
}

static int
pauses (void)
{
  return nbdm_remote_pause (bench.volume, 1, 1);
}

static int
invalidates (void)
{
  return nbdm_remote_invalidate (bench.volume, 1);
}

static int
releases (void)
{
  return nbdm_remote_release_late (bench.volume, 1);
}

static int
resyncs (void)
{
  struct nbdm_resync batch = { .max_bytes = 1u << 20, .pace.depth = 4 };

  return nbdm_disk_resync (bench.volume, 2, &batch);
}

static int
paces (void)
{
  struct nbdm_pace pace = { .depth = 1 };

  nbdm_disk_resync_pace (bench.volume, NBDM_LOCAL, &pace);
  return nbdm_disk_resync_pace (bench.volume, 1, &pace);
}

static int
attaches (void)
{
  return nbdm_local_attach (bench.volume, bench.local, 1);
}

static int
admits_local (void)
{
  return nbdm_disk_admit (bench.volume, NBDM_LOCAL);
}

static int
drops_local (void)
{
  return nbdm_disk_drop (bench.volume, NBDM_LOCAL, "too late");
}

static int
resyncs_local (void)
{
  struct nbdm_resync batch = { .max_bytes = 1u << 20, .pace.depth = 4 };

  return nbdm_disk_resync (bench.volume, NBDM_LOCAL, &batch);
}

static int
cools (void)
{
  return nbdm_cool (bench.volume, 0);
}

static int
switches (void)
{
  return nbdm_set_policy (bench.volume, NBDM_STOP, 0);
}

static int
writes_late (void)
{
  static const uint8_t buf[512];

  return nbdm_pwrite (bench.volume, buf, sizeof buf, 0, 0);
}

static int
trims_late (void)
{
  return nbdm_trim (bench.volume, BENCH_REGION, 0, 0);
}

static int
flushes_late (void)
{
  return nbdm_flush (bench.volume);
}

static int
stops_again (void)
{
  return nbdm_stop (bench.volume);
}

/* Every command, with its answer after a stop; 1: any answer, because the
 * command changes nothing.
 */
static const struct command_row {
  const char *name;
  int (*call) (void);
  int answer;
} commands[] = {
  { "connect", connects, -ESHUTDOWN },
  { "admit", admits, -ESHUTDOWN },
  { "compare", compares, 1 },
  { "drop", drops, 0 },
  { "explain", explains, 0 },
  { "fail", fails, -ESHUTDOWN },
  { "reset", resets, -ESHUTDOWN },
  { "pause", pauses, -ESHUTDOWN },
  { "invalidate", invalidates, -ESHUTDOWN },
  { "release_late", releases, 0 },
  { "resync", resyncs, -ENOTCONN },
  { "resync_pace", paces, 0 },
  { "local_attach", attaches, -ESHUTDOWN },
  { "local_admit", admits_local, -ESHUTDOWN },
  { "local_drop", drops_local, -ESHUTDOWN },
  { "local_resync", resyncs_local, -ESHUTDOWN },
  { "cool", cools, 0 },
  { "set_policy", switches, -ESHUTDOWN },
  { "write", writes_late, -ESHUTDOWN },
  { "trim", trims_late, -ESHUTDOWN },
  { "flush", flushes_late, -ESHUTDOWN },
  { "stop", stops_again, 0 },
};

static void (*life) (void);
static const struct command_row *row;

static void
all_is_well (void)
{
  assert (bench_open (&bench) == 0);
  bench_connect_all (&bench);
  bench_write (&bench, 3, 4, 2);
}

static void
one_is_behind (void)
{
  all_is_well ();
  nbdm_disk_drop (bench.volume, 2, "the test dropped it");
  bench_write (&bench, 3, 4, 3);
}

static void
one_has_failed (void)
{
  all_is_well ();
  assert (nbdm_remote_fail (bench.volume, 1, "another disk") == 0);
  bench_write (&bench, 3, 4, 3);
}

static void
local_is_attached (void)
{
  all_is_well ();
  assert (nbdm_local_attach (bench.volume, bench.local, 0) == 0);
}

static void
local_resyncs (void)
{
  local_is_attached ();
  assert (nbdm_disk_admit (bench.volume, NBDM_LOCAL) == 0);
}

static const struct {
  const char *name, *fault;
  void (*live) (void);
} stopped_lives[] = {
  { "well", NULL, all_is_well },
  { "one behind", NULL, one_is_behind },
  { "one failed", NULL, one_has_failed },
  { "local attached", "local_write:2=error", local_is_attached },
  { "local resyncing", "local_write:2=error", local_resyncs },
};

static void
commands_after_the_stop (void *opaque)
{
  int rc;

  (void)opaque;
  life ();
  assert (nbdm_stop (bench.volume) == 0);
  if (row) {
    rc = row->call ();
    if (row->answer <= 0 && rc != row->answer) {
      fprintf (stderr, "%s after the stop: %d\n", row->name, rc);
      _exit (1);
    }
  }
  nbdm_close (bench.volume);
}

/* Generations and times differ from run to run, so the files are not compared
 * byte by byte. Instead the next start must find nothing wrong, and the same as
 * a control.
 */
static void
starts_cleanly (void *opaque)
{
  struct nbdm_status status;
  struct nbdm_disk_status disks[NBDM_MAX_DISKS];
  char name[NBDM_NAME_LEN];

  (void)opaque;
  assert (nbdm_peek (bench.state, name, &status, disks, NULL) == 0);
  assert (status.clean);
  for (uint32_t i = 0; i < status.nr_remotes; i++)
    assert (!disks[1 + i].remote.paused);
  assert (bench_open (&bench) == 0);
  if (bench.board->found.reason[0]) {
    fprintf (stderr, "%s\n", bench.board->found.reason);
    _exit (1);
  }
}

static void
test_no_command_after_the_stop_changes_anything (void)
{
  size_t nr = sizeof commands / sizeof commands[0];

  for (unsigned i = 0; i < sizeof stopped_lives / sizeof stopped_lives[0];
       i++) {
    struct found control;

    life = stopped_lives[i].live;
    for (size_t k = 0; k <= nr; k++) {
      row = k > 0 ? &commands[k - 1] : NULL;
      bench_put (&bench, &created);
      bench_session (stopped_lives[i].fault, commands_after_the_stop);
      if (!passed (in_child (NULL, starts_cleanly, NULL))) {
        fprintf (stderr, "%s: %s after the stop is seen by the next start\n",
                 stopped_lives[i].name, row ? row->name : "nothing");
        abort ();
      }
      if (k == 0)
        control = bench.board->found;
      assert (memcmp (&control, &bench.board->found, sizeof control) == 0);
    }
  }
}

int
main (void)
{
  alarm (150); /* nothing here may hang */
  bench_make (&bench);
  bench_take (&bench, &created);
  RUN (test_no_command_after_the_stop_changes_anything);
  bench_free (&created);
  bench_remove (&bench);
  return 0;
}
