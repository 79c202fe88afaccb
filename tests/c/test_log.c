/* SPDX-License-Identifier: BSD-3-Clause */

/* Output never matters: whatever happens to descriptor 2, no thread that writes
 * a line waits or ends; lost lines are counted, and the count is logged as soon
 * as that is possible.
 *
 * Each case is a child, as a process has one log.
 */

#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <time.h>

#include "api.h"
#include "base/clock.h"
#include "test.h"

#define LINES 20000u /* several times what the queue holds */
#define QUICK_MS 2000
#define DEADLINE_MS 20000
#define IDLE_MS 2000

static struct folder folder;

static uint64_t
now_ms (void)
{
  return now_ns () / 1000000;
}

static uint64_t
nr_lost (void)
{
  uint64_t lost, left_out;

  nbdm_log_counts (&lost, &left_out);
  return lost;
}

/* Many lines, by far faster than a second for each that would block. */
static void
say_much (void)
{
  uint64_t begin = now_ms ();

  for (unsigned i = 0; i < LINES; i++)
    nbdm_log (NBDM_LOG_OWN, "info", "a line that is of no use to anybody");
  assert (now_ms () - begin < QUICK_MS);
}

static void
wait_lost (uint64_t more_than)
{
  uint64_t until = now_ms () + DEADLINE_MS;

  while (nr_lost () <= more_than) {
    assert (now_ms () < until);
    usleep (1000);
  }
}

static void
output_is (int fd)
{
  assert (dup2 (fd, 2) == 2 && nbdm_log_start () == 0);
}

/* Reads until `words` came; all of it is kept in `text`.  Only what is new is
 * searched: megabytes come in pieces of 4 KiB.
 */
static void
read_until (int fd, char *text, size_t size, const char *words)
{
  uint64_t until = now_ms () + DEADLINE_MS;
  size_t used = 0, from = 0, length = strlen (words);

  text[0] = '\0';
  while (!strstr (text + from, words)) {
    struct pollfd in = { .fd = fd, .events = POLLIN };
    ssize_t n;

    assert (now_ms () < until && used + 1 < size);
    if (poll (&in, 1, 100) <= 0)
      continue;
    n = read (fd, text + used, size - used - 1);
    assert (n > 0);
    from = used > length ? used - length : 0;
    used += (size_t)n;
    text[used] = '\0';
  }
}

static void
stalled (void *opaque)
{
  static char text[8 << 20];
  uint64_t lost;
  int ends[2];

  (void)opaque;
  assert (pipe (ends) == 0);
  output_is (ends[1]);
  say_much ();
  wait_lost (0);
  /* Writes of other code to this descriptor, which do not go through the log,
   * do not block either.
   */
  for (unsigned i = 0; i < LINES; i++)
    (void)!write (2, "nbdkit: error\n", 14);
  nbdm_log_flush (50); /* its time is over long before there is a reader */
  read_until (ends[0], text, sizeof text, " lines were lost here");
  /* The gap may have come early, and the queue may be full again. */
  do {
    lost = nr_lost ();
    read_until (ends[0], text, sizeof text, "\n");
    nbdm_log (NBDM_LOG_OWN, "info", "it works again");
  } while (nr_lost () > lost);
  read_until (ends[0], text, sizeof text, "it works again\n");
}

static void
reader_dead (void *opaque)
{
  int ends[2];

  (void)opaque;
  assert (pipe (ends) == 0);
  output_is (ends[1]);
  close (ends[0]);
  say_much ();
  wait_lost (0);
}

static void
disk_full (void *opaque)
{
  int fd = open ("/dev/full", O_WRONLY);

  (void)opaque;
  output_is (fd);
  say_much ();
  wait_lost (0);
}

static void
no_output (void *opaque)
{
  (void)opaque;
  close (1);
  close (2);
  assert (nbdm_log_start () == 0);
  say_much ();
}

/* A client causes many lines, and 100 are written; strangers' lines count
 * apart.
 */
