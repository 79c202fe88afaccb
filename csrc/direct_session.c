/* SPDX-License-Identifier: BSD-3-Clause */

/* The direct door's session: one client's requests, on one thread.
 *
 * The thread takes in all requests that have come, admits them, sends their
 * commands to the remotes together, does the local disk's part, and sends the
 * answers together: so under load each system call and each wake-up serves
 * several requests.  Alone, a write is the same steps without a hand-over.
 *
 * What it waits for in poll: the client, the remotes' connections, and its
 * mailbox (answers that another thread took in, and workers that made room).
 * It waits nowhere else: what may block is a worker's (express.c says what).
 */

#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "direct.h"

#define RECEIVE_STEPS 16  /* of a large payload, before anything else */
#define WRITES_AT_ONCE 32 /* begun, before the disk has its turn */
#define END_MS 1000       /* of a client that takes no answer: it gets none */
#define MAX_EXTENTS 512   /* in one answer; a client asks again for more */

/* --- Which remotes to listen to --------------------------------------- */

static struct far *
find_far (struct session *s, const struct conn *conn)
{
  for (int i = 0; i < DIRECT_FARS; i++)
    if (s->fars[i].conn == conn)
      return &s->fars[i];
  return NULL;
}

static void
await (struct session *s, struct conn *conn)
{
  struct far *far = find_far (s, conn);

  if (far == NULL) {
    far = find_far (s, NULL);
    far->conn = conn_get (conn);
    far->watcher = (struct watcher){ .box = s->box };
  }
  far->pending++;
}

/* A request has so few connections that there is always a place for one. */
static bool
has_free_fars (struct session *s)
{
  int nr = 0;

  for (int i = 0; i < DIRECT_FARS; i++)
    if (s->fars[i].conn == NULL)
      nr++;
  return nr >= NBDM_MAX_REMOTES;
}

static void
leave_idle_fars (struct session *s)
{
  for (int i = 0; i < DIRECT_FARS; i++) {
    struct far *far = &s->fars[i];

    if (far->conn == NULL || far->pending > 0)
      continue;
    conn_leave (far->conn, &far->watcher);
    conn_put (far->conn);
    far->conn = NULL;
  }
}

/* --- Workers' requests ------------------------------------------------ */

static uint32_t
engine_flags (const struct op *op)
{
  return (op->flags & NBD_CMD_FLAG_FUA ? NBDM_FUA : 0)
         | (op->type == NBD_CMD_WRITE_ZEROES
                    && !(op->flags & NBD_CMD_FLAG_NO_HOLE)
                ? NBDM_MAY_TRIM
                : 0)
         | (op->flags & NBD_CMD_FLAG_FAST_ZERO ? NBDM_FAST_ZERO : 0);
}

/* Bytes of the buffer that are the answer's, or -errno. */
static int
block_status (struct op *op)
{
  struct nbdm_extent found[MAX_EXTENTS];
  struct nbd_block_descriptor *out = (void *)op->buf;
  uint32_t max = op->flags & NBD_CMD_FLAG_REQ_ONE ? 1 : MAX_EXTENTS;
  int nr
      = nbdm_extents (op->session->volume, op->length, op->offset, found, max);

  for (int i = 0; i < nr; i++)
    out[i] = (struct nbd_block_descriptor){
      .length = htobe32 ((uint32_t)found[i].length),
      .status = htobe32 (found[i].type),
    };
  return nr < 0 ? nr : (int)((size_t)nr * sizeof *out);
}

static int
run_blocking (struct op *op, size_t *body_size)
{
  struct nbdm *v = op->session->volume;
  uint32_t flags = engine_flags (op);
  int rc;

  switch (op->type) {
  case NBD_CMD_READ:
    *body_size = op->length;
    return nbdm_pread (v, op->buf, op->length, op->offset);
  case NBD_CMD_WRITE:
    return nbdm_pwrite (v, op->buf, op->length, op->offset, flags);
  case NBD_CMD_TRIM:
    return nbdm_trim (v, op->length, op->offset, flags);
  case NBD_CMD_WRITE_ZEROES:
    return nbdm_zero (v, op->length, op->offset, flags);
  case NBD_CMD_CACHE:
    return nbdm_cache (v, op->length, op->offset);
  default:
    rc = block_status (op);
    *body_size = rc < 0 ? 0 : (size_t)rc;
    return rc < 0 ? rc : 0;
  }
}

/* A fast zero that would be slow is an answer and no error. */
static void
log_error (const struct op *op, int rc)
{
  static const char *const names[]
      = { "read", "write", "?",      "flush",
          "trim", "cache", "zeroes", "block status" };

  if (rc < 0 && rc != -EOPNOTSUPP)
    direct_log (op->session, "a %s of %u bytes at %llu: %s", names[op->type],
                op->length, (unsigned long long)op->offset, last_error ());
}

