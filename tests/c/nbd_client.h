/* SPDX-License-Identifier: BSD-3-Clause */

/* An NBD client that breaks the rules: it stops in the middle of a header,
 * leaves answers unread, sends forbidden requests. libnbd prevents all of that,
 * so this file has the parts of the protocol that the tests need, one step a
 * function.
 *
 * A call that the server keeps waiting for CLIENT_DEADLINE_S fails the test: no
 * request to a server may hang.
 */

#ifndef NBDM_NBD_CLIENT_H
#define NBDM_NBD_CLIENT_H

#include <endian.h>
#include <stdbool.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>

#include "wire/protocol.h"
#include "test.h"

#define CLIENT_DEADLINE_S 60

struct client {
  int fd;
  bool structured;
  bool may_end; /* the server may close the connection: calls return false */
};

/* Put TLS around a connected socket; returns the socket for the client.  NULL:
 * the clients use none.
 */
static TEST_UNUSED int (*client_secure) (int fd);

/* What came back for one request. */
struct answer {
  uint64_t cookie;
  uint32_t error;
  uint32_t length; /* of what is in the buffer: data or descriptors */
};

static TEST_UNUSED bool
client_moved (const struct client *c, ssize_t n, const char *what)
{
  if (n > 0)
    return true;
  if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
    fprintf (stderr, "the server kept a client waiting (%s)\n", what);
    abort ();
  }
  assert (c->may_end);
  return false;
}

static TEST_UNUSED bool
client_send (const struct client *c, const void *bytes, size_t size)
{
  const char *p = bytes;

  while (size > 0) {
    ssize_t n = send (c->fd, p, size, MSG_NOSIGNAL);

    if (n < 0 && errno == EINTR)
      continue;
    if (!client_moved (c, n, "send"))
      return false;
    p += n;
    size -= (size_t)n;
  }
  return true;
}

static TEST_UNUSED bool
client_receive (const struct client *c, void *bytes, size_t size)
{
  char *p = bytes;

  while (size > 0) {
    ssize_t n = recv (c->fd, p, size, 0);

    if (n < 0 && errno == EINTR)
      continue;
    if (!client_moved (c, n, "recv"))
      return false;
    p += n;
    size -= (size_t)n;
  }
  return true;
}

/* The server has closed it, and nothing more has come. */
static TEST_UNUSED void
client_assert_closed (const struct client *c)
{
  char byte;
  ssize_t n = recv (c->fd, &byte, 1, 0);

  assert (n == 0 || (n < 0 && errno == ECONNRESET));
}

/* --- Handshake ------------------------------------------------------------ */

static void client_start_tls (struct client *c);

/* Connect and read the greeting; `flags` are the client's. */
static TEST_UNUSED struct client
client_connect (const char *socket_path, uint32_t flags)
{
  struct client c = { .fd = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0) };
  const struct timeval deadline = { .tv_sec = CLIENT_DEADLINE_S };
  struct sockaddr_un address = { .sun_family = AF_UNIX };
  struct nbd_greeting greeting;

  assert (c.fd >= 0);
  snprintf (address.sun_path, sizeof address.sun_path, "%s", socket_path);
  setsockopt (c.fd, SOL_SOCKET, SO_RCVTIMEO, &deadline, sizeof deadline);
  setsockopt (c.fd, SOL_SOCKET, SO_SNDTIMEO, &deadline, sizeof deadline);
  assert (connect (c.fd, (struct sockaddr *)&address, sizeof address) == 0);
  client_receive (&c, &greeting, sizeof greeting);
  assert (greeting.magic == htobe64 (NBD_MAGIC));
  assert (greeting.option == htobe64 (NBD_OPTION));
  flags = htobe32 (flags);
  client_send (&c, &flags, sizeof flags);
  if (client_secure)
    client_start_tls (&c);
  return c;
}

static TEST_UNUSED void
client_option (const struct client *c, uint32_t option, const void *data,
               uint32_t size)
{
  const struct nbd_option_header head = { .magic = htobe64 (NBD_OPTION),
                                          .option = htobe32 (option),
                                          .length = htobe32 (size) };

  client_send (c, &head, sizeof head);
  client_send (c, data, size);
}

/* The next reply to that option; its type.  What it carries goes to `data`,
 * which has room for `*size`.
 */
static TEST_UNUSED uint32_t
client_option_reply (const struct client *c, uint32_t option, void *data,
                     uint32_t *size)
{
  struct nbd_option_reply reply;

  client_receive (c, &reply, sizeof reply);
  assert (reply.magic == htobe64 (NBD_OPTION_REPLY));
  assert (reply.option == htobe32 (option));
  assert (be32toh (reply.length) <= *size);
  *size = be32toh (reply.length);
  client_receive (c, data, *size);
  return be32toh (reply.type);
}

/* Send the option, skip to the end of its replies; the last one's type. */
static TEST_UNUSED uint32_t
client_ask (const struct client *c, uint32_t option, const void *data,
            uint32_t size)
{
  uint8_t ignored[4096];
  uint32_t type, room;

  client_option (c, option, data, size);
  do {
    room = sizeof ignored;
    type = client_option_reply (c, option, ignored, &room);
  } while (type != NBD_REP_ACK && !(type & 0x80000000u));
  return type;
}

static TEST_UNUSED void
client_start_tls (struct client *c)
{
  const struct timeval deadline = { .tv_sec = CLIENT_DEADLINE_S };

  assert (client_ask (c, NBD_OPT_STARTTLS, NULL, 0) == NBD_REP_ACK);
  c->fd = client_secure (c->fd);
  setsockopt (c->fd, SOL_SOCKET, SO_RCVTIMEO, &deadline, sizeof deadline);
  setsockopt (c->fd, SOL_SOCKET, SO_SNDTIMEO, &deadline, sizeof deadline);
}

