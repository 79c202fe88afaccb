/* SPDX-License-Identifier: BSD-3-Clause */

/* Starts that do not end, one after the other, from every state of a volume:
 * each start is killed or fails at a fault point, the next one as well, at
 * every pair of points, and then one goes through. That one must find all
 * answered writes, read nothing old, leave a source of every region, and come
 * in sync with equal disks; where the page cache survived, it must not find
 * more dirty than a first start would.
 *
 * States: all well; a remote behind; local failed, each remote the only source
 * of some regions; local resyncing, with it and a remote the only source of
 * some; a takeover that failed. Each volume is stopped, or killed in
 * the middle of a write, with or without a loss of power, of the remotes'
 * caches, and of a log.
 *
 * All pairs are many thousands: a seeded choice of them is tried, and with
 * NBDM_INTERRUPTED=all every one.
 */

#include "api.h"
#include "interrupted.h"
#include "lives.h"

#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <time.h>

#define MAX_FAULTS 600u
#define CHILD_S 60 /* nothing here may hang */
#define BUDGET_S                                                               \
  20 /* for each part of what is chosen; with a seed all is done */

static struct bench bench;

/* --- harm ---------------------------------------------------------------- */

/* The logs that are lost; without two maps the newest data is not known. */
static const struct harm {
  const char *name, *file[2];
} harms[] = {
  { "nothing lost", { NULL, NULL } },
  { "no activity", { "activity", NULL } },
  { "no inflight", { "inflight", NULL } },
  { "no dirty.local", { "dirty.local", NULL } },
  { "no dirty.a", { "dirty.a", NULL } },
  { "no dirty.b", { "dirty.b", NULL } },
  { "no dirty.local and no dirty.a", { "dirty.local", "dirty.a" } },
  { "no dirty.a and no dirty.b", { "dirty.a", "dirty.b" } },
};
#define NR_HARMS (sizeof harms / sizeof harms[0])

static void
do_harm (const struct harm *harm)
{
  struct folder folder = { .fd = bench.dirfd };

  for (unsigned i = 0; i < 2; i++)
    if (harm->file[i])
      garble (&folder, harm->file[i], 40);
}

/* --- a case: where the starts begin ----------------------------------------
 */

static struct {
  const struct life *life;
  const struct harm *harm;
  bool stopped, rebooted, caches_lost;
  const char *broken; /* or ended by this fault */
  struct left left;
  struct found control; /* by a start that nothing interrupts */
  char fault[MAX_FAULTS][48];
  unsigned nr_faults;
} now;

static unsigned nr_starts, nr_refused, nr_runs;

static void
live (void *opaque)
{
  (void)opaque;
  alarm (CHILD_S);
  now.life->live (&bench, now.stopped);
}

static void
open_only (void *opaque)
{
  (void)opaque;
  alarm (CHILD_S);
  _exit (bench_open (&bench) < 0);
}

static bool
any_connected (void)
{
  bool connected = false;

  pthread_mutex_lock (&bench.volume->lock);
  for (uint32_t i = 0; i < BENCH_REMOTES; i++)
    connected = connected || bench.volume->remotes[i].conn;
  pthread_mutex_unlock (&bench.volume->lock);
  return connected;
}

/* What an answered flush covers outlives the remotes' caches. */
static void
lose_caches_after_a_flush (void)
{
  if (nbdm_flush (bench.volume) < 0)
    _exit (1);
  bench_servers (&bench, SERVERS_LOSE_CACHE);
  while (any_connected ())
    poll (NULL, 0, 1);
  bench_connect_all (&bench);
  bench_check_reads (&bench);
}

/* The start that goes through; 2: refused. */
static void
go_through (void *opaque)
{
  int rc;

  (void)opaque;
  alarm (CHILD_S);
  rc = bench_open (&bench);
  if (rc == -ENOTRECOVERABLE)
    _exit (2);
  if (rc < 0) {
    fprintf (stderr, "open: %s\n", bench.board->found.reason);
    _exit (1);
  }
  for (uint32_t i = 0; i < BENCH_REMOTES; i++) { /* an operator resumes them */
    bench_must (nbdm_remote_reset (bench.volume, i + 1));
    bench_must (nbdm_remote_pause (bench.volume, i + 1, 0));
    bench_connect (&bench, i);
  }
  bench.local_went_away
      = now.control.local_state == NBDM_LOCAL_RESYNCING
        && bench.board->found.local_state == NBDM_LOCAL_FAILED;
  bench_check_reads (&bench);
  if (nr_runs % 8 == 0) /* it takes longer than all the rest */
    lose_caches_after_a_flush ();
  bench.local_went_away = false;
  bench_mend (&bench);
}

