/* SPDX-License-Identifier: BSD-3-Clause */

/* The direct door's handshake: fixed newstyle, as in doc/proto.md of the NBD
 * project.
 *
 * A client may ask for an export by any name (export.c), as mostly there is
 * only one.
 *
 * A listener with TLS requires it: until NBD_OPT_STARTTLS a client learns
 * nothing and can only leave.  What it agreed on before does not count after.
 * Each option is read to its end and not a byte further, so that no plain byte
 * is taken for one that came through TLS.
 *
 * All lengths come from an unknown client: an option is read completely into a
 * buffer of fixed size, and parsed with a cursor that cannot leave the buffer.
 */

#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/uio.h>

#include "api.h"
#include "base/clock.h"
#include "base/error.h"
#include "doors/direct.h"
#include "doors/direct_clients.h"
#include "doors/direct_handshake.h"
#include "doors/direct_server.h"
#include "doors/export.h"
#include "doors/handshake.h"
#include "doors/node_handshake.h"
#include "wire/protocol.h"
#include "wire/stream.h"
#include "wire/stream_whole.h"
#include "wire/tls.h"

#define MAX_REFUSED (32u << 20) /* longer ones end the connection */
#define SILENCE_S 30
#define CONTEXT "base:allocation"

/* Neither silence nor a byte now and then keeps the door here. */
static uint64_t
step_until (const struct handshake *h)
{
  uint64_t until = now_ns () + SILENCE_S * NS_PER_S;

  return until < h->until_ns ? until : h->until_ns;
}

static int
read_all (const struct handshake *h, void *buf, size_t size)
{
  return stream_receive_whole (h->stream, buf, size, step_until (h));
}

static int
send_all (const struct handshake *h, struct iovec *iov, int nr)
{
  return stream_send_whole (h->stream, iov, nr, step_until (h));
}

int
handshake_reply (const struct handshake *h, uint32_t type, const void *data,
                 size_t size)
{
  struct nbd_option_reply head = { .magic = htobe64 (NBD_OPTION_REPLY),
                                   .option = htobe32 (h->option),
                                   .type = htobe32 (type),
                                   .length = htobe32 ((uint32_t)size) };
  struct iovec iov[]
      = { { &head, sizeof head }, { (void *)(uintptr_t)data, size } };

  return send_all (h, iov, size > 0 ? 2 : 1);
}

int
handshake_refuse (const struct handshake *h, uint32_t type, const char *fmt,
                  ...)
{
  char words[NBDM_TEXT_LEN];
  va_list args;

  va_start (args, fmt);
  vsnprintf (words, sizeof words, fmt, args);
  va_end (args);
  return handshake_reply (h, type, words, strlen (words));
}

/* --- The options --------------------------------------------------------- */

static uint16_t
transmission_flags (const struct handshake *h, const struct exported *e)
{
  return (uint16_t)(NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA
                    | NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES
                    | NBD_FLAG_CAN_MULTI_CONN | NBD_FLAG_SEND_CACHE
                    | NBD_FLAG_SEND_FAST_ZERO
                    | (h->agreed->structured ? NBD_FLAG_SEND_DF : 0)
                    | (e->read_only ? NBD_FLAG_READ_ONLY : 0));
}

/* Admit the client to this export. */
static void
choose (struct handshake *h, struct exported *e)
{
  h->session->exported = e;
  h->session->lane.executor = &e->executor;
  if (h->mapped != e)
    h->agreed->block_status = false;
}

static int
export_name (struct handshake *h)
{
  struct exported *e = exports_find (h->exports, h->data, h->length);
  struct nbd_export export = { .size = htobe64 (e->size),
                               .flags = htobe16 (transmission_flags (h, e)) };
  size_t size = sizeof export - (h->no_zeroes ? sizeof export.zeroes : 0);
  struct iovec iov = { &export, size };
  int rc = clients_admit (h->session); /* this option has no error reply */

  if (rc == 0)
    rc = send_all (h, &iov, 1);
  if (rc < 0)
    return rc;
  choose (h, e);
  return TRANSMISSION;
}

static int
list_one (const struct handshake *h, const char *name)
{
  struct __attribute__ ((packed)) {
    uint32_t length;
    char name[EXPORT_NAME_LEN];
  } entry = { .length = htobe32 ((uint32_t)strlen (name)) };

  memcpy (entry.name, name, strlen (name));
  return handshake_reply (h, NBD_REP_SERVER, &entry,
                          sizeof entry.length + strlen (name));
}

