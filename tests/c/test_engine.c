/* SPDX-License-Identifier: BSD-3-Clause */

/* The engine with real threads and a real nbdkit as its remote, for the
 * sanitizers: what the end-to-end tests show of behaviour, this shows of
 * races and lifetimes.  Each test runs in a process of its own, because the
 * fault points are read once a process.
 */

#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "nbdm.h"

#define REGION 65536u
#define SIZE (64u * REGION + 5 * 512u) /* the last region is short */
#define DEADLINE_S 60

static char dir[64];
static pid_t server;
static struct nbdm *volume;
static struct nbdm_params params;

/* --- the site -------------------------------------------------------- */

static const char *
path (const char *name)
{
  static _Thread_local char buf[4][128];
  static _Thread_local unsigned turn;
  char *p = buf[turn++ % 4];

  snprintf (p, sizeof buf[0], "%s/%s", dir, name);
  return p;
}

static void
make_image (const char *name)
{
  int fd = open (path (name), O_RDWR | O_CREAT | O_TRUNC, 0600);

  assert (fd >= 0 && ftruncate (fd, SIZE) == 0);
  close (fd);
}

static void
pause_ms (unsigned ms)
{
  poll (NULL, 0, (int)ms);
}

/* nbdkit dies with us, whatever happens to the test. */
static void
start_server (void)
{
  time_t until = time (NULL) + DEADLINE_S;

  unlink (path ("sock"));
  server = fork ();
  assert (server >= 0);
  if (server == 0) {
    prctl (PR_SET_PDEATHSIG, SIGKILL);
    execlp ("nbdkit", "nbdkit", "-f", "-U", path ("sock"), "file",
            path ("remote"), (char *)NULL);
    _exit (127);
  }
  while (access (path ("sock"), F_OK) < 0) {
    assert (time (NULL) < until);
    pause_ms (5);
  }
}

static void
kill_server (void)
{
  kill (server, SIGKILL);
  waitpid (server, NULL, 0);
}

static void
remove_site (void)
{
  char command[128];

  snprintf (command, sizeof command, "rm -rf %s", dir);
  assert (system (command) == 0);
}

static void
make_site (enum nbdm_policy policy, uint32_t hold_ms, uint32_t deadline_ms)
{
  snprintf (dir, sizeof dir, "/tmp/nbdm-engine-XXXXXX");
  assert (mkdtemp (dir));
  make_image ("local");
  make_image ("remote");
  assert (mkdir (path ("state"), 0700) == 0);
  params = (struct nbdm_params){ .name = "test",
                                 .local = strdup (path ("local")),
                                 .state_dir = strdup (path ("state")),
                                 .size = SIZE,
                                 .region_size = REGION,
                                 .policy = policy,
                                 .hold_ms = hold_ms,
                                 .nr_remotes = 1 };
  params.remotes[0].name = "dr";
  params.remotes[0].deadline_ms = deadline_ms;
  assert (nbdm_create (&params, 0) == 0);
  start_server ();
  assert (nbdm_open (&params, &volume) == 0);
  assert (nbdm_start (volume) == 0);
}

static struct nbdm_remote_status
status (void)
{
  struct nbdm_remote_status s;

  assert (nbdm_get_remote_status (volume, 0, &s) == 0);
  return s;
}

static void
wait_state (enum nbdm_remote_state state)
{
  time_t until = time (NULL) + DEADLINE_S;
  struct nbdm_remote_status s = status ();

  while (s.state != state) {
    assert (time (NULL) < until);
    nbdm_wait_event (volume, 0, s.serial, 1000);
    s = status ();
  }
}

static void
connect_remote (void)
{
  time_t until = time (NULL) + DEADLINE_S;
  char uri[160];

  snprintf (uri, sizeof uri, "nbd+unix:///?socket=%s", path ("sock"));
  /* The old connection may not have been noticed dead yet. */
  while (nbdm_remote_connect (volume, 0, uri, 2000) < 0) {
    assert (time (NULL) < until);
    pause_ms (10);
  }
  assert (nbdm_remote_admit (volume, 0) == 0);
}

/* Batches until in sync, as the policy thread does. */
static void
resync_to_end (void)
{
  time_t until = time (NULL) + DEADLINE_S;
  struct nbdm_resync batch = { .max_bytes = 1u << 20, .depth = 4 };

  while (status ().state == NBDM_RESYNCING) {
    struct nbdm_remote_status s = status ();

    assert (time (NULL) < until);
    if (s.late_regions == s.dirty_regions)
      nbdm_remote_release_late (volume, 0);
    assert (nbdm_resync (volume, 0, &batch) == 0);
    batch.first_region = batch.next_region;
  }
  assert (status ().state == NBDM_IN_SYNC);
}

