/* SPDX-License-Identifier: BSD-3-Clause */

/* One NBD connection to a remote, over libnbd.
 *
 * Who reads the socket: whoever waits.  The first waiter becomes the poller;
 * the others sleep until their commands are answered, or until the poller
 * has its own answer and hands the role to one of them (leader and
 * followers; Schmidt et al., "Leader/Followers", 2000).  A dedicated thread
 * would cost two more context switches on every write at queue depth 1, which
 * is what a database waits for.
 *
 * Who wakes whom: a sleeper has a futex of its own, is told by it why it was
 * roused, and needs no lock to go on.  The wake itself is put off until the
 * poller holds no lock, ours or libnbd's: a sleeper that wakes to find the
 * lock taken goes to sleep again, and that was a third of all futex calls at
 * queue depth 16.
 *
 * How it ends: there is one way only.  conn_kill marks the connection dead
 * and shuts the socket down; the poller sees the end of the stream, libnbd
 * aborts what was outstanding through our callback, and every waiter wakes.
 * So when conn_wait returns, nothing refers to the waiter's buffers any more,
 * and a request never leaves the engine with a command still reading it.
 *
 * We poll a dup of libnbd's socket: libnbd closes its own as soon as it sees
 * the end, and a number that was closed may belong to somebody else by then.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <libnbd.h>

#include "conn.h"
#include "internal.h"
#include "nbdm.h"

#define DEFAULT_MAX_PAYLOAD NBDM_MAX_REQUEST /* the protocol's advice */
#define TICK_STEPS 256                       /* of libnbd in one tick at most */
#define STARVED_DEADLINES 8                  /* see overdue_locked */

struct conn {
  struct nbd_handle *nbd;
  int fd;   /* dup of libnbd's socket */
  int kick; /* eventfd: makes the poller look again */
  struct conn_info info;
  atomic_uint users;

  pthread_mutex_t lock; /* protects all below */
  bool dead;
  bool overdue; /* it died of a deadline */
  bool polling; /* somebody is the poller */
  char why[NBDM_REASON_LEN];
  struct command *oldest, *newest; /* outstanding, in order of issue */
  uint64_t nr_outstanding;
  uint64_t nr_answered;
  uint64_t answered_ns; /* when the last answer came */
  struct waiter *asleep;
};