static int
list (struct handshake *h)
{
  const struct exported *e;
  int rc = 0;

  if (h->length > 0)
    return handshake_reply (h, NBD_REP_ERR_INVALID, NULL, 0);
  TAILQ_FOREACH (e, h->exports, entry)
    if (rc == 0)
      rc = list_one (h, e->name);
  return rc < 0 ? rc : handshake_reply (h, NBD_REP_ACK, NULL, 0);
}

static int
send_description (const struct handshake *h, const struct exported *e)
{
  struct __attribute__ ((packed)) {
    uint16_t type;
    char words[NBDM_CHAIN_LEN];
  } info = { .type = htobe16 (NBD_INFO_DESCRIPTION) };

  nbdm_chain (e->executor.volume, info.words, sizeof info.words);
  return handshake_reply (h, NBD_REP_INFO, &info,
                          sizeof info.type + strlen (info.words));
}

static int
send_infos (struct handshake *h, const struct exported *e, bool block_size,
            bool description)
{
  struct nbd_info_export export
      = { .type = htobe16 (NBD_INFO_EXPORT),
          .size = htobe64 (e->size),
          .flags = htobe16 (transmission_flags (h, e)) };
  struct nbd_info_block_size block
      = { .type = htobe16 (NBD_INFO_BLOCK_SIZE),
          .minimum = htobe32 (nbdm_min_block (e->executor.volume)),
          .preferred = htobe32 (NBDM_PREFERRED_BLOCK),
          .maximum = htobe32 (NBDM_MAX_REQUEST) };
  int rc = handshake_reply (h, NBD_REP_INFO, &export, sizeof export);

  if (rc == 0 && block_size)
    rc = handshake_reply (h, NBD_REP_INFO, &block, sizeof block);
  if (rc == 0 && description)
    rc = send_description (h, e);
  return rc < 0 ? rc : handshake_reply (h, NBD_REP_ACK, NULL, 0);
}

/* Find the export by the name that comes next. */
static struct exported *
take_export (const struct handshake *h, struct cursor *c)
{
  uint32_t length = take_u32 (c);
  const uint8_t *name = take (c, length);

  return exports_find (h->exports, name ? name : h->data, name ? length : 0);
}

bool
handshake_take_wanted (const struct handshake *h, struct wanted *wanted)
{
  struct cursor c = { h->data, h->length, false };
  uint32_t length = take_u32 (&c);
  const uint8_t *name = take (&c, length);
  uint16_t nr = take_u16 (&c);

  *wanted = (struct wanted){ .name = name, .length = name ? length : 0 };
  for (uint16_t i = 0; i < nr && !c.bad; i++) {
    uint16_t info = take_u16 (&c);

    wanted->block_size |= info == NBD_INFO_BLOCK_SIZE && !c.bad;
    wanted->description |= info == NBD_INFO_DESCRIPTION && !c.bad;
  }
  return !c.bad && c.left == 0;
}

int
handshake_enter (struct handshake *h, struct exported *e, bool block_size,
                 bool description)
{
  int rc = clients_admit (h->session);

  if (rc == -EUSERS)
    return handshake_refuse (h, NBD_REP_ERR_POLICY, "%s", last_error ());
  if (rc == 0)
    rc = send_infos (h, e, block_size, description);
  if (rc < 0)
    return rc;
  choose (h, e);
  return TRANSMISSION;
}

static int
info_or_go (struct handshake *h)
{
  struct wanted wanted;
  struct exported *e;

  if (!handshake_take_wanted (h, &wanted))
    return handshake_reply (h, NBD_REP_ERR_INVALID, NULL, 0);
  e = exports_find (h->exports, wanted.name, wanted.length);
  if (h->option == NBD_OPT_GO)
    return handshake_enter (h, e, wanted.block_size, wanted.description);
  return send_infos (h, e, wanted.block_size, wanted.description);
}

static int
structured_reply (struct handshake *h)
{
  if (h->length > 0)
    return handshake_reply (h, NBD_REP_ERR_INVALID, NULL, 0);
  h->agreed->structured = true;
  return handshake_reply (h, NBD_REP_ACK, NULL, 0);
}

/* Does a query ask for the only context?  In a list, "base:" does too. */
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
  const struct exported *e;
  bool wanted = false;
  uint32_t nr;
  int rc = 0;

  memcpy (context.name, CONTEXT, sizeof context.name);
  e = take_export (h, &c);
  nr = take_u32 (&c);
  for (uint32_t i = 0; i < nr && !c.bad; i++) {
    uint32_t length = take_u32 (&c);
    const uint8_t *query = take (&c, length);

    if (query && wants_context (query, length, listing))
      wanted = true;
  }
  if (!listing)
    h->agreed->block_status = false; /* an earlier choice is void */
  if (c.bad || c.left > 0 || !h->agreed->structured)
    return handshake_reply (h, NBD_REP_ERR_INVALID, NULL, 0);
  if (listing && nr == 0)
    wanted = true;
  if (!listing) {
    h->agreed->block_status = wanted;
    h->mapped = e;
  }
  if (wanted)
    rc = handshake_reply (h, NBD_REP_META_CONTEXT, &context, sizeof context);
  return rc < 0 ? rc : handshake_reply (h, NBD_REP_ACK, NULL, 0);
}