void
session_work (struct op *op)
{
  size_t body_size = 0;
  int rc = op->begun ? express_complete (op->session->volume, &op->express)
                     : run_blocking (op, &body_size);

  log_error (op, rc);
  answer_send (op, rc, body_size);
}

void
session_flush (struct op *ops)
{
  int rc = nbdm_flush (ops->session->volume);

  log_error (ops, rc);
  while (ops) {
    struct op *next = ops->next;

    answer_send (ops, rc, 0);
    ops = next;
  }
}

/* --- Requests that are done here -------------------------------------- */

static void
end_express (struct session *s, struct op *op)
{
  int rc;

  if (!express_end (s->volume, &op->express, &rc)) {
    direct_submit (s->server, op);
    return;
  }
  log_error (op, rc);
  answer_put (op, rc, 0);
}

/* The remotes' answers that have come. */
static void
take_mail (struct session *s, bool woken)
{
  struct waiter *waiter = mailbox_take (s->box, woken);

  while (waiter) {
    struct waiter *next = waiter->next;
    struct op *op = waiter->owner;
    struct leg *leg
        = (struct leg *)((char *)waiter - offsetof (struct leg, waiter));

    find_far (s, leg->conn)->pending--;
    if (--op->express.legs_left == 0)
      end_express (s, op);
    waiter = next;
  }
}

static bool
begin_express (struct session *s, struct op *op)
{
  const struct request *req = &op->express.request;

  if (!has_free_fars (s)
      || !express_begin (s->volume, &op->express, op->buf, op->length,
                         op->offset, engine_flags (op), s->box, op))
    return false;
  op->begun = true;
  for (uint32_t i = 0; i < s->volume->nr_remotes; i++)
    if (req->legs[i].active && req->legs[i].waiter.box)
      await (s, req->legs[i].conn);
  return true;
}

static bool
read_at_once (struct session *s, struct op *op)
{
  if (!express_readable (s->volume, op->length)
      || !express_read (s->volume, op->buf, op->length, op->offset))
    return false;
  answer_put (op, 0, op->length);
  return true;
}

/* Commands that several requests share a system call for; then the local
 * disk, while the remotes are at work.
 */
static void
send_and_write (struct session *s, struct op **ops, int nr)
{
  for (int i = 0; i < DIRECT_FARS; i++)
    if (s->fars[i].conn)
      conn_push (s->fars[i].conn);
  for (int i = 0; i < nr; i++) {
    express_local (s->volume, &ops[i]->express);
    if (ops[i]->express.legs_left == 0) /* nothing went to a remote */
      end_express (s, ops[i]);
  }
}

/* --- Taking requests in ----------------------------------------------- */

/* The flags a command may have. */
static const uint16_t known_flags[] = {
  [NBD_CMD_READ] = NBD_CMD_FLAG_DF | NBD_CMD_FLAG_FUA,
  [NBD_CMD_WRITE] = NBD_CMD_FLAG_FUA,
  [NBD_CMD_DISC] = 0,
  [NBD_CMD_FLUSH] = NBD_CMD_FLAG_FUA,
  [NBD_CMD_TRIM] = NBD_CMD_FLAG_FUA,
  [NBD_CMD_CACHE] = NBD_CMD_FLAG_FUA,
  [NBD_CMD_WRITE_ZEROES]
  = NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO,
  [NBD_CMD_BLOCK_STATUS] = NBD_CMD_FLAG_REQ_ONE | NBD_CMD_FLAG_FUA,
};

static bool
is_past_end (const struct session *s, const struct op *op)
{
  return op->type != NBD_CMD_FLUSH
         && (op->length > s->volume->size
             || op->offset > s->volume->size - op->length);
}

static int
check_request (const struct session *s, const struct op *op)
{
  bool carries = op->type == NBD_CMD_READ || op->type == NBD_CMD_WRITE;

  if (op->type > NBD_CMD_BLOCK_STATUS || op->type == NBD_CMD_DISC)
    return -EINVAL;
  if (op->flags & ~known_flags[op->type])
    return -EINVAL;
  if ((op->flags & NBD_CMD_FLAG_DF) && !s->agreed.structured)
    return -EINVAL;
  if ((op->type == NBD_CMD_FLUSH) != (op->length == 0))
    return -EINVAL;
  if (carries && op->length > NBDM_MAX_REQUEST)
    return -EINVAL;
  if (op->type == NBD_CMD_BLOCK_STATUS && !s->agreed.block_status)
    return -EINVAL;
  /* The protocol has what writes past the end look like a full disk. */
  if (is_past_end (s, op))
    return op->type == NBD_CMD_WRITE || op->type == NBD_CMD_WRITE_ZEROES
               ? -ENOSPC
               : -EINVAL;
  return 0;
}

