/* SPDX-License-Identifier: BSD-3-Clause */

/* Serves NAME.meta and NAME.dirty, one request at a time.
 *
 * These carry a few calls and no data, so they need neither the executor nor
 * the clients' memory: the session's thread reads a request, carries it out and
 * answers it, and each step has a time; so has the reading of a map, which
 * takes memory as long as it lasts.  The connection counts as one in the
 * handshake (node_calls.c), and so gives way when too many come.
 *
 * A request longer than these exports allow ends the connection: nothing here
 * sends one, and its payload would have to be read to find the next.
 */

#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "api.h"
#include "base/clock.h"
#include "doors/direct.h"
#include "doors/direct_server.h"
#include "doors/node_calls.h"
#include "doors/node_session.h"
#include "wire/protocol.h"
#include "wire/stream_whole.h"

#define SILENCE_NS (30 * NS_PER_S)
#define SLOWEST 8192u /* bytes a second; below it a step takes too long */

struct asked {
  struct session *session;
  uint16_t flags, type;
  uint32_t length;
  uint64_t cookie, offset;
  uint32_t request;                /* bytes of the call; 0: none yet */
  uint8_t room[NBDM_CALL_LEN + 1]; /* the call, then its reply */
};

static uint64_t
slowest (uint64_t bytes)
{
  return now_ns () + SILENCE_NS + bytes * (NS_PER_S / SLOWEST);
}

/* When a step with so many bytes must have ended. */
static uint64_t
time_for (const struct asked *a, size_t bytes)
{
  uint64_t until = slowest (bytes), end = a->session->record.until_ns;

  return until < end ? until : end;
}

void
record_begin (struct session *s, void *bytes, uint32_t size)
{
  s->record.kind = RECORD_DIRTY;
  s->record.bytes = bytes;
  s->record.size = size;
  s->record.until_ns = slowest (size);
}

void
record_end (struct session *s)
{
  if (s->record.has_place)
    node_calls_give_place (direct_calls (s->server));
  free (s->record.bytes);
  s->record = (struct record){ .kind = RECORD_NONE };
}

static int
receive_request (struct asked *a)
{
  struct nbd_request wire;
  int rc = stream_receive_whole (&a->session->stream, &wire, sizeof wire,
                                 time_for (a, sizeof wire));

  if (rc < 0)
    return rc;
  if (wire.magic != htobe32 (NBD_REQUEST_MAGIC))
    return -EPROTO;
  a->flags = be16toh (wire.flags);
  a->type = be16toh (wire.type);
  a->cookie = wire.cookie;
  a->offset = be64toh (wire.offset);
  a->length = be32toh (wire.length);
  return a->type == NBD_CMD_DISC ? -ECONNRESET : 0;
}

static int
send_parts (struct asked *a, struct iovec *iov, int nr)
{
  size_t size = 0;

  for (int i = 0; i < nr; i++)
    size += iov[i].iov_len;
  return stream_send_whole (&a->session->stream, iov, nr, time_for (a, size));
}

/* A simple reply, or the answer to a read without structured replies. */
static int
answer_simply (struct asked *a, int error, const void *data, size_t size)
{
  const struct nbd_simple_reply head
      = { .magic = htobe32 (NBD_SIMPLE_REPLY_MAGIC),
          .error = htobe32 ((uint32_t)error),
          .cookie = a->cookie };
  struct iovec iov[] = { { (void *)(uintptr_t)&head, sizeof head },
                         { (void *)(uintptr_t)data, size } };

  return send_parts (a, iov, size > 0 ? 2 : 1);
}

