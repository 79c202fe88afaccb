/* SPDX-License-Identifier: BSD-3-Clause */

/* Files of the state directory: whole or not there, really allocated, and
 * refused with the cause when the header is not the one expected.
 */

#define _GNU_SOURCE

#include "base/error.h"
#include "base/file.h"
#include "logs/layout.h"
#include "logs/log_header.h"
#include "test.h"

#include <endian.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>

#define SIZE (5 * LAYOUT_PAGE)

static const uint8_t uuid[16] = "0123456789abcdef";

static struct disk_log_header
sample (void)
{
  struct disk_log_header h;

  log_header_init (&h, DIRTY_MAGIC, "dr", uuid, 3, 100, 65536);
  return h;
}

static int
make (struct folder *folder)
{
  struct disk_log_header h = sample ();

  *folder = folder_make ();
  assert (file_make (folder->fd, "dirty.dr", &h, SIZE - LAYOUT_PAGE) == 0);
  int fd = openat (folder->fd, "dirty.dr", O_RDWR | O_CLOEXEC);
  assert (fd >= 0);
  return fd;
}

static void
drop (struct folder *folder, int fd)
{
  close (fd);
  folder_remove (folder, FILES ("dirty.dr"));
}

static void
test_full_io_is_all_or_an_error (void)
{
  struct folder folder;
  int fd = make (&folder);
  char buf[100];

  assert (full_pwrite (fd, "hello", 5, 7000) == 0);
  assert (full_pread (fd, buf, 5, 7000) == 0);
  assert (memcmp (buf, "hello", 5) == 0);
  assert (full_pread (fd, buf, 100, SIZE - 50) == -EIO);
  assert (full_pread (fd, buf, 0, SIZE) == 0);
  assert (full_pread (-1, buf, 1, 0) == -EBADF);
  assert (full_pwrite (-1, buf, 1, 0) == -EBADF);
  drop (&folder, fd);
}

/* A pipe cannot be written at an offset: the error comes through. */
static void
test_full_io_on_a_pipe_fails (void)
{
  int fds[2];
  char byte = 0;

  assert (pipe (fds) == 0);
  assert (full_pwrite (fds[1], &byte, 1, 0) == -ESPIPE);
  assert (full_pread (fds[0], &byte, 1, 0) == -ESPIPE);
  close (fds[0]);
  close (fds[1]);
}

static void
test_file_made_holds_header_and_allocated_zeroes (void)
{
  struct folder folder;
  int fd = make (&folder);
  struct disk_log_header h = sample ();
  char buf[SIZE], zeroes[SIZE] = { 0 };
  struct stat st;

  assert (fstat (fd, &st) == 0);
  assert (st.st_size == SIZE && (st.st_mode & 07777) == 0600);
  assert (st.st_blocks * 512 >= SIZE);
  assert (full_pread (fd, buf, SIZE, 0) == 0);
  assert (memcmp (buf, &h, sizeof h) == 0);
  assert (memcmp (buf + LAYOUT_PAGE, zeroes, SIZE - LAYOUT_PAGE) == 0);
  drop (&folder, fd);
}

/* The file is also made over the remains of a maker that was killed. */
static void
test_file_made_again_replaces_the_old (void)
{
  struct folder folder;
  int fd = make (&folder);
  struct disk_log_header h = sample (), found;

  int stale = openat (folder.fd, "dirty.dr~new", O_WRONLY | O_CREAT, 0600);
  assert (stale >= 0 && write (stale, "junk", 4) == 4);
  close (stale);
  assert (file_make (folder.fd, "dirty.dr", &h, 8 * LAYOUT_PAGE) == 0);
  assert (file_size (&folder, "dirty.dr") == 9 * LAYOUT_PAGE);
  /* The old file is whole for a process that has it open. */
  assert (log_header_load (fd, "dirty.dr", &h, SIZE, &found) == 0);
  drop (&folder, fd);
}

static int
fill_fails (int fd, const void *opaque)
{
  assert (full_pwrite (fd, "half", 4, 0) == 0);
  return *(const int *)opaque;
}

static void
test_file_failed_leaves_nothing (void)
{
  struct folder folder = folder_make ();
  int err = -EIO;

  assert (file_make_filled (folder.fd, "activity", SIZE, fill_fails, &err)
          == -EIO);
  ASSERT_SAYS ("cannot write activity");
  err = -ENOSPC;
  assert (file_make_filled (folder.fd, "activity", SIZE, fill_fails, &err)
          == -ENOSPC);
  ASSERT_SAYS ("no room for activity (20.0 KiB) in the state directory");
  folder_remove (&folder, NO_FILES);
}

