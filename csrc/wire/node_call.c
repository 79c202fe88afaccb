/* SPDX-License-Identifier: BSD-3-Clause */

/* The calling side of calls between nodes: connect, one call, disconnect.
 * docs/PROTOCOL.md has the bytes; csrc/doors/node_session.c answers.
 *
 * Calls are rare, so each has a connection of its own: nothing must be found
 * out about an old one.  The time bounds the whole call, and all memory is the
 * caller's, whatever the other side sends.
 */

#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "api.h"
#include "base/clock.h"
#include "base/error.h"
#include "wire/conn.h"
#include "wire/protocol.h"
#include "wire/secure_connect.h"
#include "wire/stream_whole.h"
#include "wire/tls_secrets.h"
#include "wire/transport.h"

#define FETCH_BYTES (1u << 20) /* of one read */

struct caller {
  struct conn conn; /* fd, stream, secrets and info; nothing else of it */
  uint64_t until_ns;
  uint32_t timeout_ms;
};

static int
describe (const struct caller *c, int rc)
{
  if (rc == -ETIMEDOUT)
    return set_message (rc, "no answer within %u ms", c->timeout_ms);
  if (rc == -ECONNRESET || rc == -EPIPE)
    return set_message (-ECONNRESET, "the other node closed the connection");
  return rc < 0 ? set_error (rc, "call") : 0;
}

static int
receive_part (struct caller *c, void *to, size_t size)
{
  return describe (
      c, stream_receive_whole (&c->conn.stream, to, size, c->until_ns));
}

static int
send_command (struct caller *c, uint16_t type, uint64_t offset, uint32_t length,
              const void *data)
{
  const struct nbd_request head = { .magic = htobe32 (NBD_REQUEST_MAGIC),
                                    .type = htobe16 (type),
                                    .cookie = htobe64 (type + 1),
                                    .offset = htobe64 (offset),
                                    .length = htobe32 (length) };
  struct iovec iov[] = { { (void *)(uintptr_t)&head, sizeof head },
                         { (void *)(uintptr_t)data, length } };

  return describe (
      c, stream_send_whole (&c->conn.stream, iov, data ? 2 : 1, c->until_ns));
}

static int
no_answer (void)
{
  return set_message (-EPROTO, "the other node sent an answer that is none");
}

/* --- Answers -------------------------------------------------------------- */

static int
receive_ack (struct caller *c)
{
  struct nbd_simple_reply reply;
  int rc = receive_part (c, &reply, sizeof reply);

  if (rc < 0)
    return rc;
  if (reply.magic != htobe32 (NBD_SIMPLE_REPLY_MAGIC)
      || reply.cookie != htobe64 (NBD_CMD_WRITE + 1))
    return no_answer ();
  if (reply.error != 0)
    return set_message (-ECONNREFUSED, "the other node refuses the call");
  return 0;
}

/* The text may be anything; it is `length` bytes behind the chunk's head. */
static int
receive_refusal (struct caller *c, uint32_t length)
{
  struct __attribute__ ((packed)) {
    uint32_t error;
    uint16_t length;
    char words[NBDM_TEXT_LEN];
  } failed;
  const size_t head = offsetof (typeof (failed), words);
  int rc;

  if (length < head || length >= sizeof failed)
    return no_answer ();
  rc = receive_part (c, &failed, length);
  if (rc < 0)
    return rc;
  if (be16toh (failed.length) != length - head)
    return no_answer ();
  failed.words[length - head] = '\0';
  for (char *at = failed.words; at < failed.words + (length - head); at++)
    if ((unsigned char)*at < ' ' || *at == 0x7f)
      *at = '?';
  return set_message (-ECONNREFUSED, "%s",
                      failed.words[0] ? failed.words
                                      : "the other node did not answer");
}

