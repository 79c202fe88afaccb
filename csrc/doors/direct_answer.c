/* SPDX-License-Identifier: BSD-3-Clause */

/* The direct door's answers: make their bytes and send them.
 *
 * Answers are queued, and one thread at a time sends them, all queued ones with
 * one system call; another thread leaves its answer to the sending one.  A
 * session's thread never blocks in a send: otherwise a client that does not
 * read would delay the requests whose remote answers this thread must receive,
 * and the ranges that they hold.  A worker blocks shortly, since a worker that
 * sends a megabyte saves the session's thread the time.  Then it leaves the
 * rest to that thread, or clients that do not read would occupy all workers.
 */

#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <linux/sockios.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "base/clock.h"
#include "base/lock.h"
#include "doors/direct.h"
#include "doors/direct_answer.h"
#include "doors/direct_memory.h"
#include "wire/gather.h"
#include "wire/mailbox.h"
#include "wire/protocol.h"
#include "wire/receive.h"

#define ANSWERS_AT_ONCE 64 /* in one send */
#define LINGER_MS 500      /* wait for the last answers to arrive */
#define LINGER_STEP_MS 5
#define WAITING_BYTES (256u << 10) /* bytes of one send that may block */

/* --- Ops and their buffers ----------------------------------------------- */

static void
op_free (struct op *op)
{
  free (op->buf);
  free (op);
}

static struct op *
take_spare_locked (struct session *s, size_t room)
{
  struct op **p = &s->spare;
  struct op *op;

  while (*p && (*p)->room < room && (*p)->next)
    p = &(*p)->next;
  op = *p;
  if (op) {
    *p = op->next;
    s->kept -= op->room;
    /* It may be larger than what was promised, and it stays in use. */
    if (s->promised < op->room)
      s->promised = op->room;
  }
  return op;
}

/* Keep buffers for reuse: a new large one is a new mapping with page faults. */
static bool
has_room (struct op *op, size_t room)
{
  if (op->room >= room)
    return true;
  free (op->buf);
  op->buf = malloc (room);
  op->room = op->buf ? room : 0;
  return op->buf != NULL;
}

struct op *
op_get (struct session *s, size_t room)
{
  struct op *op;

  pthread_mutex_lock (&s->lock);
  op = take_spare_locked (s, room);
  pthread_mutex_unlock (&s->lock);
  if (op == NULL)
    op = calloc (1, sizeof *op);
  if (op == NULL)
    return NULL;
  if (!has_room (op, room)) {
    op_free (op);
    return NULL;
  }
  op->session = s;
  pthread_mutex_lock (&s->lock);
  s->nr_ops++;
  s->bytes += op->room;
  s->promised = 0;
  pthread_mutex_unlock (&s->lock);
  return op;
}

static void
op_put_locked (struct op *op)
{
  struct session *s = op->session;

  s->nr_ops--;
  s->bytes -= op->room;
  if (s->kept + op->room > DIRECT_KEEP_BYTES
      || (s->charged > 0 && budget_is_short (s))) {
    op_free (op);
    budget_settle_locked (s);
    return;
  }
  s->kept += op->room;
  op->next = s->spare;
  s->spare = op;
}

void
spare_free_locked (struct session *s)
{
  struct op *op;

  while ((op = s->spare)) {
    s->spare = op->next;
    s->kept -= op->room;
    op_free (op);
  }
  budget_settle_locked (s);
}

void
op_drop (struct op *op)
{
  struct session *s = op->session;

  LOCK_FOR_SCOPE (&s->lock);
  op_put_locked (op);
}

/* --- Their bytes ---------------------------------------------------------- */

static uint32_t
wire_error (int rc)
{
  uint32_t error = (uint32_t)-rc;

  return nbd_has_error (error) ? error : EIO;
}

static void
fill_simple (struct op *op, int rc)
{
  struct nbd_simple_reply head = { .magic = htobe32 (NBD_SIMPLE_REPLY_MAGIC),
                                   .error = htobe32 (wire_error (rc)),
                                   .cookie = htobe64 (op->cookie) };

  memcpy (op->head, &head, sizeof head);
  op->head_size = sizeof head;
}

