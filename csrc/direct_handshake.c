/* SPDX-License-Identifier: BSD-3-Clause */

/* The direct door's handshake: fixed newstyle, as doc/proto.md of the NBD
 * project has it.
 *
 * There is one export, and it goes by any name, as through the other doors.
 * TLS is not spoken here; the native door has nbdkit for it.
 *
 * All lengths come from somebody we do not know: an option is read whole into
 * a buffer of fixed size, and taken apart by a cursor that cannot leave it.
 */

#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/uio.h>

#include "direct.h"

#define MAX_OPTION 8192u /* bytes; names are up to 4096 */
#define SILENCE_S 30
#define CONTEXT "base:allocation"

struct handshake {
  int fd;
  const struct nbdm *v;
  struct agreed *agreed;
  bool no_zeroes;
  uint32_t option;
  uint32_t length;
  uint8_t data[MAX_OPTION];
};

/* What an option comes to: -errno ends the connection. */
enum next { ANOTHER_OPTION = 0, TRANSMISSION = 1 };

static int
read_all (int fd, void *buf, size_t size)
{
  ssize_t n;

  if (size == 0)
    return 0;
  do
    n = recv (fd, buf, size, MSG_WAITALL);
  while (n < 0 && errno == EINTR);
  if (n < 0)
    return -errno;
  return (size_t)n == size ? 0 : -ECONNRESET;
}

/* Short enough for a socket's buffer, so it goes as a whole or not at all. */
static int
send_all (int fd, struct iovec *iov, int nr)
{
  struct msghdr msg = { .msg_iov = iov, .msg_iovlen = (size_t)nr };
  size_t size = 0;
  ssize_t n;

  for (int i = 0; i < nr; i++)
    size += iov[i].iov_len;
  do
    n = sendmsg (fd, &msg, MSG_NOSIGNAL);
  while (n < 0 && errno == EINTR);
  if (n < 0)
    return -errno;
  return (size_t)n == size ? 0 : -ECONNRESET;
}

static int
reply (const struct handshake *h, uint32_t type, const void *data, size_t size)
{
  struct nbd_option_reply head = { .magic = htobe64 (NBD_OPTION_REPLY),
                                   .option = htobe32 (h->option),
                                   .type = htobe32 (type),
                                   .length = htobe32 ((uint32_t)size) };
  struct iovec iov[]
      = { { &head, sizeof head }, { (void *)(uintptr_t)data, size } };

  return send_all (h->fd, iov, size > 0 ? 2 : 1);
}

/* --- Taking an option apart ---------------------------------------------- */

struct cursor {
  const uint8_t *at;
  uint32_t left;
  bool bad; /* it wanted more than there is */
};

static const uint8_t *
take (struct cursor *c, uint32_t size)
{
  const uint8_t *at = c->at;

  if (c->bad || size > c->left) {
    c->bad = true;
    return NULL;
  }
  c->at += size;
  c->left -= size;
  return at;
}

static uint32_t
take_u32 (struct cursor *c)
{
  const uint8_t *at = take (c, 4);
  uint32_t value = 0;

  if (at)
    memcpy (&value, at, 4);
  return be32toh (value);
}

static uint16_t
take_u16 (struct cursor *c)
{
  const uint8_t *at = take (c, 2);
  uint16_t value = 0;

  if (at)
    memcpy (&value, at, 2);
  return be16toh (value);
}

/* --- The options --------------------------------------------------------- */

static uint16_t
transmission_flags (const struct handshake *h)
{
  return (uint16_t)(NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA
                    | NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES
                    | NBD_FLAG_CAN_MULTI_CONN | NBD_FLAG_SEND_CACHE
                    | NBD_FLAG_SEND_FAST_ZERO
                    | (h->agreed->structured ? NBD_FLAG_SEND_DF : 0));
}

static int
export_name (struct handshake *h)
{
  struct nbd_export export = { .size = htobe64 (h->v->size),
                               .flags = htobe16 (transmission_flags (h)) };
  size_t size = sizeof export - (h->no_zeroes ? sizeof export.zeroes : 0);
  struct iovec iov = { &export, size };
  int rc = send_all (h->fd, &iov, 1);

  return rc < 0 ? rc : TRANSMISSION;
}

static int
list (struct handshake *h)
{
  static const uint32_t empty_name = 0;
  int rc;

  if (h->length > 0)
    return reply (h, NBD_REP_ERR_INVALID, NULL, 0);
  rc = reply (h, NBD_REP_SERVER, &empty_name, sizeof empty_name);
  return rc < 0 ? rc : reply (h, NBD_REP_ACK, NULL, 0);
}

static int
send_infos (struct handshake *h, bool block_size)
{
  struct nbd_info_export export = { .type = htobe16 (NBD_INFO_EXPORT),
                                    .size = htobe64 (h->v->size),
                                    .flags = htobe16 (transmission_flags (h)) };
  struct nbd_info_block_size block
      = { .type = htobe16 (NBD_INFO_BLOCK_SIZE),
          .minimum = htobe32 (nbdm_min_block (h->v)),
          .preferred = htobe32 (NBDM_PREFERRED_BLOCK),
          .maximum = htobe32 (NBDM_MAX_REQUEST) };
  int rc = reply (h, NBD_REP_INFO, &export, sizeof export);

  if (rc == 0 && block_size)
    rc = reply (h, NBD_REP_INFO, &block, sizeof block);
  return rc < 0 ? rc : reply (h, NBD_REP_ACK, NULL, 0);
}

