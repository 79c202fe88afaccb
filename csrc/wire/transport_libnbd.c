/* SPDX-License-Identifier: BSD-3-Clause */

/* The handshake, and the general transport: libnbd carries every command,
 * over TLS as well as over a plain socket.
 *
 * libnbd has its own lock and calls our callback with it held, on the thread
 * that polls, or that issues on a socket that just broke.  A command ends only
 * in this callback, also when the connection dies: libnbd then aborts the
 * outstanding commands.
 *
 * We poll a dup of libnbd's socket: libnbd closes its own as soon as it sees
 * the end of the stream, and the number may then belong to another file.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <libnbd.h>

#include "base/clock.h"
#include "base/error.h"
#include "wire/conn.h"
#include "wire/receive.h"
#include "wire/silence.h"
#include "wire/transport.h"
#include "wire/transport_libnbd.h"

#define DEFAULT_MAX_PAYLOAD (32u << 20) /* the protocol's advice */

/* libnbd's last error, without the name of its function in front.  libnbd keeps
 * errors for each thread: a thread that only met the dead connection gets
 * libnbd's state name, which explains nothing to an operator.
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
  int64_t size = nbd_get_size (nbd), min, max;
  char *description;

  /* Releases of libnbd differ in what they say of it, if anything. */
  if (size < 0)
    return set_message (-EPROTO,
                        "it says that its disk has 2^63 bytes or more");
  min = nbd_get_block_size (nbd, LIBNBD_SIZE_MINIMUM);
  max = nbd_get_block_size (nbd, LIBNBD_SIZE_MAXIMUM);
  conn->info.size = (uint64_t)size;
  conn->info.min_block = min > 0 ? (uint32_t)min : 1;
  conn->info.max_payload = max > 0 && max < DEFAULT_MAX_PAYLOAD
                               ? (uint32_t)max
                               : DEFAULT_MAX_PAYLOAD;
  description = nbd_get_export_description (nbd);
  snprintf (conn->info.description, sizeof conn->info.description, "%s",
            description ? description : "");
  free (description);
  conn->info.read_only = nbd_is_read_only (nbd) > 0;
  conn->info.can_flush = nbd_can_flush (nbd) > 0;
  conn->info.can_fua = nbd_can_fua (nbd) > 0;
  conn->info.can_zero = nbd_can_zero (nbd) > 0;
  conn->info.can_fast_zero = nbd_can_fast_zero (nbd) > 0;
  return 0;
}

/* Drive libnbd until it waits for us, or the time is over. */
static int
drive (struct conn *conn, uint64_t until_ns, uint32_t timeout_ms)
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
    if (poll (&pfd, 1, (int)((until_ns - now) / NS_PER_MS) + 1) <= 0)
      continue;
    /* A failed step shows in the state: libnbd moves on to the next address
     * of the name by itself.
     */
    if (pfd.revents & POLLOUT)
      nbd_aio_notify_write (conn->nbd);
    else
      nbd_aio_notify_read (conn->nbd);
  }
  return 0;
}

/* libnbd returns when nothing more has come.  A server may describe its export
 * again and again, and one that does not stop would keep this thread for ever.
 * libnbd reports each of its steps to a callback, which checks the time.
 */
struct patience {
  const struct conn *conn;
  int fd; /* libnbd's */
  uint64_t until_ns;
  bool over;
};

/* Otherwise libnbd has closed it, and the number may belong to another file. */
static bool
is_same_socket (int one, int other)
{
  struct stat a, b;

  return fstat (one, &a) == 0 && fstat (other, &b) == 0 && a.st_dev == b.st_dev
         && a.st_ino == b.st_ino;
}

/* End the handshake when the time is over.  After a shutdown libnbd could read
 * on: the received bytes stay, and over TCP more come.  So another descriptor
 * replaces libnbd's socket.
 */
static int
look_at_time (void *opaque, const char *context, const char *message)
{
  struct patience *p = opaque;

  (void)context;
  (void)message;
  if (!p->over && now_ns () >= p->until_ns
      && is_same_socket (p->fd, p->conn->fd)) {
    p->over = true;
    (void)dup3 (p->conn->kick, p->fd, O_CLOEXEC);
  }
  return 0;
}

/* Ask for the export; whatever the server says before is of bounded length. */
static int
choose_export (struct conn *conn, uint64_t until_ns, uint32_t timeout_ms)
{
  struct patience patience = { .conn = conn,
                               .fd = nbd_aio_get_fd (conn->nbd),
                               .until_ns = until_ns };
  nbd_debug_callback callback
      = { .callback = look_at_time, .user_data = &patience };
  int rc;

  nbd_set_debug_callback (conn->nbd, callback);
  nbd_set_debug (conn->nbd, true);
  rc = nbd_aio_opt_go (conn->nbd, NBD_NULL_COMPLETION) == -1
           ? 0 /* shows in the state */
           : drive (conn, until_ns, timeout_ms);
  nbd_set_debug (conn->nbd, false);
  nbd_clear_debug_callback (conn->nbd);
  if (rc == 0 && patience.over)
    rc = set_message (-ETIMEDOUT, "no answer within %u ms", timeout_ms);
  return rc;
}

