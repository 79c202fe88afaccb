/* SPDX-License-Identifier: BSD-3-Clause */

/* The direct door's session: one client's requests, on one thread.
 *
 * The thread takes in all requests that have come, runs them on its lane of the
 * executor (executor/lane.c), and sends the answers together.  It waits only in
 * lane_poll, for the client, for answers of remotes, and for its mailbox, which
 * rings for answers that another thread received and when workers have made
 * room.
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

#include "api.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/lock.h"
#include "doors/claims.h"
#include "doors/direct.h"
#include "doors/direct_answer.h"
#include "doors/direct_handshake.h"
#include "doors/direct_io.h"
#include "doors/direct_memory.h"
#include "doors/direct_server.h"
#include "doors/direct_session.h"
#include "doors/export.h"
#include "doors/node_session.h"
#include "doors/node_silence.h"
#include "executor/lane.h"
#include "wire/mailbox.h"
#include "wire/protocol.h"
#include "wire/stream.h"

#define RECEIVE_STEPS 16 /* receive calls for a large payload in one turn */
#define END_MS 1000      /* then drop a client that reads no answers */
#define PRESS_MS 250     /* between looks, while it waits for memory */

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
         && (op->length > s->exported->size
             || op->offset > s->exported->size - op->length);
}

static bool
changes (const struct op *op)
{
  return op->type == NBD_CMD_WRITE || op->type == NBD_CMD_WRITE_ZEROES
         || op->type == NBD_CMD_TRIM;
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
  if (s->exported->read_only && changes (op))
    return -EPERM;
  /* By the protocol a write past the end fails with ENOSPC. */
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
    return EXECUTOR_EXTENTS * sizeof (struct nbd_block_descriptor);
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
has_spare_locked (const struct session *s, size_t room)
{
  for (const struct op *op = s->spare; op; op = op->next)
    if (op->room >= room)
      return true;
  return false;
}

/* Get the buffer from a spare op, or from the budget. */
static bool
has_buffer_locked (struct session *s, size_t room)
{
  if (!has_spare_locked (s, room))
    return budget_take_locked (s, room);
  budget_withdraw_locked (s);
  /* A session that waits may free the spare op before it is used. */
  s->promised = room;
  return true;
}

/* Is there room for one more, with so large a buffer? */
static bool
may_take_more (struct session *s, size_t room)
{
  bool may, waited = s->waiting;

  pthread_mutex_lock (&s->lock);
  may = s->nr_ops < DIRECT_MAX_OPS && s->bytes < DIRECT_MAX_BYTES && !s->dead;
  may = may && has_buffer_locked (s, room);
  pthread_mutex_unlock (&s->lock);
  mailbox_ring_all (); /* see look_at_client */
  if (s->waiting && !waited)
    budget_press (s->clients); /* others may keep unused memory */
  return may;
}

/* Has every request been carried out?  Answers on their way may remain. */
static bool
has_all_answers (struct session *s)
{
  uint32_t nr = 0;

  LOCK_FOR_SCOPE (&s->lock);
  for (const struct op *op = s->first; op; op = op->next)
    nr++;
  return nr == s->nr_ops && !s->dead;
}

/* Make an op from the next request's header; NULL: none has come. */
static struct op *
take_header (struct session *s)
{
  struct nbd_request wire;
  uint16_t type;
  uint32_t length;
  struct op *op;

  if (s->end - s->start < sizeof wire)
    return NULL;
  memcpy (&wire, s->inbox + s->start, sizeof wire);
  type = be16toh (wire.type);
  length = be32toh (wire.length);
  s->stalled = !may_take_more (s, buffer_size (type, length));
  if (s->stalled)
    return NULL;
  s->start += sizeof wire;
  if (!atomic_load_explicit (&s->asked, memory_order_relaxed))
    atomic_store (&s->asked, true);
  if (wire.magic != htobe32 (NBD_REQUEST_MAGIC) || type == NBD_CMD_DISC) {
    if (type != NBD_CMD_DISC || wire.magic != htobe32 (NBD_REQUEST_MAGIC))
      direct_log (s, "it sent a request without the magic number of one");
    else
      s->parted = has_all_answers (s);
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

/* Only these received bytes count as moved: a header or a discarded payload
 * brings no memory back.
 */
static void
fill (struct session *s, size_t bytes)
{
  s->filled += bytes;
  atomic_fetch_add_explicit (&s->moved, bytes, memory_order_relaxed);
}

/* The next request that has arrived completely; NULL: none has. */
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
      return op; /* refused; its payload is discarded */
    }
    s->filling = op;
    s->filled = 0;
    atomic_store_explicit (&s->receiving, op->room, memory_order_relaxed);
  }
  fill (s, take_bytes (s, op->buf + s->filled, op->length - s->filled));
  if (s->filled < op->length)
    return NULL;
  s->filling = NULL;
  atomic_store_explicit (&s->receiving, 0, memory_order_relaxed);
  return op;
}

static void
take_requests (struct session *s)
{
  struct op *op;

  while ((op = take_request (s))) {
    int rc = check_request (s, op);

    if (rc < 0)
      answer_put (op, rc, 0);
    else
      op_submit (op);
  }
  lane_push (&s->lane);
}

