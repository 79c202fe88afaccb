/* SPDX-License-Identifier: BSD-3-Clause */

/* The sending half of the plain transport. transport_plain.c explains when a
 * command leaves, and which thread sends.
 */

#define _GNU_SOURCE
#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "api.h"
#include "base/clock.h"
#include "wire/conn.h"
#include "wire/gather.h"
#include "wire/plain.h"
#include "wire/protocol.h"
#include "wire/silence.h"
#include "wire/transport.h"
#include "wire/transport_plain.h"

#define BATCH_BYTES (256u << 10) /* no command joins a batch of that size */
#define SEND_AT_ONCE (64u << 10) /* bytes: large enough not to wait */
/* A thread that sends for all ends its turn after both of these.  The time
 * alone would not do: the thread may lose its core.
 */
#define TURN_BATCHES 64u
#define TURN_NS UINT64_C (10000000)

static size_t
payload_size (const struct command *cmd)
{
  return cmd->kind == COMMAND_WRITE ? cmd->length : 0;
}

static void
fill_request (struct nbd_request *request, const struct command *cmd)
{
  static const uint16_t types[] = { [COMMAND_READ] = NBD_CMD_READ,
                                    [COMMAND_WRITE] = NBD_CMD_WRITE,
                                    [COMMAND_ZERO] = NBD_CMD_WRITE_ZEROES,
                                    [COMMAND_FLUSH] = NBD_CMD_FLUSH };
  uint16_t flags = cmd->fua ? NBD_CMD_FLAG_FUA : 0;

  assert (cmd->length <= UINT32_MAX);
  if (cmd->kind == COMMAND_ZERO && !cmd->may_trim)
    flags |= NBD_CMD_FLAG_NO_HOLE;
  *request = (struct nbd_request){ .magic = htobe32 (NBD_REQUEST_MAGIC),
                                   .flags = htobe16 (flags),
                                   .type = htobe16 (types[cmd->kind]),
                                   .cookie = htobe64 (cmd->cookie),
                                   .offset = htobe64 (cmd->offset),
                                   .length = htobe32 ((uint32_t)cmd->length) };
}

/* Collect a batch, beginning with `unsent`. */
static void
gather_locked (struct plain *plain, struct msghdr *msg)
{
  struct command *cmd = plain->unsent;
  size_t skip = plain->head_sent, bytes = 0;
  unsigned i;

  for (i = 0; cmd && i < BATCH_COMMANDS && bytes < BATCH_BYTES; i++) {
    size_t size = sizeof (struct nbd_request) + payload_size (cmd) - skip;

    plain->batch[i] = (struct batched){ cmd, size };
    fill_request (&plain->requests[i], cmd);
    gather (msg, &plain->requests[i], sizeof (struct nbd_request), &skip);
    gather (msg, cmd->buf, payload_size (cmd), &skip);
    bytes += size;
    cmd->sent = COMMAND_LEAVING;
    cmd = TAILQ_NEXT (cmd, link);
  }
  plain->nr_batched = i;
}

/* `bytes` bytes of the batch have left.  False: a command was answered that had
 * not been sent completely.
 */
static bool
sent_locked (struct conn *conn, size_t bytes)
{
  struct plain *plain = conn->plain;
  bool sane = true;

  for (unsigned i = 0; i < plain->nr_batched; i++) {
    const struct batched *one = &plain->batch[i];
    struct command *cmd = one->cmd;

    if (bytes < one->size) {
      cmd->sent = COMMAND_QUEUED;
      plain->head_sent += bytes;
      bytes = 0;
      sane = sane && !cmd->replied;
      continue;
    }
    cmd->sent = COMMAND_SENT;
    plain->unsent = TAILQ_NEXT (cmd, link);
    plain->head_sent = 0;
    bytes -= one->size;
    if (cmd->complete) {
      atomic_fetch_sub (&plain->nr_early, 1);
      conn_answer_locked (conn, cmd, cmd->error, now_ns ());
    }
  }
  plain->nr_batched = 0;
  return sane;
}

void
plain_describe_loss (int err, char *why, size_t max)
{
  if (err == 0 || err == EPIPE || err == ECONNRESET)
    snprintf (why, max, "the server closed the connection");
  else if (err == EBADMSG)
    snprintf (why, max, "it sent open files with its answers");
  else if (err == EPROTO)
    snprintf (why, max, "TLS failed: the bytes that came are not the server's");
  else
    snprintf (why, max, "the connection broke: %s", strerror (err));
}

/* The result of a sendmsg.  1: continue; 0: the socket is full; -1: the
 * connection is over, for the reason in `why`.
 */