static size_t
buffer_size (uint16_t type, uint32_t length)
{
  if (type == NBD_CMD_BLOCK_STATUS)
    return MAX_EXTENTS * sizeof (struct nbd_block_descriptor);
  if (type == NBD_CMD_READ || type == NBD_CMD_WRITE)
    return length <= NBDM_MAX_REQUEST ? length : 0;
  return 0;
}

static size_t
take_bytes (struct session *s, void *to, uint64_t max)
{
  size_t n = s->end - s->start;

  n = n < max ? n : (size_t)max;
  if (to)
    memcpy (to, s->inbox + s->start, n);
  s->start += n;
  return n;
}

static bool
may_take_more (struct session *s)
{
  bool may;

  pthread_mutex_lock (&s->lock);
  may = s->nr_ops < DIRECT_MAX_OPS && s->bytes < DIRECT_MAX_BYTES && !s->dead;
  pthread_mutex_unlock (&s->lock);
  return may;
}

/* The header of the next request, made an op; NULL: there is none. */
static struct op *
take_header (struct session *s)
{
  struct nbd_request wire;
  uint16_t type;
  uint32_t length;
  struct op *op;

  if (s->end - s->start < sizeof wire)
    return NULL;
  s->stalled = !may_take_more (s);
  if (s->stalled)
    return NULL;
  take_bytes (s, &wire, sizeof wire);
  type = be16toh (wire.type);
  length = be32toh (wire.length);
  if (wire.magic != htobe32 (NBD_REQUEST_MAGIC) || type == NBD_CMD_DISC) {
    if (type != NBD_CMD_DISC)
      direct_log (s, "it sent a request without the magic number of one");
    s->ended = true;
    return NULL;
  }
  op = op_get (s, buffer_size (type, length));
  if (op == NULL) {
    direct_log (s, "no memory for a request of %u bytes", length);
    s->ended = true;
    return NULL;
  }
  op->type = type;
  op->flags = be16toh (wire.flags);
  op->length = length;
  op->cookie = be64toh (wire.cookie);
  op->offset = be64toh (wire.offset);
  return op;
}

/* The next request that is all there.  NULL: there is none. */
static struct op *
take_request (struct session *s)
{
  struct op *op = s->filling;

  s->skip -= take_bytes (s, NULL, s->skip);
  if (s->skip > 0 || s->ended)
    return NULL;
  if (op == NULL) {
    op = take_header (s);
    if (op == NULL || op->type != NBD_CMD_WRITE || op->length == 0)
      return op;
    if (op->length > NBDM_MAX_REQUEST) {
      s->skip = op->length;
      return op; /* refused; its payload is not kept */
    }
    s->filling = op;
    s->filled = 0;
  }
  s->filled += take_bytes (s, op->buf + s->filled, op->length - s->filled);
  if (s->filled < op->length)
    return NULL;
  s->filling = NULL;
  return op;
}

static void
take_requests (struct session *s)
{
  struct op *begun[WRITES_AT_ONCE], *op;
  int nr = 0;

  while ((op = take_request (s))) {
    int rc = check_request (s, op);

    if (rc < 0)
      answer_put (op, rc, 0);
    else if (op->type == NBD_CMD_READ && read_at_once (s, op))
      continue;
    else if (op->type != NBD_CMD_WRITE || !begin_express (s, op))
      direct_submit (s->server, op);
    else
      begun[nr++] = op;
    if (nr == WRITES_AT_ONCE) {
      send_and_write (s, begun, nr);
      nr = 0;
    }
  }
  send_and_write (s, begun, nr);
}

/* One recv: the rest of a payload goes where it belongs. */
static bool
receive_once (struct session *s)
{
  struct iovec iov[2];
  struct msghdr msg = { .msg_iov = iov };
  size_t wanted = 0;
  ssize_t n;

  memmove (s->inbox, s->inbox + s->start, s->end - s->start);
  s->end -= s->start;
  s->start = 0;
  if (s->filling) {
    wanted = s->filling->length - s->filled;
    iov[msg.msg_iovlen++]
        = (struct iovec){ s->filling->buf + s->filled, wanted };
  }
  iov[msg.msg_iovlen++]
      = (struct iovec){ s->inbox + s->end, DIRECT_INBOX - s->end };
  if (s->end == DIRECT_INBOX)
    return false;
  n = recvmsg (s->fd, &msg, MSG_DONTWAIT);
  if (n < 0 && (errno == EAGAIN || errno == EINTR))
    return false;
  if (n <= 0) {
    s->no_more = true;
    return false;
  }
  s->filled += (size_t)n < wanted ? (size_t)n : wanted;
  s->end += (size_t)n < wanted ? 0 : (size_t)n - wanted;
  return true;
}

