/* SPDX-License-Identifier: BSD-3-Clause */

/* Connect to a server with TLS, and make NBD's handshake: fixed newstyle, as in
 * doc/proto.md of the NBD project.  Also without TLS, for calls between nodes.
 *
 * libnbd does this too, but keeps its TLS session to itself: it would have to
 * carry all data, and a thread could not wait in poll for such a remote.
 *
 * Everything comes from an unknown server until its certificate or key is
 * checked, so before TLS nothing is read but the greeting and one reply, both
 * of a fixed length.  No byte of what comes before TLS is used after it.
 */

#define _GNU_SOURCE
#include <ctype.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "api.h"
#include "base/clock.h"
#include "base/error.h"
#include "wire/conn.h"
#include "wire/nbd_uri.h"
#include "wire/protocol.h"
#include "wire/receive.h"
#include "wire/secure_connect.h"
#include "wire/stream.h"
#include "wire/stream_whole.h"
#include "wire/tls.h"
#include "wire/tls_secrets.h"
#include "wire/transport.h"

#define DEFAULT_MAX_PAYLOAD (32u << 20) /* the protocol's advice */
#define MAX_REPLY 8192u                 /* bytes; a text has 4096 at most */
#define MAX_NAME 4096u
#define MAX_MIN_BLOCK 65536u
#define MIN_PREFERRED 512u

struct greeter {
  struct conn *conn;
  const struct nbd_uri *uri;
  uint64_t until_ns;
  uint32_t timeout_ms;
  bool structured; /* replies are wanted */
  uint16_t flags;  /* of the export */
  bool described;  /* the export came */
  uint32_t type, length;
  uint8_t data[MAX_REPLY];
};

static int
too_late (const struct greeter *g)
{
  return set_message (-ETIMEDOUT, "no answer within %u ms", g->timeout_ms);
}

/* Wait until the socket is ready, or the time is over. */
static int
await (const struct greeter *g, int fd, short events)
{
  struct pollfd pfd = { .fd = fd, .events = events };
  uint64_t now = now_ns ();

  if (now >= g->until_ns)
    return too_late (g);
  if (poll (&pfd, 1, (int)((g->until_ns - now) / NS_PER_MS) + 1) < 0
      && errno != EINTR)
    return set_error (-errno, "connect: poll");
  return 0;
}

/* --- A connected socket --------------------------------------------------- */

