/* SPDX-License-Identifier: BSD-3-Clause */

/* Fault points: that each action happens where and when it was asked for, and
 * nowhere else.  NBDM_FAULT is read once, so each test has its own process.
 */

#include "api.h"
#include "base/fault.h"
#include "test.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>

static void
pass_three_points (void *opaque)
{
  int *r = opaque;

  fault_init ();
  for (int i = 0; i < 3; i++)
    assert (fault_point ("local_flush") == r[i]);
  assert (fault_point ("local_write") == 0);
  assert (fault_point ("local_flushed") == 0);
}

static void
test_fault_unset_does_nothing (void)
{
  int r[] = { 0, 0, 0 };

  assert (passed (in_child (NULL, pass_three_points, r)));
  assert (passed (in_child ("", pass_three_points, r)));
}

static void
pass_without_init (void *opaque)
{
  (void)opaque;
  assert (fault_point ("local_flush") == 0);
}

static void
test_fault_before_init_does_nothing (void)
{
  assert (passed (in_child ("local_flush=kill", pass_without_init, NULL)));
}

static void
test_fault_error_returns_each_time (void)
{
  int r[] = { -EIO, -EIO, -EIO };

  assert (passed (in_child ("local_flush=error", pass_three_points, r)));
}

static void
test_fault_error_with_count_returns_once (void)
{
  int r[] = { 0, -EIO, 0 };

  assert (passed (in_child ("local_flush:2=error", pass_three_points, r)));
}

static void
test_fault_error_has_the_errno_asked_for (void)
{
  int r[] = { -ENOSPC, -EIO, -EROFS };

  assert (
      passed (in_child ("local_flush:1=error:ENOSPC,local_flush:2=error:EIO,"
                        "local_flush:3=error:EROFS",
                        pass_three_points, r)));
}

static void
pass_unknown_point (void *opaque)
{
  (void)opaque;
  fault_init ();
  fault_point ("local_flus");
}

/* Otherwise no test could name it. */
static void
test_fault_point_that_is_in_no_table_ends_the_process (void)
{
  int status = in_child ("after_log=kill", pass_unknown_point, NULL);

  assert (WIFEXITED (status) && WEXITSTATUS (status) == EXIT_FAILURE);
  assert (passed (in_child (NULL, pass_unknown_point, NULL)));
}

static void
test_fault_points_are_listed_once_each (void)
{
  const char *name, *other;
  int fails, ignored;

  for (uint32_t i = 0; (name = nbdm_fault_point (i, &fails)); i++) {
    assert (fails == 0 || fails == 1);
    for (uint32_t j = 0; j < i; j++) {
      other = nbdm_fault_point (j, &ignored);
      assert (strcmp (name, other) != 0);
    }
  }
}

static void
test_fault_several_each_act (void)
{
  int r[] = { -EIO, 0, -EIO };

  assert (passed (
      in_child ("local_flush:1=error,after_log=kill,local_flush:3=error",
                pass_three_points, r)));
}

static void
test_fault_kill_ends_the_process (void)
{
  int r[] = { 0, 0, 0 };

  assert (killed (in_child ("local_flush=kill", pass_three_points, r)));
  assert (killed (in_child ("local_flush:3=kill", pass_three_points, r)));
  assert (passed (in_child ("local_flush:4=kill", pass_three_points, r)));
}

static void
test_fault_misspelt_ends_the_process (void)
{
  static const char *const wrong[]
      = { "local_flush", "local_flush=", "=kill", "local_flush=die",
          "local_flush:=kill", "local_flush:0=kill", "local_flush:1x=kill",
          "local_flush:-1=kill", "local_flush=wait:", "local_flush=error:",
          "local_flush=error:ENOSPACE", "local_flush=error:28",
          "local_flush=errors", "local_flush=kill,after_log", "local_flus=kill",
          "local_flushe=error",
          /* the engine does not look at what it returns */
          "after_log=error" };
  int r[] = { 0, 0, 0 };

  for (unsigned i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
    int status = in_child (wrong[i], pass_three_points, r);
    assert (WIFEXITED (status) && WEXITSTATUS (status) == EXIT_FAILURE);
  }
}

/* Two processes meet at the point: the child says it is there by the
 * ".reached" file, and goes on when ours appears.
 */
static void
test_fault_wait_goes_on_when_the_file_appears (void)
{
  const struct timespec step = { .tv_nsec = 5000000 };
  struct folder folder = folder_make ();
  char spec[PATH_MAX + 32];
  int r[] = { 0, 0, 0 };
  int status, tries = 0;

  snprintf (spec, sizeof spec, "local_flush:2=wait:%s/go", folder.path);
  pid_t pid = fork ();
  assert (pid >= 0);
  if (pid == 0)
    _exit (passed (in_child (spec, pass_three_points, r)) ? 0 : 1);

  while (faccessat (folder.fd, "go.reached", F_OK, 0) == -1) {
    assert (++tries < 4000); /* 20 s */
    nanosleep (&step, NULL);
  }
  assert (waitpid (pid, &status, WNOHANG) == 0);
  int fd = openat (folder.fd, "go", O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
  assert (fd >= 0);
  close (fd);
  assert (waitpid (pid, &status, 0) == pid);
  assert (passed (status));
  folder_remove (&folder, FILES ("go", "go.reached"));
}

#define FAULTS 128
#define PASSERS 4

static atomic_uint failures;

static void *
pass_often (void *opaque)
{
  pthread_barrier_wait (opaque);
  for (int i = 0; i < FAULTS; i++)
    if (fault_point ("local_write") < 0)
      failures++;
  return NULL;
}

static void
pass_together (void *opaque)
{
  pthread_t passers[PASSERS];
  pthread_barrier_t start;

  (void)opaque;
  fault_init ();
  assert (pthread_barrier_init (&start, NULL, PASSERS) == 0);
  for (int i = 0; i < PASSERS; i++)
    assert (pthread_create (&passers[i], NULL, pass_often, &start) == 0);
  for (int i = 0; i < PASSERS; i++)
    assert (pthread_join (passers[i], NULL) == 0);
  pthread_barrier_destroy (&start);
  assert (failures == FAULTS);
}

/* Each of the first so many passes fails, in whatever threads they are. */
static void
test_fault_counts_each_pass_once (void)
{
  char faults[FAULTS * 32];
  size_t used = 0;

  for (int i = 1; i <= FAULTS; i++)
    used += (size_t)snprintf (faults + used, sizeof faults - used,
                              "%slocal_write:%d=error", i > 1 ? "," : "", i);
  assert (passed (in_child (faults, pass_together, NULL)));
}

int
main (void)
{
  RUN (test_fault_unset_does_nothing);
  RUN (test_fault_before_init_does_nothing);
  RUN (test_fault_error_returns_each_time);
  RUN (test_fault_error_with_count_returns_once);
  RUN (test_fault_error_has_the_errno_asked_for);
  RUN (test_fault_point_that_is_in_no_table_ends_the_process);
  RUN (test_fault_points_are_listed_once_each);
  RUN (test_fault_several_each_act);
  RUN (test_fault_counts_each_pass_once);
  RUN (test_fault_kill_ends_the_process);
  RUN (test_fault_misspelt_ends_the_process);
  RUN (test_fault_wait_goes_on_when_the_file_appears);
  return 0;
}