static bool
may_be_refused (void)
{
  return !now.life->local_ok && now.harm->file[1];
}

static void __attribute__ ((noreturn))
condemn (const char *const *faults, unsigned nr, const char *what)
{
  fprintf (stderr, "%s, %s%s%s, %s", now.life->name,
           now.broken    ? now.broken
           : now.stopped ? "stopped"
                         : "killed",
           now.rebooted ? ", power lost" : "",
           now.caches_lost ? ", the remotes' caches lost" : "", now.harm->name);
  for (unsigned i = 0; i < nr; i++)
    fprintf (stderr, "; %s", faults[i]);
  fprintf (stderr, ": %s\n", what);
  bench_remove (&bench);
  exit (1);
}

/* The result must be that of a start that nothing interrupted. One exception:
 * after a clean stop and a loss of power more is late, because the superblock
 * does not vouch for logs that are newer than it.
 */
static bool
found_the_same (void)
{
  const struct found *found = &bench.board->found, *control = &now.control;
  bool same = found->rc == control->rc
              && found->local_state == control->local_state
              && found->local_dirty == control->local_dirty;

  for (uint32_t i = 0; i < BENCH_REMOTES; i++)
    same = same && found->dirty[i] == control->dirty[i]
           && (found->late[i] == control->late[i]
               || (now.stopped && now.rebooted));
  return same;
}

/* Is the start killed while it flushes a local disk that is copied back?  The
 * next one believes nothing of that disk.
 */
static bool
ends_in_flush (const char *fault)
{
  return now.control.local_state == NBDM_LOCAL_RESYNCING
         && strncmp (fault, "local_flush", strlen ("local_flush")) == 0;
}

/* A kill in a takeover leaves the newest writes in two caches: local's page
 * cache and the remotes'.  If the remotes lost theirs, and the next start was
 * killed, or failed, in its flush of local, nobody knows whether local still
 * has them (GUARANTEES.md).  Disks that agree and reads that stay the same are
 * what is left to ask for.
 */
static bool
loses_both (const char *fault)
{
  return (now.caches_lost || now.life->loses_caches)
         && left_in_takeover (&now.left)
         && strncmp (fault, "local_flush", strlen ("local_flush")) == 0;
}

static void
print_found (const char *what, const struct found *found)
{
  fprintf (stderr, "%s: local %u, missing %" PRIu64, what, found->local_state,
           found->local_dirty);
  for (uint32_t i = 0; i < BENCH_REMOTES; i++)
    fprintf (stderr, "; dirty %" PRIu64 ", late %" PRIu64, found->dirty[i],
             found->late[i]);
  fprintf (stderr, "; %s\n", found->reason);
}

static void
run (const char *const *faults, unsigned nr)
{
  bool exact = true; /* as long as the page cache is believed */
  int status;

  bench_put (&bench, &now.left);
  bench.both_may_have_lost = false;
  for (unsigned i = 0; i < nr; i++) {
    bench.both_may_have_lost
        = bench.both_may_have_lost || loses_both (faults[i]);
    status = in_child (faults[i], open_only, NULL);
    if (!killed (status) && !WIFEXITED (status))
      condemn (faults, nr, "it crashed");
    exact = exact && killed (status) && !ends_in_flush (faults[i]);
    nr_starts++;
  }
  status = in_child (NULL, go_through, NULL);
  nr_runs++;
  if (WIFEXITED (status) && WEXITSTATUS (status) == 2) {
    if (!may_be_refused ())
      condemn (faults, nr, bench.board->found.reason);
    nr_refused++;
    return;
  }
  if (may_be_refused ())
    condemn (faults, nr, "it guessed which disk has the newest data");
  if (!passed (status))
    condemn (faults, nr, "it is not recovered");
  bench_check_disks (&bench);
  if (nr == 0)
    now.control = bench.board->found;
  else if (exact && !now.broken && !now.harm->file[0] && !found_the_same ()) {
    print_found ("first", &now.control);
    print_found ("now", &bench.board->found);
    condemn (faults, nr, "it found something else than a first start");
  }
}