static int
leave (struct handshake *h)
{
  (void)handshake_reply (h, NBD_REP_ACK, NULL, 0);
  return -ECONNRESET;
}

/* NBD_OPT_EXPORT_NAME has no error reply. */
static int
needs_tls (struct handshake *h)
{
  if (h->option == NBD_OPT_EXPORT_NAME)
    return -EPROTO;
  return handshake_refuse (h, NBD_REP_ERR_TLS_REQD, "this server needs TLS");
}

static int
start_tls (struct handshake *h)
{
  int rc;

  if (h->session->secrets == NULL)
    return handshake_reply (h, NBD_REP_ERR_UNSUP, NULL, 0);
  if (!h->needs_tls || h->length > 0)
    return handshake_reply (h, NBD_REP_ERR_INVALID, NULL, 0);
  rc = handshake_reply (h, NBD_REP_ACK, NULL, 0);
  if (rc < 0)
    return rc;
  rc = tls_accept (h->stream, h->session->secrets, step_until (h));
  if (rc == -EACCES) /* a client that only left needs no line */
    direct_log (h->session, "turned away: %s", last_error ());
  h->needs_tls = rc < 0;
  return rc < 0 ? rc : ANOTHER_OPTION;
}

/* Read its data all the same: the next option follows. */
static int
too_long (struct handshake *h)
{
  uint32_t left = h->length;

  if (left > MAX_REFUSED || h->option == NBD_OPT_EXPORT_NAME)
    return -EPROTO;
  while (left > 0) {
    uint32_t n = left < MAX_OPTION ? left : MAX_OPTION;
    int rc = read_all (h, h->data, n);

    if (rc < 0)
      return rc;
    left -= n;
  }
  if (h->needs_tls)
    return needs_tls (h);
  return handshake_refuse (h, NBD_REP_ERR_TOO_BIG,
                           "an option of %u bytes: at most %u are allowed",
                           h->length, MAX_OPTION);
}

static int
answer_option (struct handshake *h)
{
  switch (h->option) {
  case NBD_OPT_ABORT:
    return leave (h);
  case NBD_OPT_STARTTLS:
    return start_tls (h);
  }
  if (h->needs_tls)
    return needs_tls (h);
  if (direct_listener (h->session, NULL) != NBDM_CLIENTS
      && h->option != NBD_OPT_STRUCTURED_REPLY)
    return node_option (h);
  switch (h->option) {
  case NBD_OPT_EXPORT_NAME:
    return export_name (h);
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
    return handshake_reply (h, NBD_REP_ERR_UNSUP, NULL, 0);
  }
}

static int
one_option (struct handshake *h)
{
  struct nbd_option_header head;
  int rc = read_all (h, &head, sizeof head);

  if (rc < 0)
    return rc;
  h->option = be32toh (head.option);
  h->length = be32toh (head.length);
  if (head.magic != htobe64 (NBD_OPTION))
    return -EPROTO;
  if (h->length > MAX_OPTION)
    return too_long (h);
  rc = read_all (h, h->data, h->length);
  return rc < 0 ? rc : answer_option (h);
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
  int rc = send_all (h, &iov, 1);

  if (rc == 0)
    rc = read_all (h, &flags, sizeof flags);
  if (rc < 0)
    return rc;
  if (be32toh (flags) & ~known)
    return -EPROTO;
  h->no_zeroes = be32toh (flags) & NBD_FLAG_NO_ZEROES;
  return 0;
}

int
direct_handshake (struct session *s)
{
  int rc, fd = s->fd;
  struct handshake h = { .session = s,
                         .stream = &s->stream,
                         .exports = direct_exports (s->server),
                         .agreed = &s->agreed,
                         .until_ns = now_ns () + s->clients->handshake_ns,
                         .needs_tls = s->secrets != NULL };
  const struct timeval wait = { .tv_usec = DIRECT_SEND_MS * 1000 };

  s->agreed = (struct agreed){ false, false };
  rc = greet (&h);
  while (rc == ANOTHER_OPTION)
    rc = one_option (&h);
  (void)setsockopt (fd, SOL_SOCKET, SO_SNDTIMEO, &wait, sizeof wait);
  return rc < 0 ? rc : 0;
}