static void
assert_images_equal (void)
{
  char command[400];

  snprintf (command, sizeof command, "cmp %s %s", path ("local"),
            path ("remote"));
  assert (system (command) == 0);
}

static void
end_site (void)
{
  assert (nbdm_stop (volume) == 0);
  nbdm_close (volume);
  kill_server ();
  remove_site ();
}

/* --- load ------------------------------------------------------------ */

static atomic_bool load_stop;
static atomic_uint load_requests;

static void *
load (void *opaque)
{
  unsigned seed = (unsigned)(uintptr_t)opaque;
  uint8_t *buf = malloc (3 * REGION);

  while (!load_stop) {
    uint32_t count = ((unsigned)rand_r (&seed) % 300 + 1) * 512;
    uint64_t offset
        = (unsigned)rand_r (&seed) % ((SIZE - count) / 512 + 1) * 512;
    unsigned kind = (unsigned)rand_r (&seed) % 20;
    int rc;

    memset (buf, rand_r (&seed), count);
    if (kind == 0)
      rc = nbdm_flush (volume);
    else if (kind == 1)
      rc = nbdm_trim (volume, count, offset, 0);
    else if (kind == 2)
      rc = nbdm_zero (volume, count, offset, 0);
    else if (kind == 3)
      rc = nbdm_pread (volume, buf, count, offset);
    else
      rc = nbdm_pwrite (volume, buf, count, offset, kind == 4 ? NBDM_FUA : 0);
    assert (rc == 0);
    load_requests++;
  }
  free (buf);
  return NULL;
}

#define LOAD_THREADS 6
static pthread_t load_threads[LOAD_THREADS];

static void
start_load (void)
{
  load_stop = false;
  for (uintptr_t i = 0; i < LOAD_THREADS; i++)
    assert (pthread_create (&load_threads[i], NULL, load, (void *)(i + 1))
            == 0);
}

static void
stop_load (void)
{
  load_stop = true;
  for (unsigned i = 0; i < LOAD_THREADS; i++)
    pthread_join (load_threads[i], NULL);
}

static void
wait_requests (unsigned more)
{
  unsigned goal = load_requests + more;
  time_t until = time (NULL) + DEADLINE_S;

  while (load_requests < goal) {
    assert (time (NULL) < until);
    pause_ms (2);
  }
}

/* --- tests ----------------------------------------------------------- */

static void
test_kill_under_load_catches_up (void)
{
  make_site (NBDM_DEGRADE, 200, 5000);
  connect_remote ();
  resync_to_end ();
  start_load ();
  for (unsigned round = 0; round < 6; round++) {
    wait_requests (150);
    kill_server ();
    if (round % 2) /* out of sync, and clients go on alone */
      wait_state (NBDM_OUT_OF_SYNC);
    start_server ();
    connect_remote ();
    resync_to_end ();
  }
  wait_requests (100);
  stop_load ();
  assert (nbdm_stop (volume) == 0);
  assert_images_equal ();
  end_site ();
}

/* The race at the end of a resync: a write to the region whose bit is about
 * to be cleared.
 */
static void
test_resync_end_under_load_loses_nothing (void)
{
  make_site (NBDM_DEGRADE, 200, 5000);
  connect_remote ();
  resync_to_end ();
  start_load ();
  for (unsigned round = 0; round < 40; round++) {
    assert (nbdm_remote_invalidate (volume, 0) == 0);
    resync_to_end ();
  }
  stop_load ();
  assert (nbdm_stop (volume) == 0);
  assert_images_equal ();
  end_site ();
}

static void
test_hung_remote_is_bounded (void)
{
  uint8_t buf[4096] = { 1 };
  time_t start;

  /* A hold as long as the test: a deadline that passed is not held. */
  make_site (NBDM_DEGRADE, 2 * DEADLINE_S * 1000, 300);
  connect_remote ();
  resync_to_end ();
  kill (server, SIGSTOP);
  start = time (NULL);
  assert (nbdm_pwrite (volume, buf, sizeof buf, 0, 0) == 0);
  assert (nbdm_flush (volume) == 0);
  assert (time (NULL) - start < DEADLINE_S / 2);
  assert (status ().state == NBDM_OUT_OF_SYNC);
  assert (strstr (status ().reason, "not answered within 0.3 s"));
  assert (status ().dirty_regions == 1 && status ().late_regions == 1);
  kill (server, SIGCONT);
  end_site ();
}

static void *
one_batch (void *rc)
{
  struct nbdm_resync batch = { .max_bytes = 1u << 20, .depth = 4 };

  *(int *)rc = nbdm_resync (volume, 0, &batch);
  return NULL;
}