static void
too_many (void *opaque)
{
  static char text[1 << 20];
  uint64_t lost, left_out;
  unsigned nr = 0;
  int ends[2];

  (void)opaque;
  assert (pipe (ends) == 0);
  output_is (ends[1]);
  for (unsigned i = 0; i < LINES; i++)
    nbdm_log (NBDM_LOG_STRANGERS, "error", "client 2: is turned away");
  for (unsigned i = 0; i < LINES; i++)
    nbdm_log (NBDM_LOG_CLIENTS, "error", "client 1: is out of its mind");
  nbdm_log_counts (&lost, &left_out);
  assert (left_out > 2 * (LINES - 200));
  read_until (ends[0], text, sizeof text, "more lines about clients were left");
  for (const char *at = text; (at = strstr (at, "client 1")); at++)
    nr++;
  assert (nr >= 100 && nr < 110);
}

/* Words from outside forge no line and control no terminal. */
static void
words (void *opaque)
{
  char text[4096];
  int ends[2];

  (void)opaque;
  assert (pipe (ends) == 0);
  output_is (ends[1]);
  nbdm_log (NBDM_LOG_OWN, "info", "he said\n2026 info \x1b[2Jno");
  nbdm_log (NBDM_LOG_OWN, "info",
            "a\xc2\x9b"
            "2J\x9b"
            "2J\x7f caf\xc3\xa9 \xe2\x82\xac \xf0\x9f\x99\x82 "
            "\xe2\x82");
  nbdm_log (NBDM_LOG_OWN, "info", /* other orders, ends of lines, long forms */
            "b\xe2\x80\xae"
            "c\xe2\x81\xa6"
            "d\xe2\x80\xa8"
            "e\xe0\x82\x9b"
            "f\xed\xa0\x80"
            "g\xf0\x80\x82\x9b \xe2\x80\x9c\xe2\x81\xaf\xed\x9f\xbf");
  nbdm_log_raw ("  a trace\x1b[2J\xc2\x9b\n\tcaf\xc3\xa9\n");
  assert (write (2, "nbdkit: \x1b[2J\0\xc2\x9b\xc3\xa9\xc3\n", 19) == 19);
  assert (write (2, "an assertion", 12) == 12);
  nbdm_log_flush (DEADLINE_MS);
  read_until (ends[0], text, sizeof text, "an assertion\n");
  assert (strstr (text, "Z info he said\n  2026 info ?[2Jno\n"));
  assert (strstr (text, "Z info a??2J?2J? caf\xc3\xa9 \xe2\x82\xac "
                        "\xf0\x9f\x99\x82 ??\n"));
  assert (strstr (text, "Z info b???c???d???e???f???g???? "
                        "\xe2\x80\x9c\xe2\x81\xaf\xed\x9f\xbf\n"));
  assert (strstr (text, "\n  a trace?[2J??\n\tcaf\xc3\xa9\n"));
  assert (strstr (text, "nbdkit: ?[2J???\xc3\xa9?\n"));
}

/* The last line of a process that an assertion ends. */
static void
assertion (void *opaque)
{
  output_is (*(int *)opaque);
  assert (write (2, "the last words\n", 15) == 15);
  abort ();
}

static void
rotated (void *opaque)
{
  const int flags = O_WRONLY | O_CREAT | O_APPEND;
  uint64_t until = now_ms () + DEADLINE_MS;
  struct stat st;

  (void)opaque;
  output_is (openat (folder.fd, "serve.log", flags, 0600));
  /* Neither is followed. */
  assert (symlinkat ("precious", folder.fd, "serve.log.1") == 0);
  assert (symlinkat ("precious", folder.fd, "serve.log.2") == 0);
  assert (nbdm_log_rotate (folder.path) == 0);
  while (fstatat (folder.fd, "serve.log.2", &st, AT_SYMLINK_NOFOLLOW) != 0
         || !S_ISREG (st.st_mode)) {
    assert (now_ms () < until);
    for (unsigned i = 0; i < 1000; i++)
      nbdm_log (NBDM_LOG_OWN, "info", "a line that is of no use to anybody");
    nbdm_log_flush (DEADLINE_MS);
  }
  nbdm_log (NBDM_LOG_OWN, "info", "the last one");
  nbdm_log_flush (DEADLINE_MS);
  assert (nr_lost () == 0);
}