uint64_t
now_ns (void)
{
  struct timespec ts;
  clock_gettime (CLOCK_MONOTONIC, &ts);
  return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static void
append_locked (struct conn *conn, struct command *cmd)
{
  cmd->newer = NULL;
  cmd->older = conn->newest;
  if (conn->newest)
    conn->newest->newer = cmd;
  else
    conn->oldest = cmd;
  conn->newest = cmd;
  conn->nr_outstanding++;
}

static void
unlink_locked (struct conn *conn, struct command *cmd)
{
  if (cmd->older)
    cmd->older->newer = cmd->newer;
  else
    conn->oldest = cmd->newer;
  if (cmd->newer)
    cmd->newer->older = cmd->older;
  else
    conn->newest = cmd->older;
  conn->nr_outstanding--;
}

/* What a sleeper is told. */
enum rouse {
  STILL_ASLEEP,
  ALL_ANSWERED,
  BE_THE_POLLER /* whoever said so has set conn->polling for it */
};

/* Whom this thread has roused and not woken yet.  By the time it is woken the
 * waiter may be gone from its owner's stack: waking an address nobody sleeps
 * on is no error, and whoever sleeps there by then looks again.
 */
#define MAX_TO_WAKE 64
static _Thread_local atomic_uint *to_wake[MAX_TO_WAKE];
static _Thread_local unsigned nr_to_wake;

/* Never with a lock held. */
static void
wake_roused (void)
{
  for (unsigned i = 0; i < nr_to_wake; i++)
    syscall (SYS_futex, to_wake[i], FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
  nr_to_wake = 0;
}

static void
rouse_locked (struct conn *conn, struct waiter *waiter, enum rouse why)
{
  struct waiter **p = &conn->asleep;

  while (*p != waiter)
    p = &(*p)->next;
  *p = waiter->next;
  waiter->asleep = false;
  if (nr_to_wake == MAX_TO_WAKE)
    wake_roused (); /* better under a lock than never */
  to_wake[nr_to_wake++] = &waiter->roused;
  atomic_store_explicit (&waiter->roused, why, memory_order_release);
  /* From here on the waiter may be gone. */
}

/* Go to sleep; conn->lock is held, and is not when this returns. */
static enum rouse
sleep_and_unlock (struct conn *conn, struct waiter *waiter)
{
  unsigned why;

  atomic_store_explicit (&waiter->roused, STILL_ASLEEP, memory_order_relaxed);
  waiter->asleep = true;
  waiter->next = conn->asleep;
  conn->asleep = waiter;
  pthread_mutex_unlock (&conn->lock);
  while ((why = atomic_load_explicit (&waiter->roused, memory_order_acquire))
         == STILL_ASLEEP)
    syscall (SYS_futex, &waiter->roused, FUTEX_WAIT_PRIVATE, STILL_ASLEEP, NULL,
             NULL, 0);
  return why;
}

/* libnbd calls this with its own lock held, from whichever thread polls, or
 * issues on a socket that just broke.
 */
static int
answered (void *opaque, int *error)
{
  struct command *cmd = opaque;
  struct conn *conn = cmd->conn;

  pthread_mutex_lock (&conn->lock);
  unlink_locked (conn, cmd);
  cmd->error = *error;
  cmd->done = true;
  conn->nr_answered++;
  conn->answered_ns = now_ns ();
  if (--cmd->waiter->pending == 0 && cmd->waiter->asleep)
    rouse_locked (conn, cmd->waiter, ALL_ANSWERED);
  pthread_mutex_unlock (&conn->lock);
  return 1; /* retire it in libnbd */
}

void
conn_kill (struct conn *conn, const char *why)
{
  pthread_mutex_lock (&conn->lock);
  if (!conn->dead) {
    conn->dead = true;
    snprintf (conn->why, sizeof conn->why, "%s", why);
  }
  pthread_mutex_unlock (&conn->lock);
  shutdown (conn->fd, SHUT_RDWR);
  (void)eventfd_write (conn->kick, 1);
}

/* libnbd's last word on why, without the name of its function in front.  Its
 * errors are each thread's own: one that only met the dead connection was
 * told a state of libnbd's, which explains nothing to an operator.
 */
static const char *
libnbd_words (void)
{
  const char *error = nbd_get_error ();
  const char *colon;

  if (error == NULL || strstr (error, "invalid in state"))
    return "the connection was closed";
  colon = strstr (error, ": ");
  return colon && strncmp (error, "nbd_", 4) == 0 ? colon + 2 : error;
}

/* Wait for the socket or a kick, and let libnbd take one step.  False: the
 * time was over before anything happened.
 */
static bool
poll_step (struct conn *conn, int timeout_ms)
{
  unsigned dir = nbd_aio_get_direction (conn->nbd);
  struct pollfd pfd[2] = {
    { .fd = conn->fd, .events = 0 },
    { .fd = conn->kick, .events = POLLIN },
  };

  if (dir & LIBNBD_AIO_DIRECTION_READ)
    pfd[0].events |= POLLIN;
  if (dir & LIBNBD_AIO_DIRECTION_WRITE)
    pfd[0].events |= POLLOUT;
  if (poll (pfd, 2, timeout_ms) <= 0)
    return false;
  if (pfd[1].revents) {
    eventfd_t ignored;
    (void)eventfd_read (conn->kick, &ignored);
  }
  /* An event that the state has outrun meanwhile is refused by libnbd, which
   * does no harm: the next step asks for the direction anew.
   */
  if (pfd[0].revents & (POLLIN | POLLHUP | POLLERR))
    nbd_aio_notify_read (conn->nbd);
  if (pfd[0].revents & (POLLOUT | POLLERR)
      && (nbd_aio_get_direction (conn->nbd) & LIBNBD_AIO_DIRECTION_WRITE))
    nbd_aio_notify_write (conn->nbd);
  /* Before those it strands are woken, or they would not know why. */
  if (nbd_aio_is_dead (conn->nbd) || nbd_aio_is_closed (conn->nbd))
    conn_kill (conn, nbd_aio_is_dead (conn->nbd)
                         ? libnbd_words ()
                         : "the server closed the connection");
  wake_roused ();
  return true;
}

static int
check_info (struct conn *conn)
{
  struct nbd_handle *nbd = conn->nbd;
  int64_t size = nbd_get_size (nbd);
  int64_t min = nbd_get_block_size (nbd, LIBNBD_SIZE_MINIMUM);
  int64_t max = nbd_get_block_size (nbd, LIBNBD_SIZE_MAXIMUM);

  if (size < 0)
    return set_message (-EPROTO, "%s", libnbd_words ());
  conn->info.size = (uint64_t)size;
  conn->info.min_block = min > 0 ? (uint32_t)min : 1;
  conn->info.max_payload = max > 0 && max < DEFAULT_MAX_PAYLOAD
                               ? (uint32_t)max
                               : DEFAULT_MAX_PAYLOAD;
  conn->info.read_only = nbd_is_read_only (nbd) > 0;
  conn->info.can_flush = nbd_can_flush (nbd) > 0;
  conn->info.can_fua = nbd_can_fua (nbd) > 0;
  conn->info.can_zero = nbd_can_zero (nbd) > 0;
  conn->info.can_fast_zero = nbd_can_fast_zero (nbd) > 0;
  return 0;
}

/* Drive the handshake until it is done or the time is over. */
static int
handshake (struct conn *conn, uint64_t until_ns, uint32_t timeout_ms)
{
  while (nbd_aio_is_connecting (conn->nbd)) {
    uint64_t now = now_ns ();
    unsigned dir = nbd_aio_get_direction (conn->nbd);
    struct pollfd pfd = { .fd = nbd_aio_get_fd (conn->nbd) };

    if (now >= until_ns)
      return set_message (-ETIMEDOUT, "no answer within %u ms", timeout_ms);
    if (dir & LIBNBD_AIO_DIRECTION_READ)
      pfd.events |= POLLIN;
    if (dir & LIBNBD_AIO_DIRECTION_WRITE)
      pfd.events |= POLLOUT;
    if (poll (&pfd, 1, (int)((until_ns - now) / 1000000) + 1) <= 0)
      continue;
    /* A failed step shows in the state: libnbd moves on to the next address
     * of the name by itself.
     */
    if (pfd.revents & POLLOUT)
      nbd_aio_notify_write (conn->nbd);
    else
      nbd_aio_notify_read (conn->nbd);
  }
  if (!nbd_aio_is_ready (conn->nbd)) {
    int err = nbd_get_errno ();
    return set_message (err ? -err : -ECONNREFUSED, "%s", libnbd_words ());
  }
  return 0;
}

static void
conn_free (struct conn *conn)
{
  nbd_close (conn->nbd);
  if (conn->fd >= 0)
    close (conn->fd);
  if (conn->kick >= 0)
    close (conn->kick);
  pthread_mutex_destroy (&conn->lock);
  free (conn);
}

int
conn_open (const char *uri, uint32_t timeout_ms, struct conn **out)
{
  uint64_t until_ns = now_ns () + timeout_ms * UINT64_C (1000000);
  struct conn *conn = calloc (1, sizeof *conn);
  int rc;

  if (conn == NULL)
    return set_error (-ENOMEM, "connect");
  conn->fd = -1;
  atomic_init (&conn->users, 1);
  pthread_mutex_init (&conn->lock, NULL);
  conn->kick = eventfd (0, EFD_CLOEXEC | EFD_NONBLOCK);
  conn->nbd = nbd_create ();
  if (conn->kick < 0 || conn->nbd == NULL) {
    rc = set_error (-ENOMEM, "connect");
    goto fail;
  }
  /* The operator writes the URI, so files it names (a TLS key) are his. */
  nbd_set_uri_allow_local_file (conn->nbd, true);
  nbd_set_pread_initialize (conn->nbd, false);
  if (nbd_aio_connect_uri (conn->nbd, uri) == -1) {
    int err = nbd_get_errno ();
    rc = set_message (err ? -err : -ECONNREFUSED, "%s", libnbd_words ());
    goto fail;
  }
  rc = handshake (conn, until_ns, timeout_ms);
  if (rc == 0)
    rc = check_info (conn);
  if (rc < 0)
    goto fail;
  conn->fd = fcntl (nbd_aio_get_fd (conn->nbd), F_DUPFD_CLOEXEC, 3);
  if (conn->fd < 0) {
    rc = set_error (-errno, "connect: dup");
    goto fail;
  }
  *out = conn;
  return 0;

fail:
  conn_free (conn);
  return rc;
}

struct conn *
conn_get (struct conn *conn)
{
  atomic_fetch_add (&conn->users, 1);
  return conn;
}

void
conn_put (struct conn *conn)
{
  if (conn && atomic_fetch_sub (&conn->users, 1) == 1)
    conn_free (conn);
}

const struct conn_info *
conn_info (const struct conn *conn)
{
  return &conn->info;
}

static int64_t
send_command (struct conn *conn, struct command *cmd)
{
  nbd_completion_callback callback = { .callback = answered, .user_data = cmd };
  uint32_t flags = cmd->fua ? LIBNBD_CMD_FLAG_FUA : 0;

  switch (cmd->kind) {
  case COMMAND_READ:
    return nbd_aio_pread (conn->nbd, cmd->buf, cmd->length, cmd->offset,
                          callback, 0);
  case COMMAND_WRITE:
    return nbd_aio_pwrite (conn->nbd, cmd->buf, cmd->length, cmd->offset,
                           callback, flags);
  case COMMAND_ZERO:
    if (!cmd->may_trim)
      flags |= LIBNBD_CMD_FLAG_NO_HOLE;
    return nbd_aio_zero (conn->nbd, cmd->length, cmd->offset, callback, flags);
  case COMMAND_FLUSH:
    return nbd_aio_flush (conn->nbd, callback, 0);
  }
  abort ();
}

int
conn_issue (struct conn *conn, struct command *cmd, struct waiter *waiter)
{
  int64_t cookie;

  cmd->conn = conn;
  cmd->waiter = waiter;
  cmd->error = 0;
  cmd->done = false;
  cmd->issued_ns = now_ns ();

  pthread_mutex_lock (&conn->lock);
  if (conn->dead) {
    pthread_mutex_unlock (&conn->lock);
    return -ENOTCONN;
  }
  append_locked (conn, cmd);
  waiter->pending++;
  pthread_mutex_unlock (&conn->lock);

  cookie = send_command (conn, cmd);
  if (cookie != -1 && nbd_aio_is_dead (conn->nbd))
    conn_kill (conn, libnbd_words ());
  wake_roused (); /* of a socket that broke just now */
  if (cookie == -1) {
    /* Not queued, so the callback is never called. */
    conn_kill (conn, libnbd_words ());
    pthread_mutex_lock (&conn->lock);
    unlink_locked (conn, cmd);
    waiter->pending--;
    pthread_mutex_unlock (&conn->lock);
    return -ENOTCONN;
  }
  /* The socket is full: the poller has to wait for room in it as well. */
  if (nbd_aio_get_direction (conn->nbd) & LIBNBD_AIO_DIRECTION_WRITE)
    (void)eventfd_write (conn->kick, 1);
  return 0;
}

/* The poller leaves: somebody who still waits has to take over. */
static void
resign_locked (struct conn *conn)
{
  conn->polling = false;
  for (struct waiter *w = conn->asleep; w; w = w->next)
    if (w->pending > 0) {
      conn->polling = true;
      rouse_locked (conn, w, BE_THE_POLLER);
      return;
    }
}

void
conn_wait (struct conn *conn, struct waiter *waiter)
{
  bool poller = false;

  pthread_mutex_lock (&conn->lock);
  while (waiter->pending > 0) {
    if (!poller && conn->polling) {
      if (sleep_and_unlock (conn, waiter) == ALL_ANSWERED)
        return;
      poller = true;
      pthread_mutex_lock (&conn->lock);
      continue;
    }
    poller = conn->polling = true;
    pthread_mutex_unlock (&conn->lock);
    poll_step (conn, -1);
    pthread_mutex_lock (&conn->lock);
  }
  if (poller)
    resign_locked (conn);
  pthread_mutex_unlock (&conn->lock);
  wake_roused ();
}

int
conn_pread (struct conn *conn, uint8_t *buf, uint64_t count, uint64_t offset)
{
  uint64_t max = conn->info.max_payload;

  while (count > 0) {
    struct waiter waiter = WAITER_INIT;
    struct command cmd = { .kind = COMMAND_READ,
                           .buf = buf,
                           .offset = offset,
                           .length = count < max ? count : max };

    if (conn_issue (conn, &cmd, &waiter) < 0)
      return -ENOTCONN;
    conn_wait (conn, &waiter);
    if (cmd.error)
      return -cmd.error;
    buf += cmd.length;
    offset += cmd.length;
    count -= cmd.length;
  }
  return 0;
}

bool
conn_answered_all (struct conn *conn, const struct waiter *waiter)
{
  bool all;

  pthread_mutex_lock (&conn->lock);
  all = waiter->pending == 0;
  pthread_mutex_unlock (&conn->lock);
  return all;
}

/* Overdue: older than the deadline, and nothing else was answered for as long
 * either.  A slow link with much under way is not a hung server, and killing
 * it would only send the same bytes again.  But one command that starves
 * while others are answered must not hang its client: that is what
 * STARVED_DEADLINES is for.
 */
static bool
overdue_locked (const struct conn *conn, uint64_t deadline_ns)
{
  uint64_t now = now_ns ();
  uint64_t issued, progress;

  if (conn->dead || conn->oldest == NULL)
    return false;
  issued = conn->oldest->issued_ns;
  progress = conn->answered_ns > issued ? conn->answered_ns : issued;
  return (now > progress && now - progress > deadline_ns)
         || (now > issued && now - issued > STARVED_DEADLINES * deadline_ns);
}

void
conn_tick (struct conn *conn, uint32_t deadline_ms)
{
  char why[NBDM_REASON_LEN];
  bool overdue;

  pthread_mutex_lock (&conn->lock);
  if (!conn->polling) {
    conn->polling = true;
    pthread_mutex_unlock (&conn->lock);
    /* All that is possible: while every client's thread is at the local disk
     * nobody else moves a long write along.
     */
    for (int i = 0; i < TICK_STEPS && poll_step (conn, 0); i++)
      ;
    pthread_mutex_lock (&conn->lock);
    resign_locked (conn);
    pthread_mutex_unlock (&conn->lock);
    wake_roused ();
    pthread_mutex_lock (&conn->lock);
  }
  overdue = overdue_locked (conn, deadline_ms * UINT64_C (1000000));
  if (overdue)
    conn->overdue = true;
  pthread_mutex_unlock (&conn->lock);

  if (overdue) {
    snprintf (why, sizeof why, "a command was not answered within %g s",
              deadline_ms / 1000.0);
    conn_kill (conn, why);
  }
}

void
conn_farewell (struct conn *conn)
{
  if (!conn_dead (conn))
    (void)nbd_aio_disconnect (conn->nbd, 0);
  wake_roused ();
  conn_kill (conn, "disconnected");
}

struct conn_report
conn_report (struct conn *conn)
{
  struct conn_report report;

  pthread_mutex_lock (&conn->lock);
  report = (struct conn_report){ .dead = conn->dead,
                                 .overdue = conn->overdue,
                                 .outstanding = conn->nr_outstanding,
                                 .answered = conn->nr_answered };
  memcpy (report.why, conn->why, sizeof report.why);
  pthread_mutex_unlock (&conn->lock);
  return report;
}

bool
conn_dead (struct conn *conn)
{
  return conn_report (conn).dead;
}