/* One recv: the rest of a payload goes into its buffer. */
static bool
receive_once (struct session *s)
{
  struct iovec iov[2];
  size_t nr = 0, wanted = 0;
  ssize_t n;

  memmove (s->inbox, s->inbox + s->start, s->end - s->start);
  s->end -= s->start;
  s->start = 0;
  if (s->filling) {
    wanted = s->filling->length - s->filled;
    iov[nr++] = (struct iovec){ s->filling->buf + s->filled, wanted };
  }
  iov[nr++] = (struct iovec){ s->inbox + s->end, DIRECT_INBOX - s->end };
  if (s->end == DIRECT_INBOX)
    return false;
  n = stream_receive (&s->stream, iov, nr, MSG_DONTWAIT);
  if (n < 0 && (errno == EAGAIN || errno == EINTR))
    return false;
  if (n < 0 && errno == EBADMSG)
    direct_log (s, "it sent open files with its requests");
  if (n <= 0) {
    s->no_more = true;
    return false;
  }
  if (wanted > 0)
    fill (s, (size_t)n < wanted ? (size_t)n : wanted);
  s->end += (size_t)n < wanted ? 0 : (size_t)n - wanted;
  if (s->claims)
    node_heard (s);
  return true;
}

static void
receive_some (struct session *s)
{
  for (int i = 0; i < RECEIVE_STEPS && receive_once (s); i++)
    if (s->filling == NULL || s->filled == s->filling->length)
      break;
}

/* --- The loop --------------------------------------------------------- */

/* The next step of a session with its client. */
struct next_step {
  short events; /* to poll the socket for */
  bool at_once; /* there are requests and room for one */
  bool over;    /* nothing is left to do */
};

static struct next_step
look_ahead (struct session *s)
{
  struct next_step next = { .events = 0 };
  bool room, no_requests;

  if (atomic_load (&s->ending))
    s->ended = true;
  LOCK_FOR_SCOPE (&s->lock);
  room = s->nr_ops < DIRECT_MAX_OPS && s->bytes < DIRECT_MAX_BYTES
         && (!s->waiting || atomic_load (&s->granted) > 0);
  no_requests = s->ended || s->dead || (s->no_more && !s->stalled);
  if (s->first && !s->sending)
    next.events |= POLLOUT;
  /* A request that has come in part has its room already. */
  if ((room || s->filling || s->skip > 0) && !no_requests && !s->no_more)
    next.events |= POLLIN;
  next.at_once = (room && !no_requests && (s->stalled || s->closed))
                 || ((next.events & POLLIN) && stream_has_input (&s->stream));
  next.over = no_requests && s->nr_ops == (s->filling ? 1 : 0);
  s->wants_room = !room || no_requests;
  return next;
}

/* Sent answers make room for other sessions, so ring them at once: the local
 * disk may delay this thread next, and no other thread rings for it.
 */
static void
look_at_client (struct session *s, short wanted, short found)
{
  if (found & (POLLHUP | POLLERR | POLLNVAL))
    s->closed = true;
  if (s->closed)
    found |= wanted;
  if (found & POLLOUT)
    answers_push (s);
  mailbox_ring_all ();
  if (stream_has_input (&s->stream))
    found |= POLLIN;
  if (found & wanted & POLLIN)
    receive_some (s);
}

/* Wait until there is something to do, and do it.  False: the session is over.
 */
static bool
wait_and_receive (struct session *s)
{
  struct pollfd fd = { .fd = s->closed ? -1 : s->fd };
  struct next_step next;
  bool at_once, ending = atomic_load (&s->ending);
  int found;

  next = look_ahead (s);
  if (next.over)
    return false;
  fd.events = next.events;
  at_once = next.at_once || (s->closed && next.events);
  found = lane_poll (&s->lane, &fd,
                     at_once      ? 0
                     : ending     ? END_MS
                     : s->waiting ? PRESS_MS
                     : s->claims  ? NODE_LOOK_MS
                                  : -1);
  if (found == 0 && s->claims && node_is_gone (s))
    s->ended = true;
  if (found == 0 && ending && !at_once)
    answers_give_up (s);
  else if (s->waiting)
    budget_press (s->clients);
  look_at_client (s, next.events, fd.revents);
  return true;
}

static void
serve (struct session *s)
{
  do {
    lane_take (&s->lane);
    take_requests (s);
    answers_push (s);
    mailbox_ring_all (); /* the sessions that waited for memory */
  } while (wait_and_receive (s));
}

/* The requests of a client that may use the disk. */
static void
serve_disk (struct session *s)
{
  struct nbdm *v = s->exported->executor.volume;

  if (s->claims)
    node_heard (s);
  else
    nbdm_count_client (v, +1);
  serve (s);
  if (!s->claims)
    nbdm_count_client (v, -1);
  claims_leave (s, s->parted); /* none of its requests is at the disk */
}

static void
say_goodbye (struct session *s)
{
  if (atomic_load (&s->ending) && !s->dead)
    answers_part (s);
  else if (!s->dead)
    stream_part (&s->stream);
}

void
session_run (struct session *s)
{
  bool agreed;

  lane_enter (&s->lane);
  agreed = direct_handshake (s) == 0;
  if (agreed && s->record.kind != RECORD_NONE)
    node_serve (s);
  atomic_store (&s->shaking_hands, false);
  if (agreed && s->record.kind == RECORD_NONE)
    serve_disk (s);
  else
    claims_leave (s, false);
  lane_leave (&s->lane);
  if (agreed)
    say_goodbye (s);
  if (atomic_load (&s->stalled_ns))
    direct_log (
        s,
        "disconnected: it kept memory that others waited for, and moved too "
        "little of it for %u ms",
        (unsigned)(atomic_load (&s->stalled_ns) / NS_PER_MS));
  if (s->filling)
    op_drop (s->filling);
  ops_free (s);
  budget_leave (s);
}