static void
test_rotation (void)
{
  const off_t most = (10 << 20) + (64 << 10);

  folder = folder_make ();
  close (openat (folder.fd, "precious", O_WRONLY | O_CREAT, 0600));
  assert (passed (in_child (NULL, rotated, NULL)));
  assert (file_size (&folder, "precious") == 0);
  assert (file_size (&folder, "serve.log.1") <= most);
  assert (file_size (&folder, "serve.log.2") <= most);
  assert (file_size (&folder, "serve.log") <= most);
  folder_remove (&folder,
                 FILES ("precious", "serve.log", "serve.log.1", "serve.log.2"));
}

/* The log does not touch a file that another program put in the place of its
 * own.
 */
static void
put_aside (void *opaque)
{
  const int flags = O_WRONLY | O_CREAT | O_APPEND;

  (void)opaque;
  output_is (openat (folder.fd, "serve.log", flags, 0600));
  assert (nbdm_log_rotate (folder.path) == 0);
  assert (renameat (folder.fd, "serve.log", folder.fd, "mine") == 0);
  close (openat (folder.fd, "serve.log", flags, 0600));
  while (file_size (&folder, "mine") < (11 << 20)) {
    for (unsigned i = 0; i < 1000; i++)
      nbdm_log (NBDM_LOG_OWN, "info", "a line that is of no use to anybody");
    nbdm_log_flush (DEADLINE_MS);
  }
}

static void
test_put_aside (void)
{
  folder = folder_make ();
  assert (passed (in_child (NULL, put_aside, NULL)));
  assert (file_size (&folder, "serve.log") == 0);
  folder_remove (&folder, FILES ("serve.log", "mine"));
}

static bool starts; /* the log, at the next unlock */

int __real_pthread_mutex_unlock (pthread_mutex_t *mutex);
int __wrap_pthread_mutex_unlock (pthread_mutex_t *mutex);
int
__wrap_pthread_mutex_unlock (pthread_mutex_t *mutex)
{
  int rc = __real_pthread_mutex_unlock (mutex);

  if (starts) {
    starts = false;
    assert (nbdm_log_start () == 0);
  }
  return rc;
}

/* Another thread starts the log while a line is written: the line is in the
 * output, one way or the other.
 */
static void
started_beside_a_line (void *opaque)
{
  char text[256];
  int ends[2];

  (void)opaque;
  assert (pipe (ends) == 0 && dup2 (ends[1], 2) == 2);
  starts = true;
  nbdm_log (NBDM_LOG_OWN, "info", "the first line");
  assert (!starts);
  read_until (ends[0], text, sizeof text, "the first line\n");
}

/* No descriptor leads into the log's pipe any more: that costs no time, and the
 * log's own lines are written as before.
 */
static void
nothing_comes_in (void *opaque)
{
  struct timespec used;
  char text[256];
  int ends[2];

  (void)opaque;
  assert (pipe (ends) == 0);
  output_is (ends[1]);
  close (1);
  close (2);
  usleep (IDLE_MS * 1000);
  assert (clock_gettime (CLOCK_PROCESS_CPUTIME_ID, &used) == 0);
  assert (used.tv_sec == 0 && used.tv_nsec < IDLE_MS * 1000000L / 10);
  nbdm_log (NBDM_LOG_OWN, "info", "it goes on");
  read_until (ends[0], text, sizeof text, "it goes on\n");
}

static void
test_assertion (void)
{
  char text[64];
  int ends[2], status;

  assert (pipe (ends) == 0);
  status = in_child (NULL, assertion, &ends[1]);
  assert (WIFSIGNALED (status) && WTERMSIG (status) == SIGABRT);
  read_until (ends[0], text, sizeof text, "the last words\n");
}

#define CHILD(body) assert (passed (in_child (NULL, body, NULL)))

int
main (void)
{
  CHILD (stalled);
  CHILD (reader_dead);
  CHILD (disk_full);
  CHILD (no_output);
  CHILD (too_many);
  CHILD (words);
  CHILD (started_beside_a_line);
  CHILD (nothing_comes_in);
  RUN (test_assertion);
  RUN (test_rotation);
  RUN (test_put_aside);
  return 0;
}
