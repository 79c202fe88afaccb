/* SPDX-License-Identifier: BSD-3-Clause */

/* One NBD connection to a remote: who waits for what, and how it ends.  The
 * bytes are moved by one of two transports (transport.h).
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
 * and shuts the socket down; the poller sees the end of the stream, its
 * transport ends what was outstanding, and every waiter wakes.  So when
 * conn_wait returns, nothing refers to the waiter's buffers any more, and a
 * request never leaves the engine with a command still reading it.
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
#include <time.h>
#include <unistd.h>

#include "mailbox.h"
#include "transport.h"

#define TICK_STEPS 256      /* in one tick at most */
#define STARVED_DEADLINES 8 /* see overdue_locked */

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

/* With no lock held, or who wakes may find it taken: only where a connection is
 * killed somebody may hold the volume's.
 */
void
conn_wake_roused (void)
{
  for (unsigned i = 0; i < nr_to_wake; i++)
    syscall (SYS_futex, to_wake[i], FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
  nr_to_wake = 0;
  mailbox_ring_all ();
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
    conn_wake_roused (); /* better under a lock than never */
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
  conn->nr_answered++;
  conn->answered_ns = now;
  if (--cmd->waiter->pending > 0)
    return;
  if (cmd->waiter->box)
    mailbox_tell (cmd->waiter);
  else if (cmd->waiter->asleep)
    rouse_locked (conn, cmd->waiter, ALL_ANSWERED);
}

ssize_t
conn_sendmsg (int fd, const struct msghdr *msg, int flags)
{
#ifdef __SANITIZE_THREAD__
  /* Of no bytes: what came before is ordered before whoever receives. */
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
  conn->fd = conn->kick = -1;
  conn->transport = &libnbd_transport;
  atomic_init (&conn->users, 1);
  pthread_mutex_init (&conn->lock, NULL);
  rc = libnbd_connect (conn, uri, until_ns, timeout_ms);
  if (rc == 0)
    rc = plain_take_over (conn);
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

int
conn_issue (struct conn *conn, struct command *cmd, struct waiter *waiter)
{
  return conn->transport->issue (conn, cmd, waiter);
}

/* The poller's part can be had: there is none, or it is away. */
static bool
is_free_locked (const struct conn *conn)
{
  return !conn->polling || conn->lender;
}

static void
take_part_locked (struct conn *conn)
{
  conn->polling = true;
  conn->lender = NULL;
}

static void
unlist_locked (struct conn *conn, struct watcher *watcher)
{
  struct watcher **p = &conn->watchers;

  if (!watcher->listed)
    return;
  while (*p != watcher)
    p = &(*p)->next;
  *p = watcher->next;
  watcher->listed = false;
}

/* The poller leaves: somebody who still waits has to take over.  A watcher may
 * be at the local disk, for long: then the ticker does it.  But it looks at
 * none that is dead, so of that one all are told.
 */
static void
resign_locked (struct conn *conn)
{
  conn->polling = false;
  conn->lender = NULL;
  for (struct waiter *w = conn->asleep; w; w = w->next)
    if (w->pending > 0) {
      conn->polling = true;
      rouse_locked (conn, w, BE_THE_POLLER);
      return;
    }
  while (conn->watchers) {
    struct watcher *first = conn->watchers;

    unlist_locked (conn, first);
    mailbox_ring (first->box);
    if (!conn->dead)
      break;
  }
}

void
conn_kill (struct conn *conn, const char *why)
{
  pthread_mutex_lock (&conn->lock);
  if (!conn->dead) {
    conn->dead = true;
    snprintf (conn->why, sizeof conn->why, "%s", why);
  }
  if (is_free_locked (conn)) /* else the poller sees the end */
    resign_locked (conn);
  pthread_mutex_unlock (&conn->lock);
  shutdown (conn->fd, SHUT_RDWR);
  conn->transport->interrupt (conn);
  conn_wake_roused ();
}

void
conn_wait (struct conn *conn, struct waiter *waiter)
{
  bool poller = false;

  conn->transport->push (conn, true);
  pthread_mutex_lock (&conn->lock);
  while (waiter->pending > 0) {
    if (!poller && !is_free_locked (conn)) {
      if (sleep_and_unlock (conn, waiter) == ALL_ANSWERED)
        return;
      poller = true;
      pthread_mutex_lock (&conn->lock);
      continue;
    }
    poller = true;
    take_part_locked (conn);
    pthread_mutex_unlock (&conn->lock);
    conn->transport->step (conn, true);
    pthread_mutex_lock (&conn->lock);
  }
  if (poller)
    resign_locked (conn);
  pthread_mutex_unlock (&conn->lock);
  conn_wake_roused ();
}

void
conn_push (struct conn *conn)
{
  conn->transport->push (conn, false);
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
conn_watch (struct conn *conn, struct watcher *watcher)
{
  short events = 0;

  pthread_mutex_lock (&conn->lock);
  watcher->polling = is_free_locked (conn);
  if (watcher->polling) {
    take_part_locked (conn);
    unlist_locked (conn, watcher);
    events |= POLLIN;
  }
  else if (!watcher->listed) {
    struct watcher **last = &conn->watchers;

    while (*last)
      last = &(*last)->next;
    *last = watcher;
    watcher->next = NULL;
    watcher->listed = true;
  }
  if (conn->transport->has_unsent (conn))
    events |= POLLOUT;
  pthread_mutex_unlock (&conn->lock);
  return events;
}

void
conn_lend (struct conn *conn, struct watcher *watcher, short events)
{
  if (events & POLLOUT)
    conn->transport->push (conn, false);
  if (!watcher->polling)
    return;
  if (events & ~POLLOUT)
    conn->transport->step (conn, false);
  watcher->polling = false;
  pthread_mutex_lock (&conn->lock);
  if (conn->dead)
    resign_locked (conn); /* killed before it could be lent */
  else
    conn->lender = watcher;
  pthread_mutex_unlock (&conn->lock);
  conn_wake_roused ();
}

void
conn_leave (struct conn *conn, struct watcher *watcher)
{
  pthread_mutex_lock (&conn->lock);
  unlist_locked (conn, watcher);
  if (conn->lender == watcher)
    conn->lender = NULL;
  else if (conn->polling) {
    pthread_mutex_unlock (&conn->lock);
    return;
  }
  resign_locked (conn);
  pthread_mutex_unlock (&conn->lock);
  conn_wake_roused ();
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

  /* Its issuer may be long at the local disk. */
  conn->transport->push (conn, false);
  pthread_mutex_lock (&conn->lock);
  if (is_free_locked (conn)) {
    take_part_locked (conn);
    pthread_mutex_unlock (&conn->lock);
    /* All that is possible: while every client's thread is at the local disk
     * nobody else moves a long write along.
     */
    for (int i = 0; i < TICK_STEPS && conn->transport->step (conn, false); i++)
      ;
    pthread_mutex_lock (&conn->lock);
    resign_locked (conn);
    pthread_mutex_unlock (&conn->lock);
    conn_wake_roused ();
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
    conn->transport->goodbye (conn);
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