static int
info_or_go (struct handshake *h)
{
  struct cursor c = { h->data, h->length, false };
  bool block_size = false;
  uint16_t nr;
  int rc;

  take (&c, take_u32 (&c)); /* the name */
  nr = take_u16 (&c);
  for (uint16_t i = 0; i < nr && !c.bad; i++)
    if (take_u16 (&c) == NBD_INFO_BLOCK_SIZE && !c.bad)
      block_size = true;
  if (c.bad || c.left > 0)
    return reply (h, NBD_REP_ERR_INVALID, NULL, 0);
  rc = send_infos (h, block_size);
  if (rc < 0)
    return rc;
  return h->option == NBD_OPT_GO ? TRANSMISSION : ANOTHER_OPTION;
}

static int
structured_reply (struct handshake *h)
{
  if (h->length > 0)
    return reply (h, NBD_REP_ERR_INVALID, NULL, 0);
  h->agreed->structured = true;
  return reply (h, NBD_REP_ACK, NULL, 0);
}

/* Does a query ask for the one context there is?  Listing, "base:" does too. */
static bool
wants_context (const uint8_t *query, uint32_t length, bool listing)
{
  static const char prefix[] = "base:";

  if (length == strlen (CONTEXT) && memcmp (query, CONTEXT, length) == 0)
    return true;
  return listing && length == strlen (prefix)
         && memcmp (query, prefix, length) == 0;
}

static int
meta_context (struct handshake *h)
{
  struct __attribute__ ((packed)) {
    uint32_t id;
    char name[sizeof CONTEXT - 1];
  } context = { .id = htobe32 (DIRECT_CONTEXT) };
  struct cursor c = { h->data, h->length, false };
  bool listing = h->option == NBD_OPT_LIST_META_CONTEXT;
  bool wanted = false;
  uint32_t nr;
  int rc = 0;

  memcpy (context.name, CONTEXT, sizeof context.name);
  take (&c, take_u32 (&c)); /* the export's name */
  nr = take_u32 (&c);
  for (uint32_t i = 0; i < nr && !c.bad; i++) {
    uint32_t length = take_u32 (&c);
    const uint8_t *query = take (&c, length);

    if (query && wants_context (query, length, listing))
      wanted = true;
  }
  if (!listing)
    h->agreed->block_status = false; /* what was set before is forgotten */
  if (c.bad || c.left > 0 || !h->agreed->structured)
    return reply (h, NBD_REP_ERR_INVALID, NULL, 0);
  if (listing && nr == 0)
    wanted = true;
  if (!listing)
    h->agreed->block_status = wanted;
  if (wanted)
    rc = reply (h, NBD_REP_META_CONTEXT, &context, sizeof context);
  return rc < 0 ? rc : reply (h, NBD_REP_ACK, NULL, 0);
}

static int
leave (struct handshake *h)
{
  (void)reply (h, NBD_REP_ACK, NULL, 0);
  return -ECONNRESET;
}

static int
one_option (struct handshake *h)
{
  struct nbd_option_header head;
  int rc = read_all (h->fd, &head, sizeof head);

  if (rc < 0)
    return rc;
  h->option = be32toh (head.option);
  h->length = be32toh (head.length);
  if (head.magic != htobe64 (NBD_OPTION) || h->length > MAX_OPTION)
    return -EPROTO;
  rc = read_all (h->fd, h->data, h->length);
  if (rc < 0)
    return rc;
  switch (h->option) {
  case NBD_OPT_EXPORT_NAME:
    return export_name (h);
  case NBD_OPT_ABORT:
    return leave (h);
  case NBD_OPT_LIST:
    return list (h);
  case NBD_OPT_INFO:
  case NBD_OPT_GO:
    return info_or_go (h);
  case NBD_OPT_STRUCTURED_REPLY:
    return structured_reply (h);
  case NBD_OPT_LIST_META_CONTEXT:
  case NBD_OPT_SET_META_CONTEXT:
    return meta_context (h);
  default:
    return reply (h, NBD_REP_ERR_UNSUP, NULL, 0);
  }
}

static int
greet (struct handshake *h)
{
  const uint32_t known = NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES;
  struct nbd_greeting greeting = { .magic = htobe64 (NBD_MAGIC),
                                   .option = htobe64 (NBD_OPTION),
                                   .flags = htobe16 ((uint16_t)known) };
  struct iovec iov = { &greeting, sizeof greeting };
  uint32_t flags;
  int rc = send_all (h->fd, &iov, 1);

  if (rc == 0)
    rc = read_all (h->fd, &flags, sizeof flags);
  if (rc < 0)
    return rc;
  if (be32toh (flags) & ~known)
    return -EPROTO;
  h->no_zeroes = be32toh (flags) & NBD_FLAG_NO_ZEROES;
  return 0;
}

int
direct_handshake (int fd, const struct nbdm *v, struct agreed *agreed)
{
  struct handshake h = { .fd = fd, .v = v, .agreed = agreed };
  struct timeval silence = { .tv_sec = SILENCE_S };
  int rc;

  *agreed = (struct agreed){ false, false };
  (void)setsockopt (fd, SOL_SOCKET, SO_RCVTIMEO, &silence, sizeof silence);
  (void)setsockopt (fd, SOL_SOCKET, SO_SNDTIMEO, &silence, sizeof silence);
  rc = greet (&h);
  while (rc == ANOTHER_OPTION)
    rc = one_option (&h);
  silence = (struct timeval){ .tv_usec = DIRECT_SEND_MS * 1000 };
  (void)setsockopt (fd, SOL_SOCKET, SO_SNDTIMEO, &silence, sizeof silence);
  return rc < 0 ? rc : 0;
}
