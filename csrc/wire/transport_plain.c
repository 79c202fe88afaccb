/* SPDX-License-Identifier: BSD-3-Clause */

/* NBD's transmission phase on a stream, plain or with TLS, after the handshake.
 *
 * libnbd sends a header and its payload with a system call each, reads each
 * answer with one, polls before both and serialises all of it under a lock that
 * every thread takes.  In this transport
 *
 *   commands that come together leave with one sendmsg, which gathers headers
 *   and payloads in place;
 *   one recv, without a poll, takes all answers that are there;
 *   no lock is held over either.
 *
 * When a command leaves: at once if the server has nothing to do, or if the
 * command is large.  Otherwise it leaves with the next push, which its issuer
 * makes after its own part, the local write (as Nagle's algorithm sends: RFC
 * 896).  Until then commands of other threads join it.  This never delays an
 * idle server.
 *
 * One thread at a time sends, the first that pushes.  It continues until
 * nothing is left, so the others need not wait for their turn; but after
 * TURN_NS and TURN_BATCHES it leaves the rest.  Otherwise, while other threads
 * add commands as fast as it sends them, it would never return to its own
 * client, or, as the ticker, to a deadline.  The next thread that adds a
 * command sends the rest, or the poller, or the ticker.
 *
 * No send blocks for longer than LOOK_UP_MS without room (SO_SNDTIMEO), nor
 * beyond the end of the connection, by a deadline or otherwise.  One thread
 * waits for room on behalf of all, in sendmsg, and leaves once its own commands
 * are answered: on a slow link there are always commands of others, and its
 * client would wait for them.  The poller then sends the rest.
 *
 * An answer may come before sendmsg has returned to the thread that sent the
 * command.  The answer is kept, and given to the waiter when the call has
 * returned: until then the kernel may read the command and its payload.  If the
 * command has not been sent completely by then, no honest server can have
 * answered it, and the connection ends.  So no answered command is left to
 * send.
 *
 * In TLS a command has left when its record has wholly (tls.c), and in one turn
 * no more leaves than one record buffer holds.
 *
 * The end: conn_kill shuts the socket down, both calls return, and the poller,
 * once no sendmsg is under way, ends all outstanding commands.
 */

#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <libnbd.h>

#include "api.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/lock.h"
#include "wire/conn.h"
#include "wire/plain.h"
#include "wire/protocol.h"
#include "wire/silence.h"
#include "wire/stream.h"
#include "wire/transport.h"
#include "wire/transport_plain.h"

#define LOOK_UP_MS 20 /* between looks, while a thread waits for room */

/* --- Receiving answers ------------------------------------------------ */

/* Servers answer roughly in order, so search from the oldest. */
static struct command *
find_locked (const struct conn *conn, uint64_t cookie)
{
  struct command *cmd = TAILQ_FIRST (&conn->commands);

  while (cmd && cmd->cookie != cookie)
    cmd = TAILQ_NEXT (cmd, link);
  return cmd;
}

static void
answered_locked (struct conn *conn, struct command *cmd, int error,
                 uint64_t now)
{
  if (cmd->sent == COMMAND_LEAVING) {
    cmd->error = error;
    cmd->complete = true;
    atomic_fetch_add (&conn->plain->nr_early, 1);
  }
  else
    conn_answer_locked (conn, cmd, error, now);
}

/* Process one header.  NULL, or what is wrong with it. */
static const char *
take_reply_locked (struct conn *conn, const struct nbd_simple_reply *reply,
                   uint64_t now)
{
  uint32_t number = be32toh (reply->error);
  int error = nbd_has_error (number) ? (int)number : EINVAL;
  struct command *cmd;

  if (reply->magic != htobe32 (NBD_SIMPLE_REPLY_MAGIC))
    return "it sent an answer without the magic number of one";
  cmd = find_locked (conn, be64toh (reply->cookie));
  if (cmd == NULL)
    return "it sent an answer with the cookie of no command";
  if (cmd->sent == COMMAND_QUEUED)
    return "it answered a command before it had it";
  if (cmd->replied)
    return "it answered a command twice";
  cmd->replied = true;
  if (cmd->kind == COMMAND_READ && error == 0) {
    conn->plain->filling = cmd;
    conn->plain->filled = 0;
  }
  else
    answered_locked (conn, cmd, error, now);
  return NULL;
}