/* An unanswered copy may arrive after the next one of the same region. */
static void
test_unanswered_resync_copies_are_late (void)
{
  time_t until = time (NULL) + DEADLINE_S;
  pthread_t thread;
  int rc = 0;

  make_site (NBDM_DEGRADE, 100, 30000);
  connect_remote ();
  kill (server, SIGSTOP);
  assert (pthread_create (&thread, NULL, one_batch, &rc) == 0);
  while (status ().outstanding == 0 || status ().late_regions == 0) {
    assert (time (NULL) < until);
    pause_ms (2);
  }
  kill_server ();
  pthread_join (thread, NULL);
  assert (rc == -ENOTCONN);
  assert (status ().late_regions > 0);
  start_server ();
  connect_remote ();
  resync_to_end ();
  assert (status ().late_regions == 0);
  assert (nbdm_stop (volume) == 0);
  assert_images_equal ();
  end_site ();
}

static void
test_hold_in_time_never_degrades (void)
{
  make_site (NBDM_DEGRADE, 30000, 5000);
  connect_remote ();
  resync_to_end ();
  start_load ();
  wait_requests (100);
  kill_server ();
  wait_state (NBDM_HOLDING);
  start_server ();
  connect_remote ();
  assert (status ().state == NBDM_RESYNCING);
  assert (status ().late_regions > 0);
  wait_requests (100);
  resync_to_end ();
  stop_load ();
  assert (nbdm_stop (volume) == 0);
  assert_images_equal ();
  end_site ();
}

/* What was connected and not admitted does not end the hold it was to save. */
static void
test_unadmitted_connection_dropped_keeps_the_hold (void)
{
  char uri[160];

  make_site (NBDM_DEGRADE, 2 * DEADLINE_S * 1000, 5000);
  connect_remote ();
  resync_to_end ();
  kill_server ();
  wait_state (NBDM_HOLDING);
  start_server ();
  snprintf (uri, sizeof uri, "nbd+unix:///?socket=%s", path ("sock"));
  assert (nbdm_remote_connect (volume, 0, uri, 5000) == 0);
  nbdm_remote_drop (volume, 0, "the sample could not be read");
  assert (status ().state == NBDM_HOLDING);
  connect_remote ();
  assert (status ().state == NBDM_IN_SYNC);
  end_site ();
}

static void *
one_flush (void *rc)
{
  *(int *)rc = nbdm_flush (volume);
  return NULL;
}

/* A server back within the hold may have lost what it answered: a flush waits
 * until that has been copied.
 */
static void
test_policy_stop_flush_waits_for_both (void)
{
  uint8_t buf[4096] = { 3 };
  struct nbdm_status s;
  pthread_t thread;
  int rc = 1;

  make_site (NBDM_STOP, DEADLINE_S * 1000, 5000);
  connect_remote ();
  resync_to_end ();
  assert (nbdm_pwrite (volume, buf, sizeof buf, 0, 0) == 0);
  kill_server ();
  wait_state (NBDM_HOLDING);
  start_server ();
  connect_remote ();
  assert (status ().dirty_regions == 1 && status ().late_regions == 0);
  assert (pthread_create (&thread, NULL, one_flush, &rc) == 0);
  do
    nbdm_get_status (volume, &s);
  while (s.inflight == 0 && s.flushes == 0);
  assert (s.flushes == 0);
  resync_to_end ();
  pthread_join (thread, NULL);
  assert (rc == 0);
  assert (nbdm_stop (volume) == 0);
  assert_images_equal ();
  end_site ();
}

static void
test_policy_stop_fences_until_in_sync (void)
{
  uint8_t buf[4096] = { 7 }, read[4096];

  make_site (NBDM_STOP, 50, 1000);
  assert (nbdm_pwrite (volume, buf, sizeof buf, 0, 0) == -EIO);
  connect_remote ();
  resync_to_end ();
  assert (nbdm_pwrite (volume, buf, sizeof buf, 0, 0) == 0);
  kill_server ();
  assert (nbdm_pwrite (volume, buf, sizeof buf, REGION, 0) == -EIO);
  assert (status ().state == NBDM_OUT_OF_SYNC);
  assert (nbdm_pwrite (volume, buf, sizeof buf, 0, 0) == -EIO);
  assert (nbdm_pread (volume, read, sizeof read, 0) == 0 && read[0] == 7);
  start_server ();
  connect_remote ();
  resync_to_end ();
  assert (nbdm_pwrite (volume, buf, sizeof buf, REGION, NBDM_FUA) == 0);
  assert (nbdm_stop (volume) == 0);
  assert_images_equal ();
  end_site ();
}

