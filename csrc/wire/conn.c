/* SPDX-License-Identifier: BSD-3-Clause */

/* One NBD connection to a remote: which thread waits for which commands, and
 * how the connection ends.  One of two transports moves the bytes
 * (transport.h).
 *
 * A waiter reads the socket.  The first waiter becomes the poller; the others
 * sleep until their commands are answered, or until the poller has its own
 * answer and hands the role to one of them (leader and followers; Schmidt et
 * al., "Leader/Followers", 2000).  A dedicated thread would cost two more
 * context switches on every write at queue depth 1, the case of a database.
 *
 * The poller wakes the others.  Each sleeper has a futex of its own, which
 * tells it why it wakes, and needs no lock to go on.  The wake itself is
 * put off until the poller holds no lock, ours or libnbd's: a sleeper that
 * wakes to find the lock taken goes to sleep again, and that was a third of all
 * futex calls at queue depth 16.
 *
 * A connection ends in one way only.  conn_kill marks the connection dead and
 * shuts the socket down; the poller sees the end of the stream, its transport
 * ends what was outstanding, and every waiter wakes.  So when conn_wait
 * returns, nothing refers to the waiter's buffers any more, and a request never
 * leaves the engine with a command still reading it.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/lock.h"
#include "wire/conn.h"
#include "wire/mailbox.h"
#include "wire/nbd_uri.h"
#include "wire/receive.h"
#include "wire/secure_connect.h"
#include "wire/silence.h"
#include "wire/tls_secrets.h"
#include "wire/transport.h"
#include "wire/transport_libnbd.h"
#include "wire/transport_plain.h"

#define TICK_STEPS 256 /* in one tick at most */

static void
append_locked (struct conn *conn, struct command *cmd)
{
  TAILQ_INSERT_TAIL (&conn->commands, cmd, link);
  conn->nr_outstanding += !is_ask (conn, cmd);
  conn->bytes_outstanding += command_bytes (cmd);
  cmd->bytes = conn->bytes_outstanding;
}

static void
unlink_locked (struct conn *conn, struct command *cmd)
{
  TAILQ_REMOVE (&conn->commands, cmd, link);
  conn->nr_outstanding -= !is_ask (conn, cmd);
  conn->bytes_outstanding -= command_bytes (cmd);
}

/* Why a sleeper wakes. */
enum wake_reason {
  STILL_ASLEEP,
  ALL_ANSWERED,
  BE_THE_POLLER /* the thread that wakes it has set conn->polling for it */
};

/* The sleepers that this thread wakes later.  By then the waiter may be gone
 * from its owner's stack.  That is safe: a wake of an address on which no
 * thread sleeps is no error, and a thread that sleeps there for another reason
 * checks again.
 */
#define MAX_TO_WAKE 32
static _Thread_local atomic_uint *to_wake[MAX_TO_WAKE];
static _Thread_local unsigned nr_to_wake;

/* The caller holds no lock, or the woken thread may find it taken.  Only a
 * caller that kills a connection may hold the volume's lock.
 */