/* One chunk, the last one: the head holds `extra` more bytes of it. */
static void
fill_chunk (struct op *op, uint16_t type, const void *extra, size_t size)
{
  struct nbd_chunk head
      = { .magic = htobe32 (NBD_CHUNK_MAGIC),
          .flags = htobe16 (NBD_CHUNK_DONE),
          .type = htobe16 (type),
          .cookie = htobe64 (op->cookie),
          .length = htobe32 ((uint32_t)(size + op->body_size)) };

  memcpy (op->head, &head, sizeof head);
  memcpy (op->head + sizeof head, extra, size);
  op->head_size = sizeof head + size;
}

static void
fill_answer (struct op *op, int rc)
{
  bool chunked
      = op->session->agreed.structured
        && (op->type == NBD_CMD_READ || op->type == NBD_CMD_BLOCK_STATUS);
  struct __attribute__ ((packed)) {
    uint32_t error;
    uint16_t message_length;
  } error = { .error = htobe32 (wire_error (rc)) };
  uint64_t offset = htobe64 (op->offset);
  uint32_t context = htobe32 (DIRECT_CONTEXT);

  if (!chunked)
    fill_simple (op, rc);
  else if (rc < 0)
    fill_chunk (op, NBD_CHUNK_ERROR, &error, sizeof error);
  else if (op->type == NBD_CMD_READ)
    fill_chunk (op, NBD_CHUNK_OFFSET_DATA, &offset, sizeof offset);
  else
    fill_chunk (op, NBD_CHUNK_BLOCK_STATUS, &context, sizeof context);
}

static void
finish_op (struct op *op, int rc, size_t body_size)
{
  op->body_size = rc < 0 ? 0 : body_size;
  op->refused = rc == -ESHUTDOWN;
  fill_answer (op, rc);
  op->next = NULL;
}

/* A stopping volume refused the request and did not carry it out.  The client
 * gets no answer, as it would take ESHUTDOWN for an error of the disk.  The
 * connection ends instead, and a client that reconnects sends the request again
 * to the next server.
 */
static void
queue_locked (struct op *op)
{
  struct session *s = op->session;

  if (op->refused)
    atomic_store (&s->ending, true);
  if (s->dead || op->refused)
    op_put_locked (op);
  else if (s->last)
    s->last = s->last->next = op;
  else
    s->first = s->last = op;
}

void
answer_put (struct op *op, int rc, size_t body_size)
{
  struct session *s = op->session;

  finish_op (op, rc, body_size);
  LOCK_FOR_SCOPE (&s->lock);
  queue_locked (op);
}

/* --- Their way into the socket -------------------------------------------- */

static size_t
answer_size (const struct op *op)
{
  return op->head_size + op->body_size;
}

static void
gather_locked (const struct session *s, struct msghdr *msg)
{
  size_t skip = s->first_sent;
  struct op *op = s->first;

  for (int i = 0; op && i < ANSWERS_AT_ONCE; i++, op = op->next) {
    gather (msg, op->head, op->head_size, &skip);
    gather (msg, op->buf, op->body_size, &skip);
  }
}

static void
drop_first_locked (struct session *s)
{
  struct op *op = s->first;

  s->first = op->next;
  if (s->first == NULL) {
    s->last = NULL;
    s->slow = false;
  }
  op_put_locked (op);
}

static void
sent_locked (struct session *s, size_t bytes)
{
  s->first_sent += bytes;
  while (s->first && s->first_sent >= answer_size (s->first)) {
    s->first_sent -= answer_size (s->first);
    drop_first_locked (s);
  }
}

/* The client no longer reads. */
static void
die_locked (struct session *s)
{
  s->dead = true;
  s->first_sent = 0;
  while (s->first)
    drop_first_locked (s);
  shutdown (s->fd, SHUT_RDWR);
}

