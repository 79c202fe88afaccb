/* SPDX-License-Identifier: BSD-3-Clause */

/* The handshake, and the general transport: libnbd carries every command,
 * over TLS as well as over a plain socket.
 *
 * libnbd has a lock of its own and calls us back with it held, from whichever
 * thread polls, or issues on a socket that just broke.  Its callback is the
 * only place where a command ends; also when the connection dies: libnbd then
 * aborts what was outstanding.
 *
 * We poll a dup of libnbd's socket: libnbd closes its own as soon as it sees
 * the end, and a number that was closed may belong to somebody else by then.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <libnbd.h>

#include "transport.h"

#define DEFAULT_MAX_PAYLOAD NBDM_MAX_REQUEST /* the protocol's advice */

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

/* --- The handshake --------------------------------------------------- */

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

int
libnbd_connect (struct conn *conn, const char *uri, uint64_t until_ns,
                uint32_t timeout_ms)
{
  int rc;

  conn->kick = eventfd (0, EFD_CLOEXEC | EFD_NONBLOCK);
  conn->nbd = nbd_create ();
  if (conn->kick < 0 || conn->nbd == NULL)
    return set_error (-ENOMEM, "connect");
  /* The operator writes the URI, so files it names (a TLS key) are his. */
  nbd_set_uri_allow_local_file (conn->nbd, true);
  nbd_set_pread_initialize (conn->nbd, false);
  /* They carry nothing that we ask for, and the plain transport reads none. */
  nbd_set_request_structured_replies (conn->nbd, false);
  if (nbd_aio_connect_uri (conn->nbd, uri) == -1) {
    int err = nbd_get_errno ();
    return set_message (err ? -err : -ECONNREFUSED, "%s", libnbd_words ());
  }
  rc = handshake (conn, until_ns, timeout_ms);
  if (rc == 0)
    rc = check_info (conn);
  if (rc < 0)
    return rc;
#ifdef __SANITIZE_THREAD__
  /* It knows what a dup is ordered with, and not fcntl's. */
  conn->fd = dup (nbd_aio_get_fd (conn->nbd));
#else
  conn->fd = fcntl (nbd_aio_get_fd (conn->nbd), F_DUPFD_CLOEXEC, 3);
#endif
  return conn->fd < 0 ? set_error (-errno, "connect: dup") : 0;
}

/* --- Commands -------------------------------------------------------- */

static int
answered (void *opaque, int *error)
{
  struct command *cmd = opaque;
  struct conn *conn = cmd->conn;

  pthread_mutex_lock (&conn->lock);
  conn_answer_locked (conn, cmd, *error, now_ns ());
  pthread_mutex_unlock (&conn->lock);
  return 1; /* retire it in libnbd */
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

static void
interrupt (struct conn *conn)
{
  (void)eventfd_write (conn->kick, 1);
}

static int
issue (struct conn *conn, struct command *cmd, struct waiter *waiter)
{
  int64_t cookie;
  int rc;

  pthread_mutex_lock (&conn->lock);
  rc = conn_begin_locked (conn, cmd, waiter);
  pthread_mutex_unlock (&conn->lock);
  if (rc < 0)
    return rc;

  cookie = send_command (conn, cmd);
  if (cookie != -1 && nbd_aio_is_dead (conn->nbd))
    conn_kill (conn, libnbd_words ());
  conn_wake_roused (); /* of a socket that broke just now */
  if (cookie == -1) {
    /* Not queued, so the callback is never called. */
    conn_kill (conn, libnbd_words ());
    pthread_mutex_lock (&conn->lock);
    conn_withdraw_locked (conn, cmd);
    pthread_mutex_unlock (&conn->lock);
    return -ENOTCONN;
  }
  /* The socket is full: the poller has to wait for room in it as well. */
  if (nbd_aio_get_direction (conn->nbd) & LIBNBD_AIO_DIRECTION_WRITE)
    interrupt (conn);
  return 0;
}

/* libnbd sends at once, and what the socket has no room for with the steps. */
static void
push (struct conn *conn, bool wait)
{
  (void)conn;
  (void)wait;
}

static bool
step (struct conn *conn, bool wait)
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
  if (poll (pfd, 2, wait ? -1 : 0) <= 0)
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
  conn_wake_roused ();
  return true;
}

static void
goodbye (struct conn *conn)
{
  (void)nbd_aio_disconnect (conn->nbd, 0);
  conn_wake_roused ();
}

static void
libnbd_close (struct conn *conn)
{
  nbd_close (conn->nbd);
}

const struct transport libnbd_transport = {
  .issue = issue,
  .push = push,
  .step = step,
  .interrupt = interrupt,
  .goodbye = goodbye,
  .close = libnbd_close,
};
