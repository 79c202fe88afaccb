/* SPDX-License-Identifier: BSD-3-Clause */

/* Fault points: that each action happens where and when it was asked for, and
 * nowhere else.  NBDM_FAULT is read once, so each test has its own process.
 */

#include "test.h"

#include <signal.h>
#include <time.h>

static void
pass_three_points (void *opaque)
{
  int *r = opaque;

  fault_init ();
  for (int i = 0; i < 3; i++)
    assert (fault_point ("there") == r[i]);
  assert (fault_point ("elsewhere") == 0);
  assert (fault_point ("ther") == 0);
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
  assert (fault_point ("there") == 0);
}

static void
test_fault_before_init_does_nothing (void)
{
  assert (passed (in_child ("there=kill", pass_without_init, NULL)));
}

static void
test_fault_error_returns_each_time (void)
{
  int r[] = { -EIO, -EIO, -EIO };

  assert (passed (in_child ("there=error", pass_three_points, r)));
}

static void
test_fault_error_with_count_returns_once (void)
{
  int r[] = { 0, -EIO, 0 };

  assert (passed (in_child ("there:2=error", pass_three_points, r)));
}

static void
test_fault_several_each_act (void)
{
  int r[] = { -EIO, 0, -EIO };

  assert (passed (
      in_child ("there:1=error,x=kill,there:3=error", pass_three_points, r)));
}

static void
test_fault_kill_ends_the_process (void)
{
  int r[] = { 0, 0, 0 };

  assert (killed (in_child ("there=kill", pass_three_points, r)));
  assert (killed (in_child ("there:3=kill", pass_three_points, r)));
  assert (passed (in_child ("there:4=kill", pass_three_points, r)));
}

static void
test_fault_misspelt_ends_the_process (void)
{
  static const char *const wrong[]
      = { "there",       "there=",       "=kill",         "there=die",
          "there:=kill", "there:0=kill", "there:1x=kill", "there:-1=kill",
          "there=wait:", "a=kill,b" };
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

  snprintf (spec, sizeof spec, "there:2=wait:%s/go", folder.path);
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

int
main (void)
{
  RUN (test_fault_unset_does_nothing);
  RUN (test_fault_before_init_does_nothing);
  RUN (test_fault_error_returns_each_time);
  RUN (test_fault_error_with_count_returns_once);
  RUN (test_fault_several_each_act);
  RUN (test_fault_kill_ends_the_process);
  RUN (test_fault_misspelt_ends_the_process);
  RUN (test_fault_wait_goes_on_when_the_file_appears);
  return 0;
}