/* The one chunk of a read's answer. */
static int
receive_data (struct caller *c, void *to, uint64_t at, uint32_t size)
{
  struct nbd_chunk head;
  uint64_t offset;
  int rc = receive_part (c, &head, sizeof head);

  if (rc < 0)
    return rc;
  if (head.magic != htobe32 (NBD_CHUNK_MAGIC)
      || head.flags != htobe16 (NBD_CHUNK_DONE)
      || head.cookie != htobe64 (NBD_CMD_READ + 1))
    return no_answer ();
  if (head.type == htobe16 (NBD_CHUNK_ERROR))
    return receive_refusal (c, be32toh (head.length));
  if (head.type != htobe16 (NBD_CHUNK_OFFSET_DATA)
      || head.length != htobe32 (size + (uint32_t)sizeof offset))
    return no_answer ();
  rc = receive_part (c, &offset, sizeof offset);
  if (rc == 0 && offset != htobe64 (at))
    return no_answer ();
  return rc < 0 ? rc : receive_part (c, to, size);
}

/* --- A call --------------------------------------------------------------- */

static int
begin (struct caller *c, const char *uri, uint32_t timeout_ms)
{
  memset (c, 0, sizeof *c);
  c->conn.fd = -1;
  c->timeout_ms = timeout_ms;
  c->until_ns = now_ns () + timeout_ms * NS_PER_MS;
  return call_connect (&c->conn, uri, c->until_ns, timeout_ms);
}

/* Keeps the message of an error. */
static void
end (struct caller *c, bool parts)
{
  const struct nbd_request bye = { .magic = htobe32 (NBD_REQUEST_MAGIC),
                                   .type = htobe16 (NBD_CMD_DISC) };
  struct iovec iov = { (void *)(uintptr_t)&bye, sizeof bye };

  if (parts) {
    (void)stream_send_whole (&c->conn.stream, &iov, 1, c->until_ns);
    stream_part (&c->conn.stream);
  }
  if (c->conn.stream.kind)
    stream_end (&c->conn.stream);
  tls_secrets_free (c->conn.secrets);
  if (c->conn.fd >= 0)
    close (c->conn.fd);
}

static int
exchange (struct caller *c, const void *request, uint32_t size, uint8_t *reply)
{
  int rc;

  if (c->conn.info.size != NBDM_CALL_LEN)
    return set_message (-EPROTO, "the other side is no node of this version");
  rc = send_command (c, NBD_CMD_WRITE, 0, size, request);
  if (rc == 0)
    rc = receive_ack (c);
  if (rc == 0)
    rc = send_command (c, NBD_CMD_READ, 0, NBDM_CALL_LEN, NULL);
  return rc < 0 ? rc : receive_data (c, reply, 0, NBDM_CALL_LEN);
}

static int
take_reply (const uint8_t *whole, void *reply, uint32_t room)
{
  uint32_t size = NBDM_CALL_LEN;

  while (size > 0 && whole[size - 1] == 0)
    size--;
  if (size > room)
    return set_message (
        -EMSGSIZE, "the reply has %u bytes, for %u there is room", size, room);
  memcpy (reply, whole, size);
  return (int)size;
}

int
nbdm_call (const char *uri, const void *request, uint32_t size, void *reply,
           uint32_t room, uint32_t timeout_ms)
{
  uint8_t whole[NBDM_CALL_LEN];
  struct caller c;
  int rc;

  if (size == 0 || size > NBDM_CALL_LEN)
    return set_message (-EINVAL, "a call has 1 to %u bytes", NBDM_CALL_LEN);
  rc = begin (&c, uri, timeout_ms);
  if (rc == 0)
    rc = exchange (&c, request, size, whole);
  end (&c, rc == 0);
  return rc < 0 ? rc : take_reply (whole, reply, room);
}

static int
fetch (struct caller *c, uint8_t *to, uint64_t size)
{
  int rc = 0;

  if (c->conn.info.size != size)
    return set_message (
        -ERANGE, "the other node's map has %llu bytes, not %llu",
        (unsigned long long)c->conn.info.size, (unsigned long long)size);
  for (uint64_t at = 0; at < size && rc == 0;) {
    uint32_t n = size - at < FETCH_BYTES ? (uint32_t)(size - at) : FETCH_BYTES;

    rc = send_command (c, NBD_CMD_READ, at, n, NULL);
    if (rc == 0)
      rc = receive_data (c, to + at, at, n);
    at += n;
  }
  return rc;
}

int
nbdm_fetch (const char *uri, void *bits, uint64_t size, uint32_t timeout_ms)
{
  struct caller c;
  int rc = begin (&c, uri, timeout_ms);

  if (rc == 0)
    rc = fetch (&c, bits, size);
  end (&c, rc == 0);
  return rc;
}