/* Process the headers in the inbox, up to one with a payload. */
static const char *
take_replies (struct conn *conn)
{
  struct plain *plain = conn->plain;
  const char *wrong = NULL;
  uint64_t now = now_ns ();
  struct nbd_simple_reply reply;

  LOCK_FOR_SCOPE (&conn->lock);
  if (conn->dead)
    wrong = conn->why; /* the server's later bytes are not believed */
  while (!wrong && !plain->filling
         && plain->end - plain->start >= sizeof (struct nbd_simple_reply)) {
    memcpy (&reply, plain->inbox + plain->start,
            sizeof (struct nbd_simple_reply));
    plain->start += sizeof (struct nbd_simple_reply);
    wrong = take_reply_locked (conn, &reply, now);
  }
  return wrong;
}

/* More bytes of the payload have arrived in its buffer. */
static void
filled (struct conn *conn, size_t bytes)
{
  struct plain *plain = conn->plain;
  struct command *cmd = plain->filling;

  plain->filled += bytes;
  if (plain->filled < cmd->length)
    return;
  plain->filling = NULL;
  LOCK_FOR_SCOPE (&conn->lock);
  if (!conn->dead) /* else end_all answers it */
    answered_locked (conn, cmd, 0, now_ns ());
}

static const char *
take_in (struct conn *conn)
{
  struct plain *plain = conn->plain;
  const char *wrong = NULL;

  while (wrong == NULL) {
    size_t size = plain->end - plain->start;

    if (plain->filling && size > 0) {
      size_t left = plain->filling->length - plain->filled;
      size_t n = left < size ? left : size;

      memcpy ((char *)plain->filling->buf + plain->filled,
              plain->inbox + plain->start, n);
      plain->start += n;
      filled (conn, n);
    }
    else if (!plain->filling && size >= sizeof (struct nbd_simple_reply))
      wrong = take_replies (conn);
    else
      break;
  }
  /* The rest is less than a header. */
  memmove (plain->inbox, plain->inbox + plain->start,
           plain->end - plain->start);
  plain->end -= plain->start;
  plain->start = 0;
  return wrong;
}

/* The stream has ended.  A sendmsg on a socket that is shut down returns soon,
 * and reads payloads until then.
 */
static void
end_all (struct conn *conn)
{
  struct plain *plain = conn->plain;
  uint64_t now = now_ns ();

  plain->filling = NULL;
  plain->start = plain->end = 0;
  pthread_mutex_lock (&conn->lock);
  while (plain->sending) {
    pthread_mutex_unlock (&conn->lock);
    sched_yield ();
    pthread_mutex_lock (&conn->lock);
  }
  plain->unsent = NULL;
  atomic_store (&plain->full, false);
  atomic_store (&plain->nr_early, 0);
  while (!TAILQ_EMPTY (&conn->commands))
    conn_answer_locked (conn, TAILQ_FIRST (&conn->commands), ENOTCONN, now);
  pthread_mutex_unlock (&conn->lock);
}

static ssize_t
receive_some (struct conn *conn, int flags)
{
  struct plain *plain = conn->plain;
  struct command *cmd = plain->filling;
  struct iovec iov = { plain->inbox + plain->end, INBOX_SIZE - plain->end };

  if (cmd) /* then the inbox is empty */
    iov = (struct iovec){ (char *)cmd->buf + plain->filled,
                          cmd->length - plain->filled };
  return stream_receive (&conn->stream, &iov, 1, flags);
}

/* The poller waits here while the socket is full.  The thread that waits for
 * room leaves once it has its answers, and a poller in recv would not send the
 * rest.
 */
static void
await_either (struct conn *conn)
{
  struct pollfd pfd = { .fd = conn->fd, .events = POLLIN };
  bool sending;

  pthread_mutex_lock (&conn->lock);
  sending = conn->plain->sending;
  if (plain_has_unsent (conn))
    pfd.events |= POLLOUT;
  pthread_mutex_unlock (&conn->lock);
  (void)poll (&pfd, 1, sending ? LOOK_UP_MS : -1);
  if (pfd.revents & POLLOUT)
    plain_push (conn, NULL);
}