static void
test_file_failed_leaves_the_old (void)
{
  struct folder folder;
  int fd = make (&folder);
  struct disk_log_header h = sample (), found;
  int err = -EIO;

  assert (file_make_filled (folder.fd, "dirty.dr", SIZE, fill_fails, &err)
          == -EIO);
  close (fd);
  fd = openat (folder.fd, "dirty.dr", O_RDWR | O_CLOEXEC);
  assert (log_header_load (fd, "dirty.dr", &h, SIZE, &found) == 0);
  drop (&folder, fd);
}

static void
test_file_in_a_missing_folder_fails (void)
{
  struct folder folder = folder_make ();
  struct disk_log_header h = sample ();

  assert (rmdir (folder.path) == 0);
  assert (file_make (folder.fd, "dirty.dr", &h, LAYOUT_PAGE) == -ENOENT);
  ASSERT_SAYS ("dirty.dr");
  close (folder.fd);
}

static void
limit_file_size (void *opaque)
{
  const struct folder *folder = opaque;
  const struct rlimit limit = { 3 * LAYOUT_PAGE, 3 * LAYOUT_PAGE };
  struct disk_log_header h = sample ();

  signal (SIGXFSZ, SIG_IGN);
  assert (setrlimit (RLIMIT_FSIZE, &limit) == 0);
  assert (file_make (folder->fd, "dirty.dr", &h, SIZE - LAYOUT_PAGE) == -EFBIG);
  ASSERT_SAYS ("dirty.dr");
}

static void
test_file_past_the_size_limit_leaves_nothing (void)
{
  struct folder folder = folder_make ();

  assert (passed (in_child (NULL, limit_file_size, &folder)));
  folder_remove (&folder, NO_FILES);
}

/* The child has a tmpfs in a mount namespace of its own, which ends with the
 * child. Exit code 77: it may not make one here.
 */