static TEST_UNUSED void
client_structure (struct client *c)
{
  assert (client_ask (c, NBD_OPT_STRUCTURED_REPLY, NULL, 0) == NBD_REP_ACK);
  c->structured = true;
}

/* Into transmission. */
static TEST_UNUSED void
client_go (const struct client *c)
{
  const uint8_t no_name_no_infos[6] = { 0 };

  assert (client_ask (c, NBD_OPT_GO, no_name_no_infos, sizeof no_name_no_infos)
          == NBD_REP_ACK);
}

/* As most do. */
static TEST_UNUSED struct client
client_open (const char *socket_path, bool structured)
{
  struct client c = client_connect (socket_path, NBD_FLAG_FIXED_NEWSTYLE
                                                     | NBD_FLAG_NO_ZEROES);

  if (structured)
    client_structure (&c);
  client_go (&c);
  return c;
}

/* --- Transmission --------------------------------------------------------- */

static TEST_UNUSED struct nbd_request
client_header (uint16_t type, uint16_t flags, uint64_t cookie, uint64_t offset,
               uint32_t length)
{
  return (struct nbd_request){ .magic = htobe32 (NBD_REQUEST_MAGIC),
                               .flags = htobe16 (flags),
                               .type = htobe16 (type),
                               .cookie = htobe64 (cookie),
                               .offset = htobe64 (offset),
                               .length = htobe32 (length) };
}

/* `data` is a write's payload. */
static TEST_UNUSED bool
client_request (const struct client *c, uint16_t type, uint16_t flags,
                uint64_t cookie, uint64_t offset, uint32_t length,
                const void *data)
{
  const struct nbd_request header
      = client_header (type, flags, cookie, offset, length);

  return client_send (c, &header, sizeof header)
         && (type != NBD_CMD_WRITE || client_send (c, data, length));
}

/* The one chunk this server answers with, behind its magic number. */
static TEST_UNUSED bool
client_chunk (const struct client *c, struct answer *answer, void *buf,
              uint32_t room)
{
  struct nbd_chunk chunk = { .magic = htobe32 (NBD_CHUNK_MAGIC) };
  struct __attribute__ ((packed)) {
    uint32_t error;
    uint16_t message_length;
  } error = { .error = 0 };
  uint64_t offset;
  uint32_t context, head = 0;

  if (!client_receive (c, (char *)&chunk + 4, sizeof chunk - 4))
    return false;
  assert (chunk.flags == htobe16 (NBD_CHUNK_DONE));
  answer->cookie = be64toh (chunk.cookie);
  switch (be16toh (chunk.type)) {
  case NBD_CHUNK_ERROR:
    head = sizeof error;
    if (!client_receive (c, &error, head))
      return false;
    assert (error.error != 0 && error.message_length == 0);
    break;
  case NBD_CHUNK_OFFSET_DATA:
    head = sizeof offset;
    if (!client_receive (c, &offset, head))
      return false;
    break;
  case NBD_CHUNK_BLOCK_STATUS:
    head = sizeof context;
    if (!client_receive (c, &context, head))
      return false;
    break;
  default:
    assert (!"a chunk of a known type");
  }
  answer->error = be32toh (error.error);
  answer->length = be32toh (chunk.length) - head;
  assert (answer->length <= room);
  return client_receive (c, buf, answer->length);
}

/* The next answer's head.  A simple one does not tell whether data follow: a
 * caller that knows what the cookie stood for receives them.  False: the
 * connection ended.
 */
static TEST_UNUSED bool
client_answer (const struct client *c, struct answer *answer, void *buf,
               uint32_t room, bool *simple)
{
  struct nbd_simple_reply reply;

  if (!client_receive (c, &reply, 4))
    return false;
  *simple = reply.magic == htobe32 (NBD_SIMPLE_REPLY_MAGIC);
  if (!*simple) {
    assert (reply.magic == htobe32 (NBD_CHUNK_MAGIC) && c->structured);
    return client_chunk (c, answer, buf, room);
  }
  if (!client_receive (c, (char *)&reply + 4, sizeof reply - 4))
    return false;
  *answer = (struct answer){ .cookie = be64toh (reply.cookie),
                             .error = be32toh (reply.error) };
  return true;
}

/* One request and its answer, with nothing else under way; the NBD error. */
static TEST_UNUSED uint32_t
client_do (const struct client *c, uint16_t type, uint16_t flags,
           uint64_t offset, uint32_t length, void *buf)
{
  static _Thread_local uint64_t cookie;
  struct answer answer;
  bool simple, reads = type == NBD_CMD_READ;

  assert (client_request (c, type, flags, ++cookie, offset, length, buf));
  assert (client_answer (c, &answer, buf, reads ? length : 0, &simple));
  assert (answer.cookie == cookie);
  assert (simple == !(c->structured && reads));
  if (simple && reads && answer.error == 0)
    assert (client_receive (c, buf, length));
  return answer.error;
}

static TEST_UNUSED void
client_close (const struct client *c)
{
  close (c->fd);
}

/* Send a disconnect: the server closes the connection when it has answered all.
 */
static TEST_UNUSED void
client_leave (const struct client *c)
{
  assert (client_request (c, NBD_CMD_DISC, 0, 0, 0, 0, NULL));
  client_assert_closed (c);
  client_close (c);
}

#endif /* NBDM_NBD_CLIENT_H */