static void
test_local_write_error_is_copied_back (void)
{
  uint8_t buf[4096] = { 9 };

  setenv ("NBDM_FAULT", "local_write:2=error", 1);
  make_site (NBDM_DEGRADE, 100, 5000);
  connect_remote ();
  resync_to_end ();
  assert (nbdm_pwrite (volume, buf, sizeof buf, 0, 0) == 0);
  buf[0] = 10;
  assert (nbdm_pwrite (volume, buf, sizeof buf, 0, 0) == -EIO);
  assert (status ().state == NBDM_RESYNCING);
  assert (status ().dirty_regions == 1);
  resync_to_end ();
  assert (nbdm_stop (volume) == 0);
  assert_images_equal ();
  end_site ();
}

static void
test_local_read_error_is_served_by_the_remote (void)
{
  uint8_t buf[4096] = { 11 }, read[4096] = { 0 };

  setenv ("NBDM_FAULT", "local_read:66=error", 1); /* after the first sync */
  make_site (NBDM_DEGRADE, 100, 5000);
  connect_remote ();
  assert (nbdm_pwrite (volume, buf, sizeof buf, 8192, 0) == 0);
  resync_to_end ();
  for (unsigned i = 0; i < 100; i++) {
    memset (read, 0, sizeof read);
    assert (nbdm_pread (volume, read, sizeof read, 8192) == 0);
    assert (memcmp (buf, read, sizeof read) == 0);
  }
  assert (status ().commands > 0);
  end_site ();
}

static void
test_superblock_failure_is_final (void)
{
  uint8_t buf[4096] = { 12 };
  struct nbdm_status s;

  /* Stores so far: the open, resyncing, in_sync; the next is out_of_sync. */
  setenv ("NBDM_FAULT", "superblock_sync:4=error", 1);
  make_site (NBDM_DEGRADE, 50, 1000);
  connect_remote ();
  resync_to_end ();
  kill_server ();
  assert (nbdm_pwrite (volume, buf, sizeof buf, 0, 0) == -EIO);
  nbdm_get_status (volume, &s);
  assert (s.failed && s.reason[0]);
  assert (nbdm_pwrite (volume, buf, sizeof buf, 0, 0) == -EIO);
  assert (nbdm_pread (volume, buf, sizeof buf, 0) == 0);
  assert (nbdm_stop (volume) == -EIO);
  nbdm_close (volume);
  remove_site ();
}

static void
test_clean_restart_copies_nothing (void)
{
  uint8_t buf[4096] = { 13 };

  make_site (NBDM_DEGRADE, 5000, 5000);
  connect_remote ();
  resync_to_end ();
  assert (nbdm_pwrite (volume, buf, sizeof buf, 5 * REGION, 0) == 0);
  assert (nbdm_stop (volume) == 0);
  nbdm_close (volume);
  assert (nbdm_open (&params, &volume) == 0);
  assert (nbdm_start (volume) == 0);
  assert (status ().state == NBDM_HOLDING && status ().dirty_regions == 0);
  connect_remote ();
  assert (status ().state == NBDM_IN_SYNC && status ().copied_bytes == 0);
  end_site ();
}

static const struct {
  const char *name;
  void (*run) (void);
} tests[] = {
#define TEST(name)                                                             \
  {                                                                            \
#name, name                                                                \
  }
  TEST (test_kill_under_load_catches_up),
  TEST (test_resync_end_under_load_loses_nothing),
  TEST (test_hung_remote_is_bounded),
  TEST (test_unanswered_resync_copies_are_late),
  TEST (test_hold_in_time_never_degrades),
  TEST (test_unadmitted_connection_dropped_keeps_the_hold),
  TEST (test_policy_stop_flush_waits_for_both),
  TEST (test_policy_stop_fences_until_in_sync),
  TEST (test_local_write_error_is_copied_back),
  TEST (test_local_read_error_is_served_by_the_remote),
  TEST (test_superblock_failure_is_final),
  TEST (test_clean_restart_copies_nothing),
};

int
main (int argc, char *argv[])
{
  int failed = 0;

  for (size_t i = 0; i < sizeof tests / sizeof tests[0]; i++) {
    int wstatus;
    pid_t pid;

    if (argc > 1 && strcmp (argv[1], tests[i].name) != 0)
      continue;
    fflush (stdout);
    pid = fork ();
    assert (pid >= 0);
    if (pid == 0) {
      alarm (100); /* nothing here may hang */
      tests[i].run ();
      exit (0);
    }
    waitpid (pid, &wstatus, 0);
    printf ("%s %s\n", wstatus == 0 ? "ok    " : "FAILED", tests[i].name);
    failed += wstatus != 0;
  }
  return failed != 0;
}
