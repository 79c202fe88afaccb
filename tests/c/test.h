/* SPDX-License-Identifier: BSD-3-Clause */

/* What the C tests share: asserts that are always on, a folder of one's own,
 * and a child process for what kills, and for what NBDM_FAULT is read once.
 */

#ifndef NBDM_TEST_H
#define NBDM_TEST_H

#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/error.h"

#define TEST_UNUSED __attribute__ ((unused))

/* Say which test runs: a failed assert names only the line. */
#define RUN(test) (printf ("%s\n", #test), fflush (stdout), test ())

/* The message must say this. */
#define ASSERT_SAYS(words)                                                     \
  do {                                                                         \
    if (strstr (last_error (), words) == NULL) {                               \
      fprintf (stderr, "%s:%d: \"%s\" is not in \"%s\"\n", __FILE__, __LINE__, \
               words, last_error ());                                          \
      abort ();                                                                \
    }                                                                          \
  } while (0)

struct folder {
  char path[PATH_MAX];
  int fd;
};

static TEST_UNUSED struct folder
folder_make (void)
{
  struct folder folder;
  const char *tmp = getenv ("TMPDIR");

  snprintf (folder.path, sizeof folder.path, "%s/nbdm-test-XXXXXX",
            tmp ? tmp : "/tmp");
  assert (mkdtemp (folder.path));
  folder.fd = open (folder.path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  assert (folder.fd >= 0);
  return folder;
}

/* Remove the folder, which must hold nothing but these files: so that a
 * temporary file left behind fails the test.  The list ends with NULL.
 */
static TEST_UNUSED void
folder_remove (struct folder *folder, const char *const *files)
{
  for (; *files; files++)
    assert (unlinkat (folder->fd, *files, 0) == 0);
  close (folder->fd);
  assert (rmdir (folder->path) == 0);
}

#define FILES(...) ((const char *const[]){ __VA_ARGS__, NULL })
#define NO_FILES ((const char *const[]){ NULL })

static TEST_UNUSED off_t
file_size (const struct folder *folder, const char *name)
{
  struct stat st;

  assert (fstatat (folder->fd, name, &st, 0) == 0);
  return st.st_size;
}

/* Turn over the bits of one byte, as a garbled disk would. */
static TEST_UNUSED void
garble (const struct folder *folder, const char *name, off_t offset)
{
  uint8_t byte;
  int fd = openat (folder->fd, name, O_RDWR | O_CLOEXEC);

  assert (fd >= 0 && pread (fd, &byte, 1, offset) == 1);
  byte ^= 0xff;
  assert (pwrite (fd, &byte, 1, offset) == 1);
  close (fd);
}

/* Run `body` in a child with NBDM_FAULT set so; its wait status.  The child
 * leaves without the parent's exit handlers, but a failed assert aborts it.
 */
static TEST_UNUSED int
in_child (const char *fault, void (*body) (void *opaque), void *opaque)
{
  int status;
  pid_t pid = fork ();

  assert (pid >= 0);
  if (pid == 0) {
    if (fault)
      setenv ("NBDM_FAULT", fault, 1);
    else
      unsetenv ("NBDM_FAULT");
    body (opaque);
    _exit (0);
  }
  assert (waitpid (pid, &status, 0) == pid);
  return status;
}

static TEST_UNUSED bool
passed (int status)
{
  return WIFEXITED (status) && WEXITSTATUS (status) == 0;
}

static TEST_UNUSED bool
killed (int status)
{
  return WIFSIGNALED (status) && WTERMSIG (status) == SIGKILL;
}

#endif /* NBDM_TEST_H */