static void
fill_a_small_tmpfs (void *opaque)
{
  const struct folder *folder = opaque;
  struct disk_log_header h = sample ();
  struct stat st;

  if ((unshare (CLONE_NEWNS) == -1
       && unshare (CLONE_NEWUSER | CLONE_NEWNS) == -1)
      || mount ("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) == -1
      || mount ("small", folder->path, "tmpfs", 0, "size=64k") == -1)
    _exit (77);
  int dirfd = open (folder->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  assert (dirfd >= 0);
  assert (file_make (dirfd, "dirty.dr", &h, 1258291 - LAYOUT_PAGE) == -ENOSPC);
  ASSERT_SAYS ("no room for dirty.dr (1.2 MiB) in the state directory");
  assert (fstatat (dirfd, "dirty.dr", &st, 0) == -1);
  assert (fstatat (dirfd, "dirty.dr~new", &st, 0) == -1);
  /* A file that fits is made: the failed one left nothing allocated. */
  assert (file_make (dirfd, "dirty.dr", &h, 11 * LAYOUT_PAGE) == 0);
}

static void
test_file_on_a_full_tmpfs_leaves_nothing (void)
{
  struct folder folder = folder_make ();
  int status = in_child (NULL, fill_a_small_tmpfs, &folder);

  if (WIFEXITED (status) && WEXITSTATUS (status) == 77)
    printf ("  skipped: no mount namespace may be made here\n");
  else
    assert (passed (status));
  folder_remove (&folder, NO_FILES);
}

static void
test_header_stored_loads (void)
{
  struct folder folder;
  int fd = make (&folder);
  struct disk_log_header expect = sample (), h = expect, found;

  h.session = htole64 (4);
  h.flags = htole32 (LOG_CLEAN);
  assert (log_header_store (fd, "dirty.dr", &h) == 0);
  assert (log_header_load (fd, "dirty.dr", &expect, SIZE, &found) == 0);
  assert (memcmp (&found, &h, sizeof h) == 0);
  assert (le64toh (found.session) == 4);
  drop (&folder, fd);
}

static void
assert_refused (int fd, const struct disk_log_header *expect, uint64_t size,
                const char *words)
{
  struct disk_log_header found;

  memset (&found, 0x77, sizeof found);
  assert (log_header_load (fd, "dirty.dr", expect, size, &found) == -EUCLEAN);
  assert (found.version == 0x77777777); /* untouched on failure */
  ASSERT_SAYS (words);
}

static void
test_header_of_something_else_is_refused (void)
{
  struct folder folder;
  int fd = make (&folder);
  struct disk_log_header h;

  log_header_init (&h, DIRTY_MAGIC, "dr", (const uint8_t *)"another volume!!",
                   3, 100, 65536);
  assert_refused (fd, &h, SIZE, "dirty.dr belongs to another volume");
  log_header_init (&h, DIRTY_MAGIC, "other", uuid, 3, 100, 65536);
  assert_refused (fd, &h, SIZE, "dirty.dr belongs to another remote (dr)");
  log_header_init (&h, DIRTY_MAGIC, "dr", uuid, 3, 99, 65536);
  assert_refused (fd, &h, SIZE, "100 entries instead of 99");
  log_header_init (&h, DIRTY_MAGIC, "dr", uuid, 3, 100, 4096);
  assert_refused (fd, &h, SIZE, "entries of 65536 bytes instead of 4096");
  log_header_init (&h, INFLIGHT_MAGIC, "dr", uuid, 3, 100, 65536);
  assert_refused (fd, &h, SIZE, "dirty.dr is garbled (magic)");
  h = sample ();
  h.version = htole32 (2);
  assert (log_header_store (fd, "dirty.dr", &h) == 0);
  assert_refused (fd, &h, SIZE, "version 2, this program knows only version 1");
  drop (&folder, fd);
}

static void
test_header_garbled_is_refused (void)
{
  struct folder folder;
  int fd = make (&folder);
  struct disk_log_header h = sample (), found;

  for (off_t i = 8; i < LAYOUT_PAGE; i += 11) {
    garble (&folder, "dirty.dr", i);
    assert_refused (fd, &h, SIZE, "dirty.dr is garbled (CRC)");
    garble (&folder, "dirty.dr", i);
  }
  assert (log_header_load (fd, "dirty.dr", &h, SIZE, &found) == 0);
  drop (&folder, fd);
}

static void
test_header_of_truncated_file_is_refused (void)
{
  struct folder folder;
  int fd = make (&folder);
  struct disk_log_header h = sample ();

  assert (ftruncate (fd, SIZE - 1) == 0);
  assert_refused (fd, &h, SIZE, "truncated: 20479 of 20480 bytes");
  assert (ftruncate (fd, LAYOUT_PAGE) == 0);
  assert_refused (fd, &h, SIZE, "dirty.dr is truncated: 4096 of 20480 bytes");
  assert (ftruncate (fd, 10) == 0);
  assert_refused (fd, &h, SIZE, "truncated: 10 of 20480 bytes");
  drop (&folder, fd);
}

static void
test_error_keeps_message_and_errno_words (void)
{
  char longer[3000];

  assert (set_error (-ENOENT, "cannot open %s", "x") == -ENOENT);
  assert (strcmp (last_error (), "cannot open x: No such file or directory")
          == 0);
  assert (set_message (-EUCLEAN, "was: %s", last_error ()) == -EUCLEAN);
  assert (
      strcmp (last_error (), "was: cannot open x: No such file or directory")
      == 0);
  memset (longer, 'a', sizeof longer);
  longer[sizeof longer - 1] = '\0';
  assert (set_error (-EIO, "%s", longer) == -EIO);
  assert (strlen (last_error ()) < sizeof longer);
}

static void *
read_message (void *opaque)
{
  (void)opaque;
  assert (strcmp (last_error (), "") == 0);
  set_message (-EIO, "the other thread's");
  return NULL;
}

static void
test_error_is_the_threads_own (void)
{
  pthread_t thread;

  set_message (-EIO, "mine");
  assert (pthread_create (&thread, NULL, read_message, NULL) == 0);
  assert (pthread_join (thread, NULL) == 0);
  assert (strcmp (last_error (), "mine") == 0);
}

int
main (void)
{
  RUN (test_full_io_is_all_or_an_error);
  RUN (test_full_io_on_a_pipe_fails);
  RUN (test_file_made_holds_header_and_allocated_zeroes);
  RUN (test_file_made_again_replaces_the_old);
  RUN (test_file_failed_leaves_nothing);
  RUN (test_file_failed_leaves_the_old);
  RUN (test_file_in_a_missing_folder_fails);
  RUN (test_file_past_the_size_limit_leaves_nothing);
  RUN (test_file_on_a_full_tmpfs_leaves_nothing);
  RUN (test_header_stored_loads);
  RUN (test_header_of_something_else_is_refused);
  RUN (test_header_garbled_is_refused);
  RUN (test_header_of_truncated_file_is_refused);
  RUN (test_error_keeps_message_and_errno_words);
  RUN (test_error_is_the_threads_own);
  return 0;
}
