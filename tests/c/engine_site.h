/* SPDX-License-Identifier: BSD-3-Clause */

/* A site for tests of the whole engine: a volume in a folder of its own, a
 * real nbdkit as its remote, a load, and a process of its own for each test,
 * because the fault points are read once a process.
 */

#ifndef NBDM_ENGINE_SITE_H
#define NBDM_ENGINE_SITE_H

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

#include "api.h"
#include "volume/volume.h"
#include "listening.h"
#include "local_deadline.h"

#ifndef NBDM_VOLUME_H /* which has it already */
#endif

/* No test uses all of it. */
#pragma GCC diagnostic ignored "-Wunused-function"

#define REGION 65536u
#define SIZE (64u * REGION + 5 * 512u) /* the last region is short */
#define DEADLINE_S 60

static char dir[64];
static pid_t server;
static bool
    failing_server; /* refuses writes while the file "refuse" is there */
static struct nbdm *volume;
static struct nbdm_params params;
static uint32_t flush_bytes, flush_ms; /* 0: as the engine has it */

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
    if (failing_server) {
      char trigger[160];

      snprintf (trigger, sizeof trigger, "error-file=%s", path ("refuse"));
      execlp ("nbdkit", "nbdkit", "-f", "-U", path ("sock"), "--filter=error",
              "file", path ("remote"), "error=EIO", "error-pwrite-rate=100%",
              trigger, (char *)NULL);
      _exit (127);
    }
    execlp ("nbdkit", "nbdkit", "-f", "-U", path ("sock"), "file",
            path ("remote"), (char *)NULL);
    _exit (127);
  }
  while (!unix_listens (path ("sock"))) {
    assert (time (NULL) < until);
    pause_ms (5);
  }
}

/* Return once it has stopped: the signal alone lets it answer a little more. */
static void
freeze_server (void)
{
  int wstatus;

  kill (server, SIGSTOP);
  assert (waitpid (server, &wstatus, WUNTRACED) == server);
  assert (WIFSTOPPED (wstatus));
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

/* Of the folder that `dir` names. */
static void
set_params (enum nbdm_policy policy, uint32_t hold_ms, uint32_t deadline_ms)
{
  params
      = (struct nbdm_params){ .name = "test",
                              .local = strdup (path ("local")),
                              .state_dir = strdup (path ("state")),
                              .size = SIZE,
                              .region_size = REGION,
                              .policy = policy,
                              .hold_ms = hold_ms,
                              .local_deadline_ms = local_deadline_of_tests (),
                              .flush_bytes = flush_bytes,
                              .flush_ms = flush_ms,
                              .nr_remotes = 1 };
  params.remotes[0].name = "dr";
  params.remotes[0].deadline_ms = deadline_ms;
}

/* In the folder that `dir` names. */
static void
make_site_here (enum nbdm_policy policy, uint32_t hold_ms, uint32_t deadline_ms)
{
  make_image ("local");
  make_image ("remote");
  assert (mkdir (path ("state"), 0700) == 0);
  set_params (policy, hold_ms, deadline_ms);
  assert (nbdm_create (&params, 0) == 0);
  start_server ();
  assert (nbdm_open (&params, &volume) == 0);
  assert (nbdm_start (volume) == 0);
}

static void
make_site (enum nbdm_policy policy, uint32_t hold_ms, uint32_t deadline_ms)
{
  snprintf (dir, sizeof dir, "/tmp/nbdm-engine-XXXXXX");
  assert (mkdtemp (dir));
  make_site_here (policy, hold_ms, deadline_ms);
}

static struct nbdm_disk_status
status (void)
{
  struct nbdm_disk_status s;

  assert (nbdm_get_disk_status (volume, 1, &s) == 0);
  return s;
}

static void
wait_state (enum nbdm_remote_state state)
{
  time_t until = time (NULL) + DEADLINE_S;
  struct nbdm_disk_status s = status ();

  while (s.state != state) {
    assert (time (NULL) < until);
    nbdm_disk_wait (volume, 1, s.serial, 1000);
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
  while (nbdm_remote_connect (volume, 1, uri, 2000) < 0) {
    assert (time (NULL) < until);
    pause_ms (10);
  }
  assert (nbdm_disk_admit (volume, 1) == 0);
}

/* Batches until in sync, as the policy thread does. */
static void
resync_to_end (void)
{
  time_t until = time (NULL) + DEADLINE_S;
  struct nbdm_resync batch = { .max_bytes = 1u << 20, .pace.depth = 4 };

  while (status ().state == NBDM_RESYNCING) {
    struct nbdm_disk_status s = status ();

    assert (time (NULL) < until);
    if (s.remote.late_regions == s.dirty_regions)
      nbdm_remote_release_late (volume, 1);
    assert (nbdm_disk_resync (volume, 1, &batch) == 0);
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
static atomic_uint load_errors; /* EIO, where `load_may_fail` */
static bool load_may_fail;
static uint64_t load_size = SIZE; /* the rest is the test's own */

static void *
load (void *opaque)
{
  unsigned seed = (unsigned)(uintptr_t)opaque;
  uint8_t *buf = malloc (3 * REGION);

  while (!load_stop) {
    uint32_t count = ((unsigned)rand_r (&seed) % 300 + 1) * 512;
    uint64_t offset
        = (unsigned)rand_r (&seed) % ((load_size - count) / 512 + 1) * 512;
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
    assert (rc == 0 || (load_may_fail && rc == -EIO));
    load_errors += rc != 0;
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

/* --- running them ---------------------------------------------------- */

struct engine_test {
  const char *name;
  void (*run) (void);
};

#define TEST(name)                                                             \
  {                                                                            \
#name, name                                                                \
  }

/* Run each test in a process of its own, or only the one that the command line
 * names.  Returns the exit status.
 */
static int
run_tests (const struct engine_test *tests, size_t nr, int argc, char *argv[])
{
  int failed = 0;

  for (size_t i = 0; i < nr; i++) {
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

#endif /* NBDM_ENGINE_SITE_H */
