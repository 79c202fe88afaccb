/* SPDX-License-Identifier: BSD-3-Clause */

/* NBD's transmission phase on a plain socket, after libnbd's handshake.
 *
 * libnbd sends a header and its payload with a system call each, reads each
 * answer with one, polls before both and serialises all of it under a lock
 * that every thread meets.  Here
 *
 *   commands that meet at the socket leave with one sendmsg, headers and
 *   payloads gathered where they lie;
 *   answers come in as many as there are with one recv, and without a poll;
 *   no lock is held over either.
 *
 * When a command leaves: at once if the server has nothing to do, or if it is
 * large; else with the next push, which its issuer makes when it has done its
 * own part, the local write (as Nagle's algorithm sends: RFC 896).  Meanwhile
 * others' commands join it.  A server that has work is not kept waiting by it.
 *
 * Who sends: one thread at a time, whoever pushes first; it goes on until
 * nothing is left, so the others need not wait for their turn.
 *
 * An answer may come before sendmsg has returned to the thread that sent the
 * command; its waiter then goes, and takes the command with it.  So what the
 * sender needs of its batch when the call returns does not lie in the commands.
 * The payload does, but a server can only answer when it has it all, and then
 * the kernel has copied it; one that answers sooner is dropped.
 *
 * How it ends: conn_kill shuts the socket down, both calls return, and the
 * poller, once no sendmsg is under way, ends all that is outstanding.
 */

#define _GNU_SOURCE
#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <libnbd.h>

#include "gather.h"
#include "protocol.h"
#include "transport.h"

#define BATCH_COMMANDS 32u       /* at most, in one sendmsg */
#define BATCH_BYTES (256u << 10) /* no more join it from there on */
#define SEND_AT_ONCE (64u << 10) /* bytes: large enough not to wait */
#define INBOX_SIZE (64u << 10)   /* bytes taken in with one recv */

/* A command that a sendmsg carries. */
struct parcel {
  struct command *cmd; /* NULL: answered meanwhile, and gone */
  size_t size;         /* bytes of it that had not left before */
};

struct plain {
  /* Under conn->lock. */
  struct command *unsent; /* the first not wholly sent; the rest are newer */
  size_t head_sent;       /* bytes of it that are */
  bool sending;           /* a thread is in sendmsg, or about to be */
  uint64_t cookie;        /* the last one given */
  struct parcel parcels[BATCH_COMMANDS];
  unsigned nr_parcels;

  struct nbd_request requests[BATCH_COMMANDS]; /* who is sending's */

  /* The poller's. */
  struct command *filling; /* a read whose payload comes next */
  uint64_t filled;         /* bytes of it */
  size_t start, end;       /* of what is in the inbox */
  uint8_t inbox[INBOX_SIZE];
};

/* --- Sending --------------------------------------------------------- */

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

/* Everything from `unsent` on, as far as a batch goes. */
static void
gather_locked (struct plain *plain, struct msghdr *msg)
{
  struct command *cmd = plain->unsent;
  size_t skip = plain->head_sent, bytes = 0;
  unsigned i;

  for (i = 0; cmd && i < BATCH_COMMANDS && bytes < BATCH_BYTES; i++) {
    size_t size = sizeof (struct nbd_request) + payload_size (cmd) - skip;

    plain->parcels[i] = (struct parcel){ cmd, size };
    fill_request (&plain->requests[i], cmd);
    gather (msg, &plain->requests[i], sizeof (struct nbd_request), &skip);
    gather (msg, cmd->buf, payload_size (cmd), &skip);
    bytes += size;
    cmd->sent = COMMAND_LEAVING;
    cmd = cmd->newer;
  }
  plain->nr_parcels = i;
}

/* So many bytes of the batch have left.  False: one that has not all left was
 * answered.
 */
static bool
sent_locked (struct plain *plain, size_t bytes)
{
  bool sane = true;

  for (unsigned i = 0; i < plain->nr_parcels; i++) {
    const struct parcel *parcel = &plain->parcels[i];
    bool whole = bytes >= parcel->size;

    if (parcel->cmd)
      parcel->cmd->sent = whole ? COMMAND_SENT : COMMAND_QUEUED;
    else if (!whole)
      sane = false;
    if (parcel->cmd && whole)
      plain->unsent = parcel->cmd->newer;
    if (whole)
      plain->head_sent = 0;
    else
      plain->head_sent += bytes;
    bytes -= whole ? parcel->size : bytes;
  }
  plain->nr_parcels = 0;
  return sane;
}