/* A dup of libnbd's socket. */
static int
dup_socket (struct conn *conn)
{
#ifdef __SANITIZE_THREAD__
  /* The thread sanitizer knows the ordering of dup, not of fcntl's dup. */
  conn->fd = dup (nbd_aio_get_fd (conn->nbd));
#else
  conn->fd = fcntl (nbd_aio_get_fd (conn->nbd), F_DUPFD_CLOEXEC, 3);
#endif
  return conn->fd < 0 ? set_error (-errno, "connect: dup") : 0;
}

static int
handshake (struct conn *conn, uint64_t until_ns, uint32_t timeout_ms)
{
  int rc = drive (conn, until_ns, timeout_ms);

  /* Otherwise it has failed, or is of the old style. */
  if (rc == 0
      && (nbd_aio_is_negotiating (conn->nbd) || nbd_aio_is_ready (conn->nbd)))
    rc = dup_socket (conn);
  if (rc == 0 && nbd_aio_is_negotiating (conn->nbd))
    rc = choose_export (conn, until_ns, timeout_ms);
  if (rc == 0 && !nbd_aio_is_ready (conn->nbd)) {
    int err = nbd_get_errno ();
    rc = set_message (err ? -err : -ECONNREFUSED, "%s", libnbd_words ());
  }
  return rc;
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
  /* The operator writes the URI, so libnbd may read the files that it names,
   * such as a TLS key.
   */
  nbd_set_uri_allow_local_file (conn->nbd, true);
  nbd_set_pread_initialize (conn->nbd, false);
  nbd_set_full_info (conn->nbd, true); /* for the description */
  /* They carry nothing that we ask for, and the plain transport reads none. */
  nbd_set_request_structured_replies (conn->nbd, false);
  nbd_set_opt_mode (conn->nbd, true); /* stop before the export is asked for */
  if (nbd_aio_connect_uri (conn->nbd, uri) == -1) {
    int err = nbd_get_errno ();
    return set_message (err ? -err : -ECONNREFUSED, "%s", libnbd_words ());
  }
  /* It receives nothing before the first step of the handshake.  Over TCP the
   * socket may be another one by then, and there it makes no difference.
   */
  receive_prepare (nbd_aio_get_fd (conn->nbd));
  rc = handshake (conn, until_ns, timeout_ms);
  return rc < 0 ? rc : check_info (conn);
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
  conn_wake_deferred (); /* of a socket that broke just now */
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

/* libnbd sends at once; the later steps send what the socket has no room for.
 */
static void
push (struct conn *conn, const struct waiter *waiter)
{
  (void)conn;
  (void)waiter;
}

/* Count the bytes that the kernel does not, by what the socket holds. */
static void
notify_read (struct conn *conn)
{
  int there;

  if (!conn->kernel_counts && ioctl (conn->fd, FIONREAD, &there) == 0
      && there > 0)
    counter_add (&conn->came, (uint64_t)there);
  nbd_aio_notify_read (conn->nbd);
}

static void
notify_write (struct conn *conn)
{
  uint64_t before = conn->kernel_counts ? 0 : socket_queue (conn), after;

  nbd_aio_notify_write (conn->nbd);
  after = conn->kernel_counts ? 0 : socket_queue (conn);
  if (after > before)
    counter_add (&conn->went, after - before);
}

/* libnbd does not report how much of it is still unsent. */
static uint64_t
unsent_of_oldest (const struct conn *conn)
{
  return command_bytes (TAILQ_FIRST (&conn->commands));
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
  /* libnbd refuses an event that its state has outrun.  That does no harm: the
   * next step asks for the direction again.
   */
  if (pfd[0].revents & (POLLIN | POLLHUP | POLLERR))
    notify_read (conn);
  if (pfd[0].revents & (POLLOUT | POLLERR)
      && (nbd_aio_get_direction (conn->nbd) & LIBNBD_AIO_DIRECTION_WRITE))
    notify_write (conn);
  /* Before the waiters wake: they need the reason. */
  if (nbd_aio_is_dead (conn->nbd) || nbd_aio_is_closed (conn->nbd))
    conn_kill (conn, nbd_aio_is_dead (conn->nbd)
                         ? libnbd_words ()
                         : "the server closed the connection");
  conn_wake_deferred ();
  return true;
}

static void
goodbye (struct conn *conn)
{
  (void)nbd_aio_disconnect (conn->nbd, 0);
  conn_wake_deferred ();
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
  .unsent_of_oldest = unsent_of_oldest,
  .close = libnbd_close,
};