void
conn_wake_deferred (void)
{
  for (unsigned i = 0; i < nr_to_wake; i++)
    syscall (SYS_futex, to_wake[i], FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
  nr_to_wake = 0;
  mailbox_ring_all ();
}

static void
defer_wake_locked (struct conn *conn, struct waiter *waiter,
                   enum wake_reason why)
{
  struct waiter **p = &conn->asleep;

  while (*p != waiter)
    p = &(*p)->next;
  *p = waiter->next;
  waiter->asleep = false;
  if (nr_to_wake == MAX_TO_WAKE)
    conn_wake_deferred (); /* a wake under a lock is better than none */
  to_wake[nr_to_wake++] = &waiter->wake_reason;
  atomic_store_explicit (&waiter->wake_reason, why, memory_order_release);
  /* From here on the waiter may be freed. */
}

/* Go to sleep.  The caller holds conn->lock; this releases it. */
static enum wake_reason
sleep_and_unlock (struct conn *conn, struct waiter *waiter)
{
  unsigned why;

  atomic_store_explicit (&waiter->wake_reason, STILL_ASLEEP,
                         memory_order_relaxed);
  waiter->asleep = true;
  waiter->next = conn->asleep;
  conn->asleep = waiter;
  pthread_mutex_unlock (&conn->lock);
  while (
      (why = atomic_load_explicit (&waiter->wake_reason, memory_order_acquire))
      == STILL_ASLEEP)
    syscall (SYS_futex, &waiter->wake_reason, FUTEX_WAIT_PRIVATE, STILL_ASLEEP,
             NULL, NULL, 0);
  return why;
}

int
conn_begin_locked (struct conn *conn, struct command *cmd,
                   struct waiter *waiter)
{
  if (conn->dead)
    return -ENOTCONN;
  cmd->conn = conn;
  cmd->waiter = waiter;
  cmd->error = 0;
  cmd->issued_ns = now_ns ();
  append_locked (conn, cmd);
  waiter->pending++;
  return 0;
}

void
conn_withdraw_locked (struct conn *conn, struct command *cmd)
{
  unlink_locked (conn, cmd);
  cmd->waiter->pending--;
}

void
conn_answer_locked (struct conn *conn, struct command *cmd, int error,
                    uint64_t now)
{
  unlink_locked (conn, cmd);
  cmd->error = error;
  cmd->answered_ns = now;
  conn->nr_answered += !is_ask (conn, cmd);
  conn->answered_ns = now;
  if (--cmd->waiter->pending > 0)
    return;
  if (cmd->waiter->box)
    mailbox_post (cmd->waiter);
  else if (cmd->waiter->asleep)
    defer_wake_locked (conn, cmd->waiter, ALL_ANSWERED);
}

ssize_t
conn_sendmsg (int fd, const struct msghdr *msg, int flags)
{
#ifdef __SANITIZE_THREAD__
  /* A send of no bytes orders all before it ahead of the receiving thread. */
  (void)send (fd, NULL, 0, MSG_DONTWAIT | MSG_NOSIGNAL);
#endif
#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
  return syscall (SYS_sendmsg, fd, msg, flags);
#else
  return sendmsg (fd, msg, flags);
#endif
}

static void
conn_free (struct conn *conn)
{
  conn->transport->close (conn);
  stream_end (&conn->stream);
  tls_secrets_free (conn->secrets);
  if (conn->fd >= 0)
    close_socket (conn->fd);
  if (conn->kick >= 0)
    close (conn->kick);
  silence_free (conn);
  pthread_mutex_destroy (&conn->lock);
  free (conn);
}

static int
make_connection (struct conn *conn, const char *uri, uint64_t until_ns,
                 uint32_t timeout_ms)
{
  bool ours = (nbd_uri_is_secure (uri) || nbd_uri_is_claim (uri))
              && plain_can_secure ();
  int rc = (ours ? secure_connect : libnbd_connect) (conn, uri, until_ns,
                                                     timeout_ms);

  if (rc < 0)
    return rc;
  return ours ? plain_begin (conn) : plain_take_over (conn);
}

int
conn_open (const char *uri, uint32_t timeout_ms, struct conn **out)
{
  uint64_t until_ns = now_ns () + timeout_ms * NS_PER_MS;
  struct conn *conn = calloc (1, sizeof *conn);
  int rc;

  if (conn == NULL)
    return set_error (-ENOMEM, "connect");
  conn->fd = conn->kick = -1;
  conn->stream = stream_plain (-1);
  conn->transport = &libnbd_transport;
  TAILQ_INIT (&conn->commands);
  TAILQ_INIT (&conn->watchers);
  atomic_init (&conn->users, 1);
  pthread_mutex_init (&conn->lock, NULL);
  rc = make_connection (conn, uri, until_ns, timeout_ms);
  if (rc >= 0)
    rc = silence_init (conn);
  if (rc < 0) {
    conn_free (conn);
    return rc;
  }
  *out = conn;
  return 0;
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

void
conn_without_zeroes (struct conn *conn)
{
  conn->info.can_zero = conn->info.can_fast_zero = false;
}

int
conn_issue (struct conn *conn, struct command *cmd, struct waiter *waiter)
{
  return conn->transport->issue (conn, cmd, waiter);
}

/* Is no thread the poller, or is the poller absent? */
static bool
lacks_poller_locked (const struct conn *conn)
{
  return !conn->polling || conn->absent_poller;
}

static void
become_poller_locked (struct conn *conn)
{
  conn->polling = true;
  conn->absent_poller = NULL;
}

static void
unlist_locked (struct conn *conn, struct watcher *watcher)
{
  if (!watcher->listed)
    return;
  TAILQ_REMOVE (&conn->watchers, watcher, link);
  watcher->listed = false;
}

/* The poller leaves: a thread that still waits must take over.  If the watcher
 * is at the local disk for long, the ticker takes over.  But the ticker skips
 * dead connections, so all watchers of a dead one are rung.
 */
static void
hand_over_locked (struct conn *conn)
{
  conn->polling = false;
  conn->absent_poller = NULL;
  for (struct waiter *w = conn->asleep; w; w = w->next)
    if (w->pending > 0) {
      conn->polling = true;
      defer_wake_locked (conn, w, BE_THE_POLLER);
      return;
    }
  while (!TAILQ_EMPTY (&conn->watchers)) {
    struct watcher *first = TAILQ_FIRST (&conn->watchers);

    unlist_locked (conn, first);
    mailbox_ring (first->box);
    if (!conn->dead)
      break;
  }
}

void
conn_die_locked (struct conn *conn, const char *why)
{
  if (conn->dead)
    return;
  conn->dead = true;
  snprintf (conn->why, sizeof conn->why, "%s", why);
}

void
conn_kill (struct conn *conn, const char *why)
{
  pthread_mutex_lock (&conn->lock);
  conn_die_locked (conn, why);
  if (lacks_poller_locked (conn)) /* else the poller sees the end */
    hand_over_locked (conn);
  pthread_mutex_unlock (&conn->lock);
  shutdown (conn->fd, SHUT_RDWR);
  conn->transport->interrupt (conn);
  conn_wake_deferred ();
}

void
conn_wait (struct conn *conn, struct waiter *waiter)
{
  bool poller = false;

  conn->transport->push (conn, waiter);
  pthread_mutex_lock (&conn->lock);
  while (waiter->pending > 0) {
    if (!poller && !lacks_poller_locked (conn)) {
      if (sleep_and_unlock (conn, waiter) == ALL_ANSWERED)
        return;
      poller = true;
      pthread_mutex_lock (&conn->lock);
      continue;
    }
    poller = true;
    become_poller_locked (conn);
    pthread_mutex_unlock (&conn->lock);
    conn->transport->step (conn, true);
    pthread_mutex_lock (&conn->lock);
  }
  if (poller)
    hand_over_locked (conn);
  pthread_mutex_unlock (&conn->lock);
  conn_wake_deferred ();
}

void
conn_push (struct conn *conn)
{
  conn->transport->push (conn, NULL);
}

bool
conn_watchable (const struct conn *conn)
{
  return conn->transport->has_unsent != NULL;
}

int
conn_fd (const struct conn *conn)
{
  return conn->fd;
}

short
conn_before_poll (struct conn *conn, struct watcher *watcher)
{
  short events = 0;

  LOCK_FOR_SCOPE (&conn->lock);
  watcher->polling = lacks_poller_locked (conn);
  if (watcher->polling) {
    become_poller_locked (conn);
    unlist_locked (conn, watcher);
    events |= POLLIN;
  }
  else if (!watcher->listed) {
    TAILQ_INSERT_TAIL (&conn->watchers, watcher, link);
    watcher->listed = true;
  }
  if (conn->transport->has_unsent (conn))
    events |= POLLOUT;
  return events;
}

void
conn_after_poll (struct conn *conn, struct watcher *watcher, short events)
{
  if (events & POLLOUT)
    conn->transport->push (conn, NULL);
  if (!watcher->polling)
    return;
  if (events & ~POLLOUT)
    conn->transport->step (conn, false);
  watcher->polling = false;
  pthread_mutex_lock (&conn->lock);
  if (conn->dead)
    hand_over_locked (conn); /* killed while it polled */
  else
    conn->absent_poller = watcher;
  pthread_mutex_unlock (&conn->lock);
  conn_wake_deferred ();
}

void
conn_unwatch (struct conn *conn, struct watcher *watcher)
{
  pthread_mutex_lock (&conn->lock);
  unlist_locked (conn, watcher);
  if (conn->absent_poller == watcher)
    conn->absent_poller = NULL;
  else if (conn->polling) {
    pthread_mutex_unlock (&conn->lock);
    return;
  }
  hand_over_locked (conn);
  pthread_mutex_unlock (&conn->lock);
  conn_wake_deferred ();
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
  LOCK_FOR_SCOPE (&conn->lock);
  return waiter->pending == 0;
}

void
conn_tick (struct conn *conn, uint32_t deadline_ms, uint64_t hurry_ns)
{
  /* The issuer may be at the local disk for long. */
  conn->transport->push (conn, NULL);
  pthread_mutex_lock (&conn->lock);
  if (lacks_poller_locked (conn)) {
    become_poller_locked (conn);
    pthread_mutex_unlock (&conn->lock);
    /* As much as possible: while every client's thread is at the local disk,
     * only the ticker moves a long write along.
     */
    for (int i = 0; i < TICK_STEPS && conn->transport->step (conn, false); i++)
      ;
    pthread_mutex_lock (&conn->lock);
    hand_over_locked (conn);
  }
  pthread_mutex_unlock (&conn->lock);
  conn_wake_deferred ();
  silence_tick (conn, deadline_ms * NS_PER_MS, hurry_ns);
}

void
conn_farewell (struct conn *conn)
{
  if (!conn_dead (conn))
    conn->transport->goodbye (conn);
  conn_kill (conn, "disconnected");
}

struct conn_report
conn_report (struct conn *conn)
{
  struct conn_report report;

  LOCK_FOR_SCOPE (&conn->lock);
  report = (struct conn_report){ .dead = conn->dead,
                                 .overdue = conn->overdue,
                                 .outstanding = conn->nr_outstanding,
                                 .answered = conn->nr_answered };
  memcpy (report.why, conn->why, sizeof report.why);
  return report;
}

bool
conn_dead (struct conn *conn)
{
  return conn_report (conn).dead;
}
