/* SPDX-License-Identifier: BSD-3-Clause */

/* The process's log.  Its rule: output never matters.  No write to a log can
 * end, block or change a thread that serves or manages a disk.
 *
 * So only one thread writes to the real output, the writer.  All others put a
 * line into a queue of fixed size, under a lock that is never held over I/O.
 * The writer may block on a stalled pipe or terminal for any time: lines beyond
 * the queue are dropped and counted until it goes on.  If the output fails (its
 * reader is dead, its disk is full), the writer drops and counts the lines it
 * has taken and tries the next ones.  Once the output works again the log says
 * how many lines it lacks.
 *
 * O_NONBLOCK is no solution: it belongs to the open file, which this process
 * shares with the shell, the journal and every process that has it open.
 *
 * Other code writes output too: nbdkit's messages, a failed assertion, a Python
 * traceback.  So descriptors 1 and 2 become a pipe with a non-blocking write
 * end, and a second thread, the intake, moves its lines into the queue.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "api.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/lock.h"
#include "base/text.h"
#include "base/thread.h"

#define QUEUE_BYTES (256u << 10)
#define CHUNK_BYTES (16u << 10)
#define LINE_BYTES 4096u /* a longer line of other code is cut */
#define STACK_BYTES (256u << 10)
#define REST_MS 200       /* after the output failed */
#define LAST_WORDS_MS 200 /* for an assertion's message, before abort () */
#define EXIT_MS 500
#define SAY_MS 1000 /* between two looks for lines that were left out */

#define FILE_NAME "serve.log"
#define MAX_FILE_BYTES (10u << 20)
#define NR_OLD_FILES 2 /* serve.log.1 is the newer one */