/* A command that is leaving was answered. */
static void
forget_parcel_locked (struct plain *plain, const struct command *cmd)
{
  for (unsigned i = 0; i < plain->nr_parcels; i++)
    if (plain->parcels[i].cmd == cmd)
      plain->parcels[i].cmd = NULL;
  if (plain->unsent == cmd)
    plain->unsent = cmd->newer;
}

static void
describe_loss (int err, char *why, size_t max)
{
  if (err == 0 || err == EPIPE || err == ECONNRESET)
    snprintf (why, max, "the server closed the connection");
  else
    snprintf (why, max, "the connection broke: %s", strerror (err));
}

/* Send until nothing is left, or, with MSG_DONTWAIT, the socket is full.  No
 * effect while another thread does.  Drops the lock meanwhile.
 */
static void
push_locked (struct conn *conn, int flags)
{
  struct plain *plain = conn->plain;
  char why[NBDM_REASON_LEN];

  while (plain->unsent && !plain->sending && !conn->dead) {
    struct iovec iov[2 * BATCH_COMMANDS];
    struct msghdr msg = { .msg_iov = iov };
    ssize_t n;
    int err;

    gather_locked (plain, &msg);
    plain->sending = true;
    pthread_mutex_unlock (&conn->lock);
    n = conn_sendmsg (conn->fd, &msg, flags | MSG_NOSIGNAL);
    err = errno;
    pthread_mutex_lock (&conn->lock);
    plain->sending = false;
    if (n < 0 && err == EINTR)
      continue;
    if (n < 0 && err == EAGAIN)
      n = 0;
    if (n >= 0 && sent_locked (plain, (size_t)n)) {
      if (n == 0)
        return;
      continue;
    }
    if (n >= 0)
      snprintf (why, sizeof why, "it answered a command before it had it");
    else
      describe_loss (err, why, sizeof why);
    pthread_mutex_unlock (&conn->lock);
    conn_kill (conn, why);
    pthread_mutex_lock (&conn->lock);
  }
}

/* A flush is waited for by who has a slow flush of local to do meanwhile; who
 * has a mailbox issues several, and pushes once.
 */
static bool
is_urgent_locked (const struct conn *conn, const struct command *cmd)
{
  return !cmd->waiter->box
         && (conn->oldest == cmd || cmd->kind == COMMAND_FLUSH
             || payload_size (cmd) >= SEND_AT_ONCE);
}

static int
issue (struct conn *conn, struct command *cmd, struct waiter *waiter)
{
  struct plain *plain = conn->plain;
  int rc;

  pthread_mutex_lock (&conn->lock);
  rc = conn_begin_locked (conn, cmd, waiter);
  if (rc == 0) {
    cmd->cookie = ++plain->cookie;
    cmd->sent = COMMAND_QUEUED;
    if (plain->unsent == NULL)
      plain->unsent = cmd;
    if (is_urgent_locked (conn, cmd))
      push_locked (conn, MSG_DONTWAIT);
  }
  pthread_mutex_unlock (&conn->lock);
  conn_wake_roused ();
  return rc;
}

static void
push (struct conn *conn, bool wait)
{
  pthread_mutex_lock (&conn->lock);
  push_locked (conn, wait ? 0 : MSG_DONTWAIT);
  pthread_mutex_unlock (&conn->lock);
  conn_wake_roused ();
}

/* --- Taking in answers ------------------------------------------------ */

/* Servers answer about in order, so it is near the oldest. */
static struct command *
find_locked (const struct conn *conn, uint64_t cookie)
{
  struct command *cmd = conn->oldest;

  while (cmd && cmd->cookie != cookie)
    cmd = cmd->newer;
  return cmd;
}

static void
answered_locked (struct conn *conn, struct command *cmd, int error,
                 uint64_t now)
{
  if (cmd->sent == COMMAND_LEAVING)
    forget_parcel_locked (conn->plain, cmd);
  conn_answer_locked (conn, cmd, error, now);
}

/* One header.  NULL, or what is wrong with it. */
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
  if (cmd->kind == COMMAND_READ && error == 0) {
    conn->plain->filling = cmd;
    conn->plain->filled = 0;
  }
  else
    answered_locked (conn, cmd, error, now);
  return NULL;
}