static void
receive (struct session *s)
{
  for (int i = 0; i < RECEIVE_STEPS && receive_once (s); i++)
    if (s->filling == NULL || s->filled == s->filling->length)
      break;
}

/* --- The loop --------------------------------------------------------- */

/* What a session can do next with its client. */
struct outlook {
  short events; /* to poll the socket for */
  bool at_once; /* there are requests, and room for one */
  bool over;    /* nothing, ever again */
};

static struct outlook
look_ahead (struct session *s)
{
  struct outlook next = { .events = 0 };
  bool room, no_requests;

  if (atomic_load (&s->ending))
    s->ended = true;
  pthread_mutex_lock (&s->lock);
  room = s->nr_ops < DIRECT_MAX_OPS && s->bytes < DIRECT_MAX_BYTES;
  no_requests = s->ended || s->dead || (s->no_more && !s->stalled);
  if (s->first && !s->sending)
    next.events |= POLLOUT;
  /* One that is half there has its room already. */
  if ((room || s->filling || s->skip > 0) && !no_requests && !s->no_more)
    next.events |= POLLIN;
  next.at_once = room && !no_requests && (s->stalled || s->closed);
  next.over = no_requests && s->nr_ops == (s->filling ? 1 : 0);
  s->wants_room = !room || no_requests;
  pthread_mutex_unlock (&s->lock);
  return next;
}

static void
look_at_client (struct session *s, short wanted, short found)
{
  if (found & (POLLHUP | POLLERR | POLLNVAL))
    s->closed = true;
  if (s->closed)
    found |= wanted;
  if (found & POLLOUT)
    answers_push (s);
  if (found & wanted & POLLIN)
    receive (s);
}

/* The remotes that answers are awaited from, and the events to poll for. */
static nfds_t
watch_fars (struct session *s, struct far **fars, struct pollfd *fds)
{
  nfds_t nr = 0;

  for (int i = 0; i < DIRECT_FARS; i++) {
    struct far *far = &s->fars[i];
    short events;

    if (far->conn == NULL)
      continue;
    events = conn_watch (far->conn, &far->watcher);
    fars[nr] = far;
    fds[nr++] = (struct pollfd){ .fd = events ? conn_fd (far->conn) : -1,
                                 .events = events };
  }
  return nr;
}

/* Wait until there is something to do, and take in what came of it: false, and
 * the session is over.  `*woken`: the mailbox rang.
 */
static bool
wait_and_receive (struct session *s, bool *woken)
{
  struct pollfd fds[2 + DIRECT_FARS];
  struct far *fars[DIRECT_FARS];
  struct outlook next;
  bool at_once, ending = atomic_load (&s->ending);
  nfds_t nr;
  int found;

  leave_idle_fars (s);
  next = look_ahead (s);
  if (next.over)
    return false;
  fds[0]
      = (struct pollfd){ .fd = s->closed ? -1 : s->fd, .events = next.events };
  fds[1] = (struct pollfd){ .fd = s->box->fd, .events = POLLIN };
  nr = watch_fars (s, fars, fds + 2);
  /* There may be mail of this thread's own, which does not ring. */
  at_once = next.at_once || (s->closed && next.events)
            || atomic_load (&s->box->told);
  found = poll (fds, 2 + nr, at_once ? 0 : ending ? END_MS : -1);
  if (found < 0)
    memset (fds, 0, sizeof fds);
  if (found == 0 && ending && !at_once)
    answers_give_up (s);
  for (nfds_t i = 0; i < nr; i++)
    conn_lend (fars[i]->conn, &fars[i]->watcher, fds[2 + i].revents);
  *woken = fds[1].revents;
  look_at_client (s, next.events, fds[0].revents);
  return true;
}

static void
serve (struct session *s)
{
  bool woken = false;

  do {
    take_mail (s, woken);
    take_requests (s);
    answers_push (s);
  } while (wait_and_receive (s, &woken));
}

void
session_run (struct session *s)
{
  bool agreed;

  mailbox_own (s->box);
  agreed = direct_handshake (s->fd, s->volume, &s->agreed) == 0;
  atomic_store (&s->shaking_hands, false);
  if (agreed) {
    nbdm_count_client (s->volume, +1);
    serve (s);
    nbdm_count_client (s->volume, -1);
  }
  if (s->filling)
    op_drop (s->filling);
  ops_free (s);
  mailbox_own (NULL);
}