/* Limits the lines of a kind: a burst, then a few a second. */
struct bucket {
  uint32_t burst, per_second;
  uint64_t tokens_ns; /* a second's worth is 10^9 / per_second each */
  uint64_t seen_ns;
  uint64_t left_out; /* since the log last said so */
  const char *what;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of all below */
static pthread_cond_t work = PTHREAD_COND_INITIALIZER;   /* there is a line */
static bool started;
static char queue[QUEUE_BYTES];
static size_t first, used;
static bool writing; /* the writer has lines that are not in the queue */
static uint64_t lost, lost_said, left_out;
static char
    partial[LINE_BYTES + 1]; /* an unfinished line of the pipe, and a NUL */
static size_t nr_partial;
static int dir_fd = -1; /* of serve.log, if the output is that file */
/* No misbehaviour of a client may fill the disk. */
static struct bucket buckets[NBDM_LOG_KINDS] = {
  [NBDM_LOG_CLIENTS] = { 100, 1, 0, 0, 0, "about clients" },
  [NBDM_LOG_OTHERS] = { 200, 2, 0, 0, 0, "of others" },
  [NBDM_LOG_STRANGERS]
  = { 100, 1, 0, 0, 0, "about connections in the handshake" },
};

static int in_fd = -1; /* set before the threads start */
/* Only the writer uses them from then on. */
static int out_fd = -1;
static uint64_t file_bytes;
static char chunk[CHUNK_BYTES];

/* --- The queue ---------------------------------------------------------- */

static void
put_locked (const char *data, size_t size)
{
  for (size_t i = 0; i < size; i++)
    queue[(first + used + i) % QUEUE_BYTES] = data[i];
  used += size;
}

/* The words of a remote or a client must not look like our own lines, nor
 * control a terminal.  Continuation lines are indented.
 */
static void
put_plain_locked (const char *words)
{
  for (const char *at = words; *at;) {
    size_t size = text_plain_char (at);

    if (size > 0)
      put_locked (at, size);
    else if (*at == '\n')
      put_locked ("\n  ", 3);
    else
      put_locked ("?", 1);
    at += size > 0 ? size : 1;
  }
}

/* The same for text that has its own lines or comes from other code: its length
 * stays the same.  A NUL follows it.
 */
static void
put_text_locked (const char *text, size_t size)
{
  for (size_t i = 0; i < size;) {
    size_t n = text[i] == '\n' ? 1 : text_plain_char (text + i);

    put_locked (n > 0 ? text + i : "?", n > 0 ? n : 1);
    i += n > 0 ? n : 1;
  }
}

static size_t
stamp (char *buf, size_t size, const char *level)
{
  struct timespec now;
  struct tm tm;
  char when[32];

  clock_gettime (CLOCK_REALTIME, &now);
  gmtime_r (&now.tv_sec, &tm);
  strftime (when, sizeof when, "%Y-%m-%dT%H:%M:%S", &tm);
  return (size_t)snprintf (buf, size, "%s.%03ldZ %s ", when,
                           now.tv_nsec / 1000000, level);
}

static void
line_locked (const char *level, const char *words)
{
  char head[64];
  size_t n = stamp (head, sizeof head, level);

  if (n + 3 * strlen (words) + 1 > QUEUE_BYTES - used) {
    lost++;
    return;
  }
  put_locked (head, n);
  put_plain_locked (words);
  put_locked ("\n", 1);
  pthread_cond_signal (&work);
}

/* --- Limits ------------------------------------------------------------- */

/* Is there a token?  Does not take it. */
static bool
has_token_locked (struct bucket *b)
{
  uint64_t now = now_ns (), each = NS_PER_S / b->per_second;

  b->tokens_ns += b->seen_ns ? now - b->seen_ns : b->burst * each;
  b->seen_ns = now;
  if (b->tokens_ns > b->burst * each)
    b->tokens_ns = b->burst * each;
  return b->tokens_ns >= each;
}

static void
say_left_out_locked (struct bucket *b)
{
  char words[96];

  if (b->left_out == 0 || !has_token_locked (b))
    return;
  snprintf (words, sizeof words, "log: %llu more lines %s were left out",
            (unsigned long long)b->left_out, b->what);
  b->left_out = 0;
  line_locked ("warning", words);
}

/* Take a token for a line; without one the line is counted as left out. */
static bool
take_token_locked (struct bucket *b)
{
  if (!has_token_locked (b)) {
    b->left_out++;
    left_out++;
    return false;
  }
  say_left_out_locked (b);
  b->tokens_ns -= NS_PER_S / b->per_second;
  return true;
}

/* --- The intake: lines from descriptors 1 and 2 -------------------------- */

static void
end_partial_locked (void)
{
  if (nr_partial == 0)
    return;
  if (take_token_locked (&buckets[NBDM_LOG_OTHERS])) {
    if (nr_partial + 1 > QUEUE_BYTES - used)
      lost++;
    else {
      partial[nr_partial] = '\0';
      put_text_locked (partial, nr_partial);
      put_locked ("\n", 1);
      pthread_cond_signal (&work);
    }
  }
  nr_partial = 0;
}

static void
take_in_locked (const char *data, size_t size)
{
  for (size_t i = 0; i < size; i++) {
    if (data[i] == '\n' || nr_partial == LINE_BYTES)
      end_partial_locked ();
    if (data[i] != '\n')
      partial[nr_partial++] = data[i];
  }
}

static void *
intake_main (void *opaque)
{
  struct pollfd in = { .fd = in_fd, .events = POLLIN };
  static char buf[LINE_BYTES];

  (void)opaque;
  for (;;) {
    int ready = poll (&in, 1, SAY_MS);

    pthread_mutex_lock (&lock);
    if (ready > 0) {
      /* Under the lock, so that every line is either in the pipe or in the
       * queue: see nbdm_log_flush.  The read cannot block: no other thread
       * reads.
       */
      ssize_t n = read (in_fd, buf, sizeof buf);

      if (n > 0)
        take_in_locked (buf, (size_t)n);
      /* No descriptor leads into the pipe any more, and none ever will.  The
       * poll would return at once each time.
       */
      else if (n == 0)
        in.fd = -1;
    }
    for (size_t i = 0; i < NBDM_LOG_KINDS; i++)
      say_left_out_locked (&buckets[i]);
    pthread_mutex_unlock (&lock);
  }
  return NULL;
}

/* --- The writer ----------------------------------------------------------- */

static uint64_t
count_lines (const char *data, size_t size)
{
  uint64_t nr = 0;

  for (size_t i = 0; i < size; i++)
    nr += data[i] == '\n';
  return nr;
}

/* Write all bytes; returns how many at the end were not written. */
static size_t
write_out (const char *data, size_t size)
{
  while (size > 0) {
    ssize_t n = write (out_fd, data, size);

    if (n < 0 && errno == EAGAIN) {
      struct pollfd out = { .fd = out_fd, .events = POLLOUT };

      /* Another process that shares the output made it non-blocking. */
      (void)poll (&out, 1, -1);
      if (out.revents & (POLLERR | POLLNVAL))
        return size;
    }
    else if (n < 0 && errno != EINTR)
      return size;
    else if (n == 0)
      return size;
    else if (n > 0) {
      data += n;
      size -= (size_t)n;
      file_bytes += (uint64_t)n;
    }
  }
  return 0;
}

/* Rename the full file and begin a new one.  Names are looked up in the
 * directory that dir_fd holds, and no symbolic link is followed: `renameat`
 * replaces a link, O_EXCL refuses one.
 */
static void
rotate (int dirfd)
{
  struct stat ours, there;
  char older[32], newer[32];
  int fd;

  file_bytes = 0; /* if this fails, try after as many bytes again */
  if (fstat (out_fd, &ours) < 0)
    return;
  if (fstatat (dirfd, FILE_NAME, &there, AT_SYMLINK_NOFOLLOW) == 0) {
    if (there.st_dev != ours.st_dev || there.st_ino != ours.st_ino)
      return; /* another program rotates it: leave that to it */
    for (int i = NR_OLD_FILES; i > 0; i--) {
      snprintf (older, sizeof older, FILE_NAME ".%d", i);
      snprintf (newer, sizeof newer, i > 1 ? FILE_NAME ".%d" : FILE_NAME,
                i - 1);
      if (renameat (dirfd, newer, dirfd, older) < 0 && errno != ENOENT)
        return;
    }
  }
  fd = openat (dirfd, FILE_NAME,
               O_WRONLY | O_APPEND | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC,
               0600);
  if (fd < 0)
    return;
  close (out_fd);
  out_fd = fd;
}

/* Report the gap before the lines that follow it. */
static bool
say_lost (uint64_t nr)
{
  char line[128];
  size_t n = stamp (line, sizeof line, "warning");

  n += (size_t)snprintf (line + n, sizeof line - n,
                         "log: %llu lines were lost here: writing failed, or "
                         "was too slow\n",
                         (unsigned long long)nr);
  return write_out (line, n) == 0;
}

/* Take whole lines, as many as fit. */
static size_t
take_out_locked (void)
{
  size_t end = 0;

  for (size_t i = 0; i < used && i < sizeof chunk; i++) {
    chunk[i] = queue[(first + i) % QUEUE_BYTES];
    if (chunk[i] == '\n')
      end = i + 1;
  }
  if (end == 0)
    end = used < sizeof chunk ? used : sizeof chunk;
  first = (first + end) % QUEUE_BYTES;
  used -= end;
  return end;
}

static void *
writer_main (void *opaque)
{
  (void)opaque;
  for (;;) {
    uint64_t gap, seen;
    size_t size, unwritten;
    bool said;
    int dirfd;

    pthread_mutex_lock (&lock);
    writing = false;
    while (used == 0)
      pthread_cond_wait (&work, &lock);
    writing = true;
    size = take_out_locked ();
    seen = lost;
    gap = lost - lost_said;
    dirfd = dir_fd;
    pthread_mutex_unlock (&lock);

    said = gap == 0 || say_lost (gap);
    unwritten = said ? write_out (chunk, size) : size;
    if (unwritten == 0 && dirfd >= 0 && file_bytes > MAX_FILE_BYTES)
      rotate (dirfd);

    pthread_mutex_lock (&lock);
    if (said)
      lost_said = seen;
    lost += count_lines (chunk + size - unwritten, unwritten);
    writing = false;
    pthread_mutex_unlock (&lock);
    if (unwritten > 0)
      sleep_ns (REST_MS * NS_PER_MS);
  }
  return NULL;
}

/* --- Start and end -------------------------------------------------------- */

/* An assertion's message is in the pipe when abort () raises its signal: give
 * the threads a moment to write it.  Then abort () ends the process.
 */
static void
last_words (int signal)
{
  (void)signal;
  sleep_ns (LAST_WORDS_MS * NS_PER_MS);
}

static void
flush_at_exit (void)
{
  nbdm_log_flush (EXIT_MS);
}

static int
start_thread (void *(*main) (void *))
{
  sigset_t all, before;
  int rc;

  /* The process's other threads take the signals. */
  sigfillset (&all);
  pthread_sigmask (SIG_SETMASK, &all, &before);
  rc = thread_start (main, NULL, STACK_BYTES);
  pthread_sigmask (SIG_SETMASK, &before, NULL);
  return rc < 0 ? set_error (rc, "cannot start a thread for the log") : 0;
}

/* Keep the real output under another number: descriptors 1 and 2 become the
 * pipe.
 */
static int
redirect (void)
{
  struct stat st;
  int ends[2];

  out_fd = fcntl (STDERR_FILENO, F_DUPFD_CLOEXEC, 3);
  if (out_fd < 0 && errno == EBADF)
    out_fd = open ("/dev/null", O_WRONLY | O_CLOEXEC);
  if (out_fd < 0 || pipe2 (ends, O_CLOEXEC) < 0)
    return set_error (-errno, "cannot make a pipe for the log");
  if (fstat (out_fd, &st) == 0 && S_ISREG (st.st_mode))
    file_bytes = (uint64_t)st.st_size;
  in_fd = ends[0];
  /* Only this end becomes non-blocking: each end of a pipe has its own flags.
   */
  (void)fcntl (ends[1], F_SETFL, O_NONBLOCK);
  if (dup2 (ends[1], STDOUT_FILENO) < 0 || dup2 (ends[1], STDERR_FILENO) < 0)
    return set_error (-errno, "cannot redirect the output");
  close (ends[1]);
  return 0;
}

int
nbdm_log_start (void)
{
  const struct sigaction act
      = { .sa_handler = last_words, .sa_flags = (int)SA_RESETHAND };
  int rc;

  if (started)
    return 0;
  signal (SIGPIPE, SIG_IGN);
  rc = redirect ();
  if (rc == 0)
    rc = start_thread (intake_main);
  if (rc == 0)
    rc = start_thread (writer_main);
  if (rc < 0)
    return rc;
  sigaction (SIGABRT, &act, NULL);
  atexit (flush_at_exit);
  LOCK_FOR_SCOPE (&lock);
  started = true;
  return 0;
}

int
nbdm_log_rotate (const char *state_dir)
{
  struct stat ours, there;
  int fd = open (state_dir, O_PATH | O_DIRECTORY | O_CLOEXEC);

  if (fd < 0)
    return set_error (-errno, "cannot open the state directory %s", state_dir);
  pthread_mutex_lock (&lock);
  if (started && dir_fd < 0 && fstat (out_fd, &ours) == 0
      && fstatat (fd, FILE_NAME, &there, AT_SYMLINK_NOFOLLOW) == 0
      && there.st_dev == ours.st_dev && there.st_ino == ours.st_ino) {
    dir_fd = fd;
    fd = -1;
  }
  pthread_mutex_unlock (&lock);
  if (fd >= 0)
    close (fd); /* the output is no such file: a journal, a terminal, a pipe */
  return 0;
}

void
nbdm_log (uint32_t kind, const char *level, const char *words)
{
  char head[64];
  bool direct;

  pthread_mutex_lock (&lock);
  if (kind < NBDM_LOG_KINDS && !take_token_locked (&buckets[kind])) {
    pthread_mutex_unlock (&lock);
    return;
  }
  direct = !started;
  if (!direct)
    line_locked (level, words);
  pthread_mutex_unlock (&lock);
  if (direct) {
    stamp (head, sizeof head, level);
    (void)dprintf (STDERR_FILENO, "%s%s\n", head, words);
  }
}

void
nbdm_log_raw (const char *text)
{
  size_t size = strlen (text);
  bool direct;

  pthread_mutex_lock (&lock);
  direct = !started;
  if (!direct && size > QUEUE_BYTES - used)
    lost += count_lines (text, size);
  else if (!direct) {
    put_text_locked (text, size);
    pthread_cond_signal (&work);
  }
  pthread_mutex_unlock (&lock);
  if (direct)
    (void)dprintf (STDERR_FILENO, "%s", text);
}

void
nbdm_log_flush (uint32_t timeout_ms)
{
  uint64_t until = now_ns () + timeout_ms * NS_PER_MS;
  bool done = false;

  while (!done) {
    int in_pipe = 0;

    pthread_mutex_lock (&lock);
    if (started && ioctl (in_fd, FIONREAD, &in_pipe) == 0 && in_pipe == 0)
      end_partial_locked ();
    done = !started || (in_pipe == 0 && used == 0 && !writing)
           || now_ns () >= until;
    pthread_mutex_unlock (&lock);
    if (!done)
      sleep_ns (2 * NS_PER_MS);
  }
}

void
nbdm_log_hand_on (void)
{
  if (!started)
    return;
  (void)dup2 (out_fd, STDOUT_FILENO);
  (void)dup2 (out_fd, STDERR_FILENO);
}

void
nbdm_log_counts (uint64_t *nr_lost, uint64_t *nr_left_out)
{
  LOCK_FOR_SCOPE (&lock);
  *nr_lost = lost;
  *nr_left_out = left_out;
}
