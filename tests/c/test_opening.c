/* SPDX-License-Identifier: BSD-3-Clause */

/* A volume is opened by one process at a time, and with its own parameters. */

#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/file.h>

#include "lone_volume.h"

static void
test_volume_is_opened_once (void)
{
  struct nbdm *second = NULL;

  make_volume (SIZE, REGION);
  struct nbdm *v = open_volume ();
  assert (nbdm_open (&params, &second) == -EBUSY);
  ASSERT_SAYS ("is in use by process");
  assert (nbdm_create (&params, 1) == -EBUSY);
  nbdm_close (v);
  end_volume ();
}

/* Lock the file as a server does: its local disk as qemu does, else by flock.
 */
static int
lock_file (const char *name)
{
  struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
  int fd = openat (site.fd, name, O_RDWR | O_CLOEXEC);

  return fd < 0 || strcmp (name, "disk") != 0 ? flock (fd, LOCK_EX | LOCK_NB)
                                              : fcntl (fd, F_OFD_SETLK, &lock);
}

/* Another start holds the lock for a moment, to put serve.log aside.  A server
 * that ends releases its locks one after the other.
 */
static void
lock_of_a_moment_is_waited_for (const char *name, bool create)
{
  int ready[2], status;
  char byte;

  make_volume (SIZE, REGION);
  assert (pipe (ready) == 0);
  pid_t pid = fork ();
  assert (pid >= 0);
  if (pid == 0) {
    if (lock_file (name) < 0 || write (ready[1], "", 1) != 1)
      _exit (1);
    usleep (100000);
    _exit (0);
  }
  close (ready[1]);
  assert (read (ready[0], &byte, 1) == 1);
  if (create)
    assert (nbdm_create (&params, 1) == 0);
  else
    nbdm_close (open_volume ());
  waitpid (pid, &status, 0);
  assert (status == 0);
  close (ready[0]);
  end_volume ();
}

static void
test_locks_of_a_moment_are_waited_for (void)
{
  static const char *const files[] = { "lock", "superblock", "disk" };

  for (unsigned i = 0; i < sizeof files / sizeof files[0]; i++) {
    lock_of_a_moment_is_waited_for (files[i], false);
    lock_of_a_moment_is_waited_for (files[i], true);
  }
}

/* While local has failed nothing locks it. */
static void
test_volume_whose_lock_was_removed_is_opened_once (void)
{
  struct nbdm *second = NULL;

  make_volume (SIZE, REGION);
  params.local_choice = NBDM_LOCAL_LOST;
  struct nbdm *v = open_volume ();
  assert (unlinkat (site.fd, "lock", 0) == 0);
  assert (nbdm_open (&params, &second) == -EBUSY);
  ASSERT_SAYS ("is in use by another process");
  assert (nbdm_create (&params, 1) == -EBUSY);
  nbdm_close (v);
  v = open_volume ();
  nbdm_close (v);
  params.local_choice = NBDM_LOCAL_CHECKED;
  end_volume ();
}

static void
test_other_parameters_are_refused (void)
{
  struct nbdm *v = NULL;

  make_volume (SIZE, REGION);
  params.region_size = 2 * REGION;
  assert (nbdm_open (&params, &v) == -EINVAL);
  ASSERT_SAYS ("region_size");
  params.region_size = REGION;
  params.size = SIZE - 512;
  assert (nbdm_open (&params, &v) == -EINVAL);
  params.size = 0;
  params.name = "other";
  assert (nbdm_open (&params, &v) == -EINVAL);
  ASSERT_SAYS ("the state of volume \"test\"");
  end_volume ();
}

int
main (void)
{
  alarm (100); /* nothing here may hang */
  RUN (test_volume_is_opened_once);
  RUN (test_locks_of_a_moment_are_waited_for);
  RUN (test_volume_whose_lock_was_removed_is_opened_once);
  RUN (test_other_parameters_are_refused);
  return 0;
}