static void
shorten (struct msghdr *msg, size_t max)
{
  for (size_t i = 0; i < msg->msg_iovlen; i++) {
    struct iovec *iov = &msg->msg_iov[i];

    if (iov->iov_len >= max) {
      iov->iov_len = max;
      msg->msg_iovlen = i + 1;
      return;
    }
    max -= iov->iov_len;
  }
}

/* A blocking send has the socket's own time-out, DIRECT_SEND_MS, for each piece
 * that the kernel makes of it.  So a client that reads a little in that time
 * could keep the worker for ever: the worker sends few pieces at once, and none
 * after that time.
 */
static void
push_relock (struct session *s, bool may_wait)
{
  uint64_t until = may_wait ? now_ns () + DIRECT_SEND_MS * NS_PER_MS : 0;

  while (s->first && !s->sending) {
    struct iovec iov[2 * ANSWERS_AT_ONCE];
    struct msghdr msg = { .msg_iov = iov };
    ssize_t n;
    int err;

    gather_locked (s, &msg);
    if (may_wait)
      shorten (&msg, WAITING_BYTES);
    s->sending = true;
    pthread_mutex_unlock (&s->lock);
    n = stream_send (&s->stream, &msg, may_wait ? 0 : MSG_DONTWAIT);
    err = errno;
    may_wait = may_wait && now_ns () < until;
    pthread_mutex_lock (&s->lock);
    s->sending = false;
    if (n >= 0) {
      atomic_fetch_add_explicit (&s->moved, (uint64_t)n, memory_order_relaxed);
      sent_locked (s, (size_t)n);
    }
    else if (err == EAGAIN) {
      s->slow = true;
      return;
    }
    else if (err != EINTR)
      die_locked (s);
  }
}

void
answers_push (struct session *s)
{
  LOCK_FOR_SCOPE (&s->lock);
  push_relock (s, false);
}

void
answers_give_up (struct session *s)
{
  LOCK_FOR_SCOPE (&s->lock);
  if (s->first && !s->sending)
    die_locked (s);
}

static void
queue_and_push (struct op *op, int rc, size_t body_size, bool may_wait)
{
  struct session *s = op->session;
  bool refused;

  finish_op (op, rc, body_size);
  refused = op->refused;
  pthread_mutex_lock (&s->lock);
  queue_locked (op);
  push_relock (s, may_wait && !s->slow);
  if (refused || s->wants_room || (s->first && !s->sending)) {
    s->wants_room = false;
    mailbox_ring (
        s->lane.watch.box); /* its thread sends the rest when there is room */
  }
  pthread_mutex_unlock (&s->lock);
  /* From here on the session may be freed. */
  mailbox_ring_all ();
}

void
answer_send (struct op *op, int rc, size_t body_size)
{
  queue_and_push (op, rc, body_size, true);
}

void
answer_send_shared (struct op *op, int rc)
{
  queue_and_push (op, rc, 0, false);
}

int
answers_unread (int fd)
{
  int domain, bytes = 0;
  socklen_t size = sizeof domain;

  if (getsockopt (fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) == 0
      && domain != AF_UNIX)
    (void)ioctl (fd, SIOCOUTQ, &bytes);
  return bytes;
}

/* The server ends the connection while the client may still send.  Closing a
 * socket with unread bytes resets the connection, and loses answers on the way.
 * So the thread reads and drops all bytes until all answers have arrived.
 */
void
answers_part (struct session *s)
{
  uint64_t until = now_ns () + LINGER_MS * NS_PER_MS;
  struct pollfd fd = { .fd = s->fd, .events = POLLIN };

  stream_part (&s->stream);
  (void)shutdown (s->fd, SHUT_WR);
  while (now_ns () < until) {
    ssize_t n = receive (s->fd, s->inbox, DIRECT_INBOX, MSG_DONTWAIT);

    if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
      break;
    if (n < 0 && answers_unread (s->fd) == 0)
      break;
    if (n < 0)
      (void)poll (&fd, 1, LINGER_STEP_MS);
  }
}

void
ops_free (struct session *s)
{
  LOCK_FOR_SCOPE (&s->lock);
  spare_free_locked (s);
}