/* The answer to a read: bytes, or an error with a text. */
static int
answer_read (struct asked *a, int error, const void *data, size_t size)
{
  const uint64_t offset = htobe64 (a->offset);
  const struct __attribute__ ((packed)) {
    uint32_t error;
    uint16_t length;
  } failed = { htobe32 ((uint32_t)error), htobe16 ((uint16_t)size) };
  size_t more = error ? sizeof failed : sizeof offset;
  const struct nbd_chunk head
      = { .magic = htobe32 (NBD_CHUNK_MAGIC),
          .flags = htobe16 (NBD_CHUNK_DONE),
          .type = htobe16 (error ? NBD_CHUNK_ERROR : NBD_CHUNK_OFFSET_DATA),
          .cookie = a->cookie,
          .length = htobe32 ((uint32_t)(more + size)) };
  struct iovec iov[]
      = { { (void *)(uintptr_t)&head, sizeof head },
          { error ? (void *)(uintptr_t)&failed : (void *)(uintptr_t)&offset,
            more },
          { (void *)(uintptr_t)data, size } };

  if (!a->session->agreed.structured)
    return answer_simply (a, error, data, error ? 0 : size);
  return send_parts (a, iov, size > 0 ? 3 : 2);
}

/* --- NAME.meta ------------------------------------------------------------ */

static int
take_request (struct asked *a)
{
  int rc;

  if (a->length > NBDM_CALL_LEN)
    return -EPROTO;
  a->request = 0;
  rc = stream_receive_whole (&a->session->stream, a->room, a->length,
                             time_for (a, a->length));
  if (rc < 0)
    return rc;
  if (a->offset != 0 || a->length == 0 || (a->flags & ~NBD_CMD_FLAG_FUA))
    return answer_simply (a, EINVAL, NULL, 0);
  a->request = a->length;
  return answer_simply (a, 0, NULL, 0);
}

/* The read that fetches a reply makes the call. */
static int
make_call (struct asked *a)
{
  struct node_call call
      = { .kind = NBDM_CALL_META, .words = a->room, .size = a->request };
  int rc;

  if (a->request == 0 || a->offset != 0 || a->length != NBDM_CALL_LEN)
    return answer_read (a, EINVAL, NULL, 0);
  rc = node_calls_ask (a->session, &call);
  a->request = 0;
  if (rc == 0 && call.rc < 0)
    rc = answer_read (a, call.rc == -ESHUTDOWN ? ESHUTDOWN : EIO, call.bytes,
                      call.nr_bytes);
  else if (rc == 0) {
    memset (a->room, 0, NBDM_CALL_LEN);
    if (call.nr_bytes > 0)
      memcpy (a->room, call.bytes, call.nr_bytes);
    rc = answer_read (a, 0, a->room, NBDM_CALL_LEN);
  }
  free (call.bytes);
  return rc;
}

/* --- NAME.dirty ----------------------------------------------------------- */

static int
send_bytes (struct asked *a)
{
  const struct record *r = &a->session->record;

  if (a->length == 0 || a->length > RECORD_MAX_READ || a->offset > r->size
      || a->length > r->size - a->offset)
    return answer_read (a, EINVAL, NULL, 0);
  return answer_read (a, 0, r->bytes + a->offset, a->length);
}

static int
refuse_request (struct asked *a)
{
  if (a->type == NBD_CMD_WRITE)
    return -EPROTO; /* its payload follows */
  return answer_simply (a, EINVAL, NULL, 0);
}

static int
serve_one (struct asked *a)
{
  bool meta = a->session->record.kind == RECORD_META;
  int rc = receive_request (a);

  if (rc < 0)
    return rc;
  if (a->type == NBD_CMD_READ)
    return meta ? make_call (a) : send_bytes (a);
  if (a->type == NBD_CMD_WRITE && meta)
    return take_request (a);
  return refuse_request (a);
}

void
node_serve (struct session *s)
{
  struct asked *a = calloc (1, sizeof *a);

  if (a == NULL) {
    direct_log (s, "no memory for the call of a node");
    return;
  }
  a->session = s;
  if (s->record.kind == RECORD_META)
    s->record.until_ns = NEVER;
  while (serve_one (a) == 0)
    ;
  free (a);
}
