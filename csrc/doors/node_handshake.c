/* SPDX-License-Identifier: BSD-3-Clause */

/* The handshake with other nodes, and with clients of a closed listener;
 * docs/PROTOCOL.md has the bytes.
 *
 * The name of the export says what a node wants: NAME.meta to talk, NAME.dirty
 * to read a map, NAME@... to write to the disk.  No plain client gives such a
 * name by accident, and one that does gets no disk: Python judges each claim.
 * All other names are refused, and so is every option that has no error reply.
 */

#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api.h"
#include "base/error.h"
#include "doors/direct.h"
#include "doors/direct_server.h"
#include "doors/export.h"
#include "doors/handshake.h"
#include "doors/node_calls.h"
#include "doors/node_handshake.h"
#include "doors/node_session.h"
#include "volume/volume.h"
#include "wire/protocol.h"

#define MAX_CLAIM 255u /* bytes */

static struct exported *
disk_of (const struct handshake *h)
{
  return TAILQ_FIRST (h->exports);
}

static const char *
volume_of (const struct handshake *h)
{
  return disk_of (h)->executor.volume->name;
}

/* --- Names --------------------------------------------------------------- */

static bool
is_named (const struct handshake *h, const struct wanted *w, const char *suffix)
{
  size_t size = strlen (volume_of (h)), more = strlen (suffix);

  return w->length == size + more && memcmp (w->name, volume_of (h), size) == 0
         && memcmp (w->name + size, suffix, more) == 0;
}

static bool
is_claim (const struct handshake *h, const struct wanted *w)
{
  size_t size = strlen (volume_of (h));

  return w->length > size && w->length <= MAX_CLAIM
         && memcmp (w->name, volume_of (h), size) == 0 && w->name[size] == '@';
}

/* Names are printed, and Python reads them as text. */
static bool
is_printable (const struct wanted *w)
{
  for (uint32_t i = 0; i < w->length; i++)
    if (w->name[i] <= ' ' || w->name[i] > '~')
      return false;
  return true;
}

/* --- The exports --------------------------------------------------------- */

static int
send_infos (const struct handshake *h, uint64_t size, uint32_t most,
            uint16_t flags)
{
  const struct nbd_info_export export
      = { .type = htobe16 (NBD_INFO_EXPORT),
          .size = htobe64 (size),
          .flags = htobe16 (NBD_FLAG_HAS_FLAGS | flags) };
  const struct nbd_info_block_size block
      = { .type = htobe16 (NBD_INFO_BLOCK_SIZE),
          .minimum = htobe32 (1),
          .preferred = htobe32 (NBDM_PREFERRED_BLOCK),
          .maximum = htobe32 (most) };
  int rc = handshake_reply (h, NBD_REP_INFO, &export, sizeof export);

  if (rc == 0)
    rc = handshake_reply (h, NBD_REP_INFO, &block, sizeof block);
  return rc < 0 ? rc : handshake_reply (h, NBD_REP_ACK, NULL, 0);
}

static int
enter_meta (struct handshake *h)
{
  int rc = send_infos (h, NBDM_CALL_LEN, NBDM_CALL_LEN, 0);

  if (rc < 0 || h->option == NBD_OPT_INFO)
    return rc;
  h->session->record.kind = RECORD_META;
  return TRANSMISSION;
}

/* Python's refusal, or ours. */
static int
refuse_call (const struct handshake *h, const struct node_call *call)
{
  if (call->rc == -ETIMEDOUT && call->nr_bytes == 0)
    return handshake_refuse (h, NBD_REP_ERR_POLICY,
                             "this node did not decide in time");
  if (call->rc == -ESTALE)
    return handshake_refuse (h, NBD_REP_ERR_POLICY,
                             "a connection of this session has ended: claim a "
                             "higher session");
  return handshake_refuse (h, NBD_REP_ERR_POLICY, "%.*s", (int)call->nr_bytes,
                           call->bytes ? (const char *)call->bytes : "");
}