static int
outcome_locked (struct conn *conn, ssize_t n, int err, char *why)
{
  if (n < 0 && err != EAGAIN && err != EINTR) {
    plain_describe_loss (err, why, NBDM_REASON_LEN);
    return -1;
  }
  if (n > 0)
    counter_add (&conn->went, (size_t)n);
  if (!sent_locked (conn, n < 0 ? 0 : (size_t)n)) {
    snprintf (why, NBDM_REASON_LEN, "it answered a command before it had it");
    return -1;
  }
  return n >= 0 || err == EINTR;
}

bool
plain_has_unsent (const struct conn *conn)
{
  return conn->plain->unsent && !conn->plain->sending && !conn->dead;
}

/* Send one batch.  Releases the lock during the send.  False: the socket is
 * full (MSG_DONTWAIT), or has had no room for LOOK_UP_MS (0).
 */
static bool
send_batch_relock (struct conn *conn, int flags)
{
  struct plain *plain = conn->plain;
  struct iovec iov[2 * BATCH_COMMANDS];
  struct msghdr msg = { .msg_iov = iov };
  char why[NBDM_REASON_LEN];
  int err, result;
  ssize_t n;

  gather_locked (plain, &msg);
  plain->sending = true;
  pthread_mutex_unlock (&conn->lock);
  n = stream_send (&conn->stream, &msg, flags);
  err = errno;
  pthread_mutex_lock (&conn->lock);
  plain->sending = false;
  result = outcome_locked (conn, n, err, why);
  if (result < 0) {
    /* At once: in between no thread may send, or believe an answer. */
    conn_die_locked (conn, why);
    pthread_mutex_unlock (&conn->lock);
    conn_kill (conn, why);
    pthread_mutex_lock (&conn->lock);
  }
  return result != 0;
}

/* `full` tells the poller to send the rest: for a full socket, and after this
 * thread's turn.
 */
static void
leave_rest_locked (struct plain *plain)
{
  if (!plain->sending)
    atomic_store (&plain->full, plain->unsent != NULL);
}

/* Send until nothing is left, the socket is full, or this thread's turn is
 * over.  No effect while another thread sends.  Releases the lock during a
 * send.  True: the socket is full.
 */
static bool
push_relock (struct conn *conn)
{
  uint64_t until = now_ns () + TURN_NS;
  bool room = true;

  for (unsigned i = 0; room && plain_has_unsent (conn)
                       && (i < TURN_BATCHES || now_ns () < until);
       i++)
    room = send_batch_relock (conn, MSG_DONTWAIT);
  leave_rest_locked (conn->plain);
  return !room;
}

/* The same for a full socket: sendmsg waits for room, LOOK_UP_MS at most, as
 * the waiter's commands may be answered by then.  Within its turn the thread
 * also sends what others add: to hand over costs more.  Releases the lock.
 */
static void
push_full_relock (struct conn *conn, const struct waiter *waiter)
{
  uint64_t until = now_ns () + TURN_NS;

  while (plain_has_unsent (conn)
         && (waiter->pending > 0 || now_ns () < until)) {
    send_batch_relock (conn, 0);
    pthread_mutex_unlock (&conn->lock);
    conn_wake_deferred ();
    pthread_mutex_lock (&conn->lock);
  }
  leave_rest_locked (conn->plain);
}

/* Send a flush at once: its issuer flushes the local disk at the same time.  A
 * waiter with a mailbox issues several commands, then pushes once.
 */
static bool
is_urgent_locked (const struct conn *conn, const struct command *cmd)
{
  return !cmd->waiter->box
         && (TAILQ_FIRST (&conn->commands) == cmd || cmd->kind == COMMAND_FLUSH
             || payload_size (cmd) >= SEND_AT_ONCE);
}

int
plain_issue (struct conn *conn, struct command *cmd, struct waiter *waiter)
{
  struct plain *plain = conn->plain;
  int rc;

  pthread_mutex_lock (&conn->lock);
  rc = conn_begin_locked (conn, cmd, waiter);
  if (rc == 0) {
    cmd->cookie = ++plain->cookie;
    cmd->sent = COMMAND_QUEUED;
    cmd->replied = cmd->complete = false;
    if (plain->unsent == NULL)
      plain->unsent = cmd;
    if (is_urgent_locked (conn, cmd))
      push_relock (conn);
  }
  pthread_mutex_unlock (&conn->lock);
  conn_wake_deferred ();
  return rc;
}

void
plain_push (struct conn *conn, const struct waiter *waiter)
{
  pthread_mutex_lock (&conn->lock);
  if (push_relock (conn) && waiter)
    push_full_relock (conn, waiter);
  pthread_mutex_unlock (&conn->lock);
  conn_wake_deferred ();
}

uint64_t
plain_unsent_of_oldest (const struct conn *conn)
{
  const struct command *oldest = TAILQ_FIRST (&conn->commands);

  if (oldest->sent == COMMAND_SENT)
    return 0;
  return sizeof (struct nbd_request) + payload_size (oldest)
         - (conn->plain->unsent == oldest ? conn->plain->head_sent : 0);
}