/* The headers that are in the inbox, up to one with a payload. */
static const char *
take_replies (struct conn *conn)
{
  struct plain *plain = conn->plain;
  const char *wrong = NULL;
  uint64_t now = now_ns ();
  struct nbd_simple_reply reply;

  pthread_mutex_lock (&conn->lock);
  while (!wrong && !plain->filling
         && plain->end - plain->start >= sizeof (struct nbd_simple_reply)) {
    memcpy (&reply, plain->inbox + plain->start,
            sizeof (struct nbd_simple_reply));
    plain->start += sizeof (struct nbd_simple_reply);
    wrong = take_reply_locked (conn, &reply, now);
  }
  pthread_mutex_unlock (&conn->lock);
  return wrong;
}

/* More of the payload is where it belongs. */
static void
filled (struct conn *conn, size_t bytes)
{
  struct plain *plain = conn->plain;
  struct command *cmd = plain->filling;

  plain->filled += bytes;
  if (plain->filled < cmd->length)
    return;
  plain->filling = NULL;
  pthread_mutex_lock (&conn->lock);
  answered_locked (conn, cmd, 0, now_ns ());
  pthread_mutex_unlock (&conn->lock);
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
  /* What is left is less than a header. */
  memmove (plain->inbox, plain->inbox + plain->start,
           plain->end - plain->start);
  plain->end -= plain->start;
  plain->start = 0;
  return wrong;
}

/* Nothing can come any more.  A sendmsg on a socket that is shut down is about
 * to return, and reads payloads until then.
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
  while (conn->oldest)
    conn_answer_locked (conn, conn->oldest, ENOTCONN, now);
  pthread_mutex_unlock (&conn->lock);
}

static ssize_t
receive (struct conn *conn, int flags)
{
  struct plain *plain = conn->plain;
  struct command *cmd = plain->filling;

  if (cmd) /* the inbox is empty then */
    return recv (conn->fd, (char *)cmd->buf + plain->filled,
                 cmd->length - plain->filled, flags);
  return recv (conn->fd, plain->inbox + plain->end, INBOX_SIZE - plain->end,
               flags);
}

static bool
step (struct conn *conn, bool wait)
{
  struct plain *plain = conn->plain;
  ssize_t n = receive (conn, wait ? 0 : MSG_DONTWAIT);
  int err = n < 0 ? errno : 0;
  const char *wrong = NULL;
  char why[NBDM_REASON_LEN];

  if (n < 0 && err == EINTR)
    return true;
  if (n < 0 && err == EAGAIN)
    return false;
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
      describe_loss (err, why, sizeof why);
    conn_kill (conn, why); /* before those it strands are woken */
    end_all (conn);
  }
  conn_wake_roused ();
  return n > 0 && !wrong;
}

/* --- Coming and going ------------------------------------------------- */

/* The end of the stream is what makes a recv return. */
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

  (void)send (conn->fd, &request, sizeof request, MSG_DONTWAIT | MSG_NOSIGNAL);
}

static bool
has_unsent (const struct conn *conn)
{
  return conn->plain->unsent && !conn->plain->sending && !conn->dead;
}

static void
plain_close (struct conn *conn)
{
  free (conn->plain);
}

const struct transport plain_transport = {
  .issue = issue,
  .push = push,
  .step = step,
  .interrupt = interrupt,
  .goodbye = goodbye,
  .has_unsent = has_unsent,
  .close = plain_close,
};

/* Tests run over both. */
static bool
is_libnbd_asked_for (void)
{
  const char *name = getenv ("NBDM_TRANSPORT");

  return name && strcmp (name, "libnbd") == 0;
}

int
plain_take_over (struct conn *conn)
{
  int flags;

  if (is_libnbd_asked_for () || nbd_get_tls_negotiated (conn->nbd) != 0
      || nbd_get_structured_replies_negotiated (conn->nbd) != 0)
    return 1;
  flags = fcntl (conn->fd, F_GETFL);
  if (flags < 0 || fcntl (conn->fd, F_SETFL, flags & ~O_NONBLOCK) < 0)
    return set_error (-errno, "connect: the socket");
  conn->plain = calloc (1, sizeof *conn->plain);
  if (conn->plain == NULL)
    return set_error (-ENOMEM, "connect");
  /* Ours is a dup, which stays open. */
  nbd_close (conn->nbd);
  conn->nbd = NULL;
  close (conn->kick);
  conn->kick = -1;
  conn->transport = &plain_transport;
  return 0;
}