static int
connect_to (const struct greeter *g, const struct sockaddr *address,
            socklen_t size)
{
  int fd = socket (address->sa_family,
                   SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  int rc, err = 0;
  socklen_t len = sizeof err;

  if (fd < 0)
    return set_error (-errno, "connect: socket");
  rc = connect (fd, address, size) < 0 ? -errno : 0;
  if (rc == -EINPROGRESS) {
    rc = await (g, fd, POLLOUT);
    if (rc == 0 && now_ns () >= g->until_ns)
      rc = too_late (g);
    if (rc == 0 && getsockopt (fd, SOL_SOCKET, SO_ERROR, &err, &len) == 0)
      rc = -err;
  }
  if (rc == 0)
    return fd;
  close (fd);
  return rc == -ETIMEDOUT ? too_late (g) : rc;
}

static int
connect_unix (const struct greeter *g)
{
  struct sockaddr_un address = { .sun_family = AF_UNIX };
  int fd;

  if (strlen (g->uri->socket) >= sizeof address.sun_path)
    return set_error (-ENAMETOOLONG, "connect: %s", g->uri->socket);
  memcpy (address.sun_path, g->uri->socket, strlen (g->uri->socket));
  fd = connect_to (g, (struct sockaddr *)&address, sizeof address);
  return fd < 0 ? set_error (fd, "connect: %s", g->uri->socket) : fd;
}

static int
connect_tcp (const struct greeter *g)
{
  const struct addrinfo hints
      = { .ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM };
  const int on = 1;
  struct addrinfo *found = NULL;
  int fd = -ENOENT,
      rc = getaddrinfo (g->uri->host, g->uri->port, &hints, &found);

  if (rc != 0)
    return set_message (-ENOENT, "connect: %s: %s", g->uri->host,
                        gai_strerror (rc));
  for (struct addrinfo *a = found; a && fd < 0 && fd != -ETIMEDOUT;
       a = a->ai_next)
    fd = connect_to (g, a->ai_addr, a->ai_addrlen);
  freeaddrinfo (found);
  if (fd == -ETIMEDOUT)
    return fd;
  if (fd < 0)
    return set_error (fd, "connect: %s:%s", g->uri->host, g->uri->port);
  (void)setsockopt (fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  return fd;
}

/* --- Moving bytes by the time ----------------------------------------------
 */

static int
describe (const struct greeter *g, int rc)
{
  const char *trouble = tls_trouble (&g->conn->stream);

  if (rc == 0)
    return 0;
  if (rc == -ETIMEDOUT)
    return too_late (g);
  if (rc == -EPROTO && trouble)
    return set_message (-EACCES, "TLS: the server refuses: %s", trouble);
  if (rc == -EPIPE || rc == -ECONNRESET)
    return set_message (-ECONNRESET, "the server closed the connection");
  return set_error (rc, "connect");
}

static int
receive_all (const struct greeter *g, void *to, size_t size)
{
  return describe (
      g, stream_receive_whole (&g->conn->stream, to, size, g->until_ns));
}

static int
send_all (const struct greeter *g, const void *from, size_t size)
{
  struct iovec iov = { (void *)(uintptr_t)from, size };

  return describe (g,
                   stream_send_whole (&g->conn->stream, &iov, 1, g->until_ns));
}

/* --- Options ---------------------------------------------------------------
 */

static int
send_option (const struct greeter *g, uint32_t option, const void *data,
             uint32_t size)
{
  uint8_t bytes[sizeof (struct nbd_option_header) + MAX_NAME + 16];
  const struct nbd_option_header head = { .magic = htobe64 (NBD_OPTION),
                                          .option = htobe32 (option),
                                          .length = htobe32 (size) };

  memcpy (bytes, &head, sizeof head);
  if (size > 0)
    memcpy (bytes + sizeof head, data, size);
  return send_all (g, bytes, sizeof head + size);
}

static int
receive_reply (struct greeter *g, uint32_t option)
{
  struct nbd_option_reply head;
  int rc = receive_all (g, &head, sizeof head);

  if (rc < 0)
    return rc;
  g->type = be32toh (head.type);
  g->length = be32toh (head.length);
  if (head.magic != htobe64 (NBD_OPTION_REPLY)
      || head.option != htobe32 (option) || g->length > MAX_REPLY)
    return set_message (-EPROTO, "the server sent a reply that is none");
  return receive_all (g, g->data, g->length);
}

/* The server refuses the option; its words may be anything. */
static int
refused (struct greeter *g, const char *what)
{
  char words[NBDM_TEXT_LEN];
  size_t size = g->length < sizeof words - 1 ? g->length : sizeof words - 1;

  for (size_t i = 0; i < size; i++)
    words[i] = (char)(isprint (g->data[i]) ? g->data[i] : '?');
  words[size] = '\0';
  return set_message (-ECONNREFUSED, "%s%s%s", what, size > 0 ? ": " : "",
                      words);
}

static int
greet (struct greeter *g)
{
  struct nbd_greeting greeting;
  uint32_t flags = NBD_FLAG_FIXED_NEWSTYLE;
  int rc = receive_all (g, &greeting, sizeof greeting);

  if (rc < 0)
    return rc;
  if (greeting.magic != htobe64 (NBD_MAGIC)
      || greeting.option != htobe64 (NBD_OPTION)
      || !(be16toh (greeting.flags) & NBD_FLAG_FIXED_NEWSTYLE))
    return set_message (-EPROTO, "this is no NBD server%s",
                        g->uri->secure ? " with TLS" : "");
  flags |= be16toh (greeting.flags) & NBD_FLAG_NO_ZEROES;
  flags = htobe32 (flags);
  return send_all (g, &flags, sizeof flags);
}

static int
start_tls (struct greeter *g)
{
  int rc = send_option (g, NBD_OPT_STARTTLS, NULL, 0);

  if (rc == 0)
    rc = receive_reply (g, NBD_OPT_STARTTLS);
  if (rc < 0)
    return rc;
  if (g->type != NBD_REP_ACK)
    return refused (g, "the server offers no TLS");
  if (g->length > 0)
    return set_message (-EPROTO, "the server sent a reply that is none");
  return tls_connect (&g->conn->stream, g->conn->secrets,
                      g->uri->socket ? NULL : g->uri->host, g->uri->name,
                      g->until_ns);
}

static int
structure (struct greeter *g)
{
  int rc = send_option (g, NBD_OPT_STRUCTURED_REPLY, NULL, 0);

  if (rc == 0)
    rc = receive_reply (g, NBD_OPT_STRUCTURED_REPLY);
  if (rc < 0)
    return rc;
  return g->type == NBD_REP_ACK
             ? 0
             : refused (g, "the server has no structured replies");
}

static bool
is_power_of_2 (uint32_t value)
{
  return value > 0 && (value & (value - 1)) == 0;
}

/* What the protocol allows, by libnbd's checks: reads and writes are cut into
 * pieces by these sizes.
 */
static bool
are_block_sizes (uint32_t min, uint32_t preferred, uint32_t max)
{
  return is_power_of_2 (min) && min <= MAX_MIN_BLOCK
         && is_power_of_2 (preferred) && preferred >= MIN_PREFERRED
         && min <= preferred && preferred <= max
         && (max == UINT32_MAX || max % min == 0);
}

static void
take_block_sizes (struct conn_info *info,
                  const struct nbd_info_block_size *said)
{
  uint32_t min = be32toh (said->minimum), max = be32toh (said->maximum);

  if (!are_block_sizes (min, be32toh (said->preferred), max))
    return; /* as if it had said none */
  info->min_block = min;
  info->max_payload = max;
}

static void
take_info (struct greeter *g)
{
  struct conn_info *info = &g->conn->info;
  struct nbd_info_export export;
  struct nbd_info_block_size block;
  uint16_t type;

  memcpy (&type, g->data, sizeof type);
  switch (be16toh (type)) {
  case NBD_INFO_EXPORT:
    if (g->length != sizeof export)
      return;
    memcpy (&export, g->data, sizeof export);
    info->size = be64toh (export.size);
    g->flags = be16toh (export.flags);
    g->described = true;
    break;
  case NBD_INFO_BLOCK_SIZE:
    if (g->length != sizeof block)
      return;
    memcpy (&block, g->data, sizeof block);
    take_block_sizes (info, &block);
    break;
  case NBD_INFO_DESCRIPTION:
    snprintf (info->description, sizeof info->description, "%.*s",
              (int)(g->length - sizeof type),
              (const char *)g->data + sizeof type);
  }
}

/* What libnbd says of an export, from what the server said. */
static int
check_info (struct greeter *g)
{
  struct conn_info *info = &g->conn->info;

  if (!g->described)
    return set_message (-EPROTO, "the server did not describe its disk");
  if (info->size > INT64_MAX)
    return set_message (-EPROTO, "its disk has 2^63 bytes or more, it says");
  if (info->min_block == 0)
    info->min_block = 1;
  if (info->max_payload == 0 || info->max_payload > DEFAULT_MAX_PAYLOAD)
    info->max_payload = DEFAULT_MAX_PAYLOAD;
  info->read_only = g->flags & NBD_FLAG_READ_ONLY;
  info->can_flush = g->flags & NBD_FLAG_SEND_FLUSH;
  info->can_fua = g->flags & NBD_FLAG_SEND_FUA;
  info->can_zero = g->flags & NBD_FLAG_SEND_WRITE_ZEROES;
  info->can_fast_zero = g->flags & NBD_FLAG_SEND_FAST_ZERO;
  return 0;
}

/* Ask for the export, its block sizes and its description. */
static int
go (struct greeter *g)
{
  const uint16_t infos[] = { htobe16 (2), htobe16 (NBD_INFO_BLOCK_SIZE),
                             htobe16 (NBD_INFO_DESCRIPTION) };
  uint32_t size = (uint32_t)strlen (g->uri->export), length = htobe32 (size);
  uint8_t data[sizeof length + MAX_NAME + sizeof infos];
  int rc;

  if (size > MAX_NAME)
    return set_message (-EINVAL, "the export's name is longer than %u bytes",
                        MAX_NAME);
  memcpy (data, &length, sizeof length);
  memcpy (data + sizeof length, g->uri->export, size);
  memcpy (data + sizeof length + size, infos, sizeof infos);
  rc = send_option (g, NBD_OPT_GO, data,
                    (uint32_t)(sizeof length + size + sizeof infos));
  while (rc == 0) {
    rc = receive_reply (g, NBD_OPT_GO);
    if (rc == 0 && g->type == NBD_REP_ACK)
      return check_info (g);
    if (rc == 0 && g->type == NBD_REP_INFO && g->length >= 2)
      take_info (g);
    else if (rc == 0 && g->type != NBD_REP_INFO)
      rc = refused (g, "the server refuses the export");
  }
  return rc;
}

static int
negotiate (struct greeter *g)
{
  struct conn *conn = g->conn;
  int flags, rc;

  conn->fd = g->uri->socket ? connect_unix (g) : connect_tcp (g);
  if (conn->fd < 0) {
    rc = conn->fd;
    conn->fd = -1;
    return rc;
  }
  receive_prepare (conn->fd);
  conn->stream = stream_plain (conn->fd);
  rc = greet (g);
  if (rc == 0 && g->uri->secure)
    rc = start_tls (g);
  if (rc == 0 && g->structured)
    rc = structure (g);
  if (rc == 0)
    rc = go (g);
  if (rc < 0)
    return rc;
  flags = fcntl (conn->fd, F_GETFL);
  if (flags < 0 || fcntl (conn->fd, F_SETFL, flags & ~O_NONBLOCK) < 0)
    return set_error (-errno, "connect: the socket");
  return 0;
}

static int
connect_by (struct greeter *g, const char *text)
{
  struct nbd_uri uri;
  int rc = nbd_uri_parse (text, &uri);

  if (rc < 0)
    return rc;
  g->uri = &uri;
  if (uri.secure)
    rc = tls_secrets_of_uri (&uri, &g->conn->secrets);
  if (rc == 0)
    rc = negotiate (g);
  nbd_uri_free (&uri);
  return rc;
}

int
secure_connect (struct conn *conn, const char *text, uint64_t until_ns,
                uint32_t timeout_ms)
{
  struct greeter g
      = { .conn = conn, .until_ns = until_ns, .timeout_ms = timeout_ms };

  return connect_by (&g, text);
}

int
call_connect (struct conn *conn, const char *text, uint64_t until_ns,
              uint32_t timeout_ms)
{
  struct greeter g = { .conn = conn,
                       .until_ns = until_ns,
                       .timeout_ms = timeout_ms,
                       .structured = true };

  return connect_by (&g, text);
}