static int
take_map (struct handshake *h)
{
  struct node_call call = { .kind = NBDM_CALL_DIRTY };
  int rc = node_calls_ask (h->session, &call);

  if (rc == 0 && call.rc < 0)
    rc = refuse_call (h, &call);
  if (rc < 0 || call.rc < 0) {
    free (call.bytes);
    return rc;
  }
  record_begin (h->session, call.bytes, call.nr_bytes);
  rc = send_infos (h, call.nr_bytes, RECORD_MAX_READ, NBD_FLAG_READ_ONLY);
  return rc < 0 ? rc : TRANSMISSION;
}

/* A map may be large, so few are served at a time. */
static int
enter_dirty (struct handshake *h)
{
  int rc;

  if (!node_calls_take_place (direct_calls (h->session->server)))
    return handshake_refuse (h, NBD_REP_ERR_POLICY,
                             "other nodes are reading the map: try again");
  h->session->record.has_place = true;
  rc = take_map (h);
  if (rc != TRANSMISSION)
    record_end (h->session);
  return rc;
}

static int
enter_disk (struct handshake *h, const struct wanted *w)
{
  struct node_call call
      = { .kind = NBDM_CALL_CLAIM, .words = w->name, .size = w->length };
  int rc = node_calls_ask (h->session, &call);

  if (rc == 0 && call.rc < 0)
    rc = refuse_call (h, &call);
  else if (rc == 0) {
    h->session->claims = true;
    rc = handshake_enter (h, disk_of (h), w->block_size, w->description);
    if (rc == ANOTHER_OPTION)
      rc = -ECONNRESET; /* it has a claim, and could make another one */
  }
  free (call.bytes);
  return rc;
}

/* --- Options ------------------------------------------------------------- */

static int
go (struct handshake *h)
{
  struct wanted w;

  if (!handshake_take_wanted (h, &w))
    return handshake_reply (h, NBD_REP_ERR_INVALID, NULL, 0);
  if (!is_printable (&w) || w.length > MAX_CLAIM)
    return handshake_refuse (h, NBD_REP_ERR_POLICY,
                             "no export of a node has this name");
  if (is_named (h, &w, ".meta"))
    return enter_meta (h);
  if (h->option == NBD_OPT_GO && is_named (h, &w, ".dirty"))
    return enter_dirty (h);
  if (h->option == NBD_OPT_GO && is_claim (h, &w))
    return enter_disk (h, &w);
  return handshake_refuse (
      h, NBD_REP_ERR_POLICY,
      "\"%.*s\" is no export here: this address is for the nodes of volume %s",
      (int)w.length, (const char *)w.name, volume_of (h));
}

static int
closed (const struct handshake *h, const char *text)
{
  return handshake_refuse (h, NBD_REP_ERR_POLICY, "%s", text);
}

int
node_option (struct handshake *h)
{
  char text[NBDM_TEXT_LEN];
  bool is_closed = direct_listener (h->session, text) == NBDM_CLOSED;

  switch (h->option) {
  case NBD_OPT_EXPORT_NAME: /* it has no error reply */
    return -EPROTO;
  case NBD_OPT_INFO:
  case NBD_OPT_GO:
    return is_closed ? closed (h, text) : go (h);
  case NBD_OPT_LIST:
    if (is_closed)
      return closed (h, text);
    return h->length > 0 ? handshake_reply (h, NBD_REP_ERR_INVALID, NULL, 0)
                         : handshake_reply (h, NBD_REP_ACK, NULL, 0);
  case NBD_OPT_LIST_META_CONTEXT:
  case NBD_OPT_SET_META_CONTEXT:
    if (is_closed)
      return closed (h, text);
    return handshake_reply (h, NBD_REP_ERR_UNSUP, NULL, 0);
  default:
    return handshake_reply (h, NBD_REP_ERR_UNSUP, NULL, 0);
  }
}