/* --- the points of a start --------------------------------------------------
 */

static void
note_faults (const char *folder)
{
  const char *point;
  int fails;

  now.nr_faults = 0;
  for (uint32_t i = 0; (point = nbdm_fault_point (i, &fails)); i++) {
    char path[160];
    struct stat st;

    snprintf (path, sizeof path, "%s/%s.reached", folder, point);
    if (stat (path, &st) < 0)
      continue;
    /* All passes of a start; of a session's, which passes some points often,
     * the last six.
     */
    for (off_t nth = st.st_size > 6 ? st.st_size - 5 : 1; nth <= st.st_size;
         nth++)
      for (int error = 0; error <= fails; error++) {
        assert (now.nr_faults < MAX_FAULTS);
        snprintf (now.fault[now.nr_faults++], sizeof now.fault[0], "%s:%d=%s",
                  point, (int)nth, error ? "error" : "kill");
      }
    unlink (path);
  }
}

/* Have every fault point count how often `body` passes it; `body` begins with
 * the last session's files.
 */
static void
find_faults (const struct left *left, const char *own, void (*body) (void *))
{
  static char fault[16384];
  char folder[100];
  const char *point;
  size_t at = 0;
  int fails, fd;

  snprintf (folder, sizeof folder, "%s/points", bench.dir);
  assert (mkdir (folder, 0700) == 0 || errno == EEXIST);
  if (own)
    at = (size_t)snprintf (fault, sizeof fault, "%s", own);
  for (uint32_t i = 0; (point = nbdm_fault_point (i, &fails)); i++) {
    char path[160];

    snprintf (path, sizeof path, "%s/%s", folder, point);
    fd = open (path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
    assert (fd >= 0);
    close (fd);
    at += (size_t)snprintf (fault + at, sizeof fault - at, "%s%s=wait:%s",
                            at ? "," : "", point, path);
    assert (at < sizeof fault);
  }
  bench_put (&bench, left);
  (void)in_child (fault, body, NULL);
  note_faults (folder);
}

/* The power of the primary, or the remotes' caches. */
static void
what_else_is_lost (void)
{
  if (now.rebooted)
    bench_reboot (&bench);
  if (now.caches_lost)
    bench_servers (&bench, SERVERS_LOSE_CACHE);
}

static void
begin_case (const struct left *created, const struct life *life,
            const struct harm *harm, bool stopped, bool rebooted,
            bool caches_lost)
{
  char fault[100];
  int status;

  now = (__typeof__ (now)){ .life = life,
                            .harm = harm,
                            .stopped = stopped,
                            .rebooted = rebooted,
                            .caches_lost = caches_lost };
  snprintf (fault, sizeof fault, "%s%s%s", life->fault ? life->fault : "",
            life->fault && !stopped ? "," : "",
            stopped ? "" : "after_issue:15=kill");
  bench_put (&bench, created);
  status = in_child (fault[0] ? fault : NULL, live, NULL);
  if (stopped ? !passed (status) : !killed (status))
    condemn (NULL, 0, "its life went wrong");
  what_else_is_lost ();
  do_harm (harm);
  bench_take (&bench, &now.left);
  run (NULL, 0);
  find_faults (&now.left, NULL, open_only);
}

/* --- the loops -------------------------------------------------------------
 */

static void
all_pairs (void)
{
  for (unsigned i = 0; i < now.nr_faults; i++)
    for (unsigned j = 0; j < now.nr_faults; j++)
      run ((const char *[]){ now.fault[i], now.fault[j] }, 2);
}

static void
some (unsigned nr, uint64_t *dice)
{
  for (unsigned i = 0; i < nr; i++) {
    const char *faults[3];
    unsigned n = 2 + peer_random (dice) % 2;

    for (unsigned k = 0; k < n; k++)
      faults[k] = now.fault[peer_random (dice) % now.nr_faults];
    run (faults, n);
  }
}

static void
each_twice (void)
{
  for (unsigned i = 0; i < now.nr_faults; i++)
    run ((const char *[]){ now.fault[i], now.fault[i] }, 2);
}

static char own[MAX_FAULTS][48]; /* the points of a life */
static unsigned nr_own;

static void
find_own (const struct left *created, const struct life *life)
{
  now = (__typeof__ (now)){ .life = life, .harm = &harms[0], .stopped = true };
  find_faults (created, life->fault, live);
  nr_own = now.nr_faults;
  memcpy (own, now.fault, sizeof own);
}

/* A life that ends at a point of its own, by a kill or an error; then starts
 * that do as well.
 */
static void
break_life (const struct left *created, const char *point, unsigned later,
            uint64_t *dice)
{
  const struct life *life = now.life;
  char fault[150];
  int status;

  snprintf (fault, sizeof fault, "%s%s%s", life->fault ? life->fault : "",
            life->fault ? "," : "", point);
  bench_put (&bench, created);
  status = in_child (fault, live, NULL);
  if (!WIFEXITED (status) && !killed (status))
    condemn ((const char *[]){ fault }, 1, "it crashed");
  now.broken = fault;
  now.rebooted = peer_random (dice) % 2;
  now.caches_lost = peer_random (dice) % 2;
  what_else_is_lost ();
  bench_take (&bench, &now.left);
  run (NULL, 0);
  if (later > 0) {
    find_faults (&now.left, NULL, open_only);
    some (later, dice);
  }
  bench_free (&now.left);
}

static void
broken_life (const struct left *created, const struct life *life, unsigned nr,
             uint64_t *dice)
{
  find_own (created, life);
  for (; nr > 0; nr--)
    break_life (created, own[peer_random (dice) % nr_own], 2, dice);
}

/* At each point: what a kill leaves is for few of them a danger. */
static void
life_broken_anywhere (const struct left *created, const struct life *life,
                      uint64_t *dice)
{
  find_own (created, life);
  for (unsigned i = 0; i < nr_own; i++)
    break_life (created, own[i], 0, dice);
}

/* In any order, so that a slow machine leaves out others each time. */
static void
shuffle (unsigned *order, unsigned nr, uint64_t *dice)
{
  for (unsigned i = 0; i < nr; i++)
    order[i] = i;
  for (unsigned i = nr; i > 1; i--) {
    unsigned j = (unsigned)(peer_random (dice) % i), kept = order[j];

    order[j] = order[i - 1];
    order[i - 1] = kept;
  }
}

/* Every case of the two lives with local not ok and nothing lost has each fault
 * twice in a row; the rest is chosen, and as much as there is time for.
 */
static void
try_case (const struct left *created, unsigned number, bool all, bool late,
          uint64_t *dice)
{
  const struct life *life = &lives[number / 4 % NR_LIVES];
  const struct harm *harm = &harms[number / 4 / NR_LIVES];
  bool stopped = number & 1, rebooted = number & 2;
  bool first = !harm->file[0] && !life->local_ok && !rebooted;

  if (late && !first && !harm->file[1])
    return;
  begin_case (created, life, harm, stopped, rebooted, peer_random (dice) % 2);
  if (all)
    all_pairs ();
  else if (first)
    each_twice ();
  else if (!late)
    some (6, dice);
  bench_free (&now.left);
}

#define NR_CASES (4 * NR_LIVES * NR_HARMS)

int
main (void)
{
  const char *seed = getenv ("NBDM_TEST_SEED");
  bool all = getenv ("NBDM_INTERRUPTED") != NULL;
  uint64_t dice = seed ? strtoull (seed, NULL, 0) : (uint64_t)time (NULL);
  time_t until = time (NULL) + BUDGET_S;
  unsigned order[NR_CASES];
  struct left created;

  printf ("seed %" PRIu64 " (NBDM_TEST_SEED)\n", dice);
  fflush (stdout);
  dice |= 1;
  bench_make (&bench);
  bench_take (&bench, &created);
  shuffle (order, NR_CASES, &dice);
  for (unsigned i = 0; i < NR_CASES; i++)
    try_case (&created, order[i], all, !all && !seed && time (NULL) >= until,
              &dice);
  life_broken_anywhere (&created, &lives[NR_LIVES - 1], &dice);
  until = time (NULL) + BUDGET_S;
  for (unsigned i = 0; all || seed ? i < 10 * NR_LIVES : time (NULL) < until;
       i++)
    broken_life (&created, &lives[i % NR_LIVES], all ? 50 : 2, &dice);
  bench_free (&created);
  bench_remove (&bench);
  printf ("%u starts interrupted in %u runs, %u refused\n", nr_starts, nr_runs,
          nr_refused);
  assert (nr_refused > 0);
  return 0;
}