static bool
step_once (struct conn *conn, bool wait)
{
  struct plain *plain = conn->plain;
  /* Kept answers become valid when a sendmsg returns, which wakes no recv; it
   * returns soon.
   */
  bool soon = atomic_load (&plain->nr_early) > 0;
  bool full = wait && !soon && atomic_load (&plain->full);
  const char *wrong = NULL;
  char why[NBDM_REASON_LEN];
  ssize_t n;
  int err;

  if (full)
    await_either (conn);
  n = receive_some (conn, wait && !soon && !full ? 0 : MSG_DONTWAIT);
  err = n < 0 ? errno : 0;
  if (n < 0 && err == EINTR)
    return true;
  if (n < 0 && err == EAGAIN) {
    if (wait)
      sched_yield ();
    return false;
  }
  if (n > 0)
    counter_add (&conn->came, (size_t)n);
  if (n > 0 && plain->filling)
    filled (conn, (size_t)n);
  else if (n > 0) {
    plain->end += (size_t)n;
    wrong = take_in (conn);
  }
  if (n <= 0 || wrong) {
    if (wrong)
      snprintf (why, sizeof why, "%s", wrong);
    else
      plain_describe_loss (err, why, sizeof why);
    conn_kill (conn, why); /* before its waiters wake */
    end_all (conn);
  }
  conn_wake_deferred ();
  return n > 0 && !wrong;
}

/* Poll on the socket does not report what the stream has received, so none of
 * it is left.
 */
static bool
step (struct conn *conn, bool wait)
{
  bool some = step_once (conn, wait), more = some;

  while (more && stream_has_input (&conn->stream))
    more = step_once (conn, false);
  return some;
}

/* --- Coming and going ------------------------------------------------- */

/* The end of the stream makes a recv return. */
static void
interrupt (struct conn *conn)
{
  (void)conn;
}

static void
goodbye (struct conn *conn)
{
  struct nbd_request request = { .magic = htobe32 (NBD_REQUEST_MAGIC),
                                 .type = htobe16 (NBD_CMD_DISC) };
  struct iovec iov = { &request, sizeof request };
  const struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };

  LOCK_FOR_SCOPE (&conn->lock);
  if (conn->plain->unsent) /* not into the middle of a request */
    return;
  (void)stream_send (&conn->stream, &msg, MSG_DONTWAIT);
  stream_part (&conn->stream);
}

static void
plain_close (struct conn *conn)
{
  free (conn->plain);
}

const struct transport plain_transport = {
  .issue = plain_issue,
  .push = plain_push,
  .step = step,
  .interrupt = interrupt,
  .goodbye = goodbye,
  .unsent_of_oldest = plain_unsent_of_oldest,
  .has_unsent = plain_has_unsent,
  .close = plain_close,
};

/* Tests run over both transports. */
static bool
tests_force_libnbd (void)
{
  const char *name = getenv ("NBDM_TRANSPORT");

  return name && strcmp (name, "libnbd") == 0;
}

bool
plain_can_secure (void)
{
  return !tests_force_libnbd ();
}

int
plain_begin (struct conn *conn)
{
  const struct timeval look_up = { .tv_usec = LOOK_UP_MS * 1000 };

  if (setsockopt (conn->fd, SOL_SOCKET, SO_SNDTIMEO, &look_up, sizeof look_up)
      < 0)
    return set_error (-errno, "connect: the socket");
  conn->plain = calloc (1, sizeof *conn->plain);
  if (conn->plain == NULL)
    return set_error (-ENOMEM, "connect");
  conn->transport = &plain_transport;
  return 0;
}

int
plain_take_over (struct conn *conn)
{
  int flags, rc;

  if (tests_force_libnbd () || nbd_get_tls_negotiated (conn->nbd) != 0
      || nbd_get_structured_replies_negotiated (conn->nbd) != 0)
    return 1;
  flags = fcntl (conn->fd, F_GETFL);
  if (flags < 0 || fcntl (conn->fd, F_SETFL, flags & ~O_NONBLOCK) < 0)
    return set_error (-errno, "connect: the socket");
  rc = plain_begin (conn);
  if (rc < 0)
    return rc;
  conn->stream = stream_plain (conn->fd);
  /* Our socket is a dup, which stays open. */
  nbd_close (conn->nbd);
  conn->nbd = NULL;
  close (conn->kick);
  conn->kick = -1;
  return 0;
}
