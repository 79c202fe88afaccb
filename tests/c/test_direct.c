/* SPDX-License-Identifier: BSD-3-Clause */

/* The direct door before one client: what it agrees on, and what it says to
 * each request, in both kinds of replies.
 */

#define _GNU_SOURCE

#include "api.h"
#include "doors/direct_server.h"
#include "doors/export.h"
#include "wire/protocol.h"
#include "direct_site.h"

/* The map of the first `length` bytes must begin with so much data. */
static void
assert_data_first (const struct client *c, uint32_t length, uint32_t data)
{
  struct nbd_block_descriptor map[512];
  struct answer answer;
  bool simple;

  assert (client_request (c, NBD_CMD_BLOCK_STATUS, 0, 77, 0, length, NULL));
  assert (client_answer (c, &answer, map, sizeof map, &simple));
  assert (!simple && answer.cookie == 77 && answer.error == 0);
  assert (answer.length >= sizeof *map);
  assert (map[0].status == htobe32 (NBDM_EXTENT_DATA));
  assert (be32toh (map[0].length) >= data);
}

/* A client that ends the handshake with EXPORT_NAME learns size and flags, and
 * is served.
 */
static void
test_export_name (void)
{
  for (unsigned zeroes = 0; zeroes < 2; zeroes++) {
    uint32_t flags
        = NBD_FLAG_FIXED_NEWSTYLE | (zeroes ? 0 : NBD_FLAG_NO_ZEROES);
    struct nbd_export export;
    struct client c;

    bring_up (1, 1000);
    c = client_connect (door, flags);
    client_option (&c, NBD_OPT_EXPORT_NAME, "any", 3);
    client_receive (&c, &export,
                    sizeof export - (zeroes ? 0 : sizeof export.zeroes));
    assert (export.size == htobe64 (SIZE));
    assert (be16toh (export.flags) & NBD_FLAG_CAN_MULTI_CONN);
    round_trip (&c, 10);
    client_leave (&c);
    take_down ();
  }
}

static void
assert_export (const struct client *c)
{
  /* No name, and the block sizes wanted. */
  const uint8_t go[] = { 0, 0, 0, 0, 0, 1, 0, NBD_INFO_BLOCK_SIZE };
  struct nbd_info_export export;
  struct nbd_info_block_size block;
  uint32_t size = sizeof export;

  client_option (c, NBD_OPT_GO, go, sizeof go);
  assert (client_option_reply (c, NBD_OPT_GO, &export, &size) == NBD_REP_INFO);
  assert (size == sizeof export && export.size == htobe64 (SIZE));
  size = sizeof block;
  assert (client_option_reply (c, NBD_OPT_GO, &block, &size) == NBD_REP_INFO);
  assert (size == sizeof block && block.minimum == htobe32 (SECTOR));
  size = 0;
  assert (client_option_reply (c, NBD_OPT_GO, NULL, &size) == NBD_REP_ACK);
}

/* With structured replies and a map of what is data. */
static void
test_go (void)
{
  const uint8_t context[] = "\0\0\0\0\0\0\0\1\0\0\0\17base:allocation";
  struct client c;

  bring_up (1, 1000);
  c = client_connect (door, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
  assert (client_ask (&c, NBD_OPT_SET_META_CONTEXT, context, sizeof context - 1)
          == NBD_REP_ERR_INVALID); /* it needs structured replies */
  client_structure (&c);
  assert (client_ask (&c, NBD_OPT_SET_META_CONTEXT, context, sizeof context - 1)
          == NBD_REP_ACK);
  assert_export (&c);
  round_trip (&c, 60);
  assert (
      client_do (&c, NBD_CMD_WRITE, 0, 0, sizeof context - 1, (void *)context)
      == 0); /* not in sectors */
  {
    uint8_t data[REGION] = { 1 };

    assert (client_do (&c, NBD_CMD_WRITE, 0, 0, sizeof data, data) == 0);
  }
  assert_data_first (&c, SHARED, REGION);
  client_leave (&c);
  take_down ();
}

static void
assert_rude (uint32_t flags, const void *bytes, size_t size)
{
  int (*const secure) (int) = client_secure;
  struct client c;

  if (size == 0) /* the flags are what is rude */
    client_secure = NULL;
  c = client_connect (door, flags);
  client_secure = secure;
  client_send (&c, bytes, size);
  client_assert_closed (&c);
  client_close (&c);
}

/* The options that a handshake accepts, and those that end it. */
static void
test_handshake (void)
{
  const uint32_t flags = NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES;
  struct nbd_option_header head = { .magic = htobe64 (NBD_OPTION),
                                    .option = htobe32 (NBD_OPT_GO),
                                    .length = htobe32 (UINT32_MAX) };
  struct client c;

  bring_up (1, 1000);
  assert_rude (flags, &head, sizeof head); /* too long */
  head.magic = 0;
  head.length = 0;
  assert_rude (flags, &head, sizeof head);
  assert_rude (UINT32_MAX, NULL, 0);
  c = client_connect (door, flags);
  assert (client_ask (&c, NBD_OPT_STARTTLS, NULL, 0)
          == (client_secure ? NBD_REP_ERR_INVALID : NBD_REP_ERR_UNSUP));
  assert (client_ask (&c, 12345, "what", 4) == NBD_REP_ERR_UNSUP);
  assert (client_ask (&c, NBD_OPT_GO, "short", 5) == NBD_REP_ERR_INVALID);
  assert (client_ask (&c, NBD_OPT_LIST, NULL, 0) == NBD_REP_ACK);
  assert (client_ask (&c, NBD_OPT_INFO, "\0\0\0\0\0\0", 6) == NBD_REP_ACK);
  assert (client_ask (&c, NBD_OPT_ABORT, NULL, 0) == NBD_REP_ACK);
  client_assert_closed (&c);
  client_close (&c);
  take_down ();
}

/* The name of the next export of a list. */
static void
assert_listed (const struct client *c, const char *name)
{
  uint8_t entry[64];
  uint32_t size = sizeof entry, length;

  assert (client_option_reply (c, NBD_OPT_LIST, entry, &size)
          == NBD_REP_SERVER);
  memcpy (&length, entry, sizeof length);
  length = be32toh (length);
  assert (size == sizeof length + length && length == strlen (name));
  assert (memcmp (entry + sizeof length, name, length) == 0);
}

/* The client ends the handshake with EXPORT_NAME. */
static struct client
open_export (const char *name, bool read_only)
{
  struct client c
      = client_connect (door, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
  struct nbd_export export;

  client_option (&c, NBD_OPT_EXPORT_NAME, name, (uint32_t)strlen (name));
  client_receive (&c, &export, sizeof export - sizeof export.zeroes);
  assert (export.size == htobe64 (SIZE));
  assert (!(be16toh (export.flags) & NBD_FLAG_READ_ONLY) == !read_only);
  return c;
}

/* Two exports of one volume: each is reached by its name, the first also by any
 * other name. The second is read-only.
 */
static void
test_exports (void)
{
  static uint8_t block[SECTOR], found[SECTOR];
  const struct nbdm_limits usual = { 0 };
  char path[sizeof served.address.sun_path];
  struct client first, second;
  uint32_t size = 0;

  bring_up (1, 1000);
  memcpy (path, door, sizeof path);
  door_close (&served);
  door_make (&served, site.volume, path, &usual);
  assert (
      exports_add (direct_exports (served.server), "copy", site.volume, true)
      == 0);
  door_start (&served);

  first = client_connect (door, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
  client_option (&first, NBD_OPT_LIST, NULL, 0);
  assert_listed (&first, "");
  assert_listed (&first, "copy");
  assert (client_option_reply (&first, NBD_OPT_LIST, NULL, &size)
          == NBD_REP_ACK);
  client_close (&first);

  first = open_export ("cop", false);
  second = open_export ("copy", true);
  memset (block, 1, sizeof block);
  assert (client_do (&first, NBD_CMD_WRITE, 0, 0, SECTOR, block) == 0);
  assert (client_do (&second, NBD_CMD_WRITE, 0, 0, SECTOR, found) == EPERM);
  assert (client_do (&second, NBD_CMD_TRIM, 0, 0, SECTOR, NULL) == EPERM);
  assert (client_do (&second, NBD_CMD_WRITE_ZEROES, 0, 0, SECTOR, NULL)
          == EPERM);
  assert (client_do (&second, NBD_CMD_READ, 0, 0, SECTOR, found) == 0);
  assert (memcmp (block, found, sizeof found) == 0);
  assert (client_do (&second, NBD_CMD_FLUSH, 0, 0, 0, NULL) == 0);
  client_leave (&first);
  client_leave (&second);
  take_down ();
}

/* Each of these requests is refused alone, with its payload read, and the
 * session goes on.
 */
static void
test_refused_requests (void)
{
  const uint32_t huge = NBDM_MAX_REQUEST + SECTOR;
  uint8_t *buf = calloc (1, huge);

  bring_up (1, 1000);
  for (unsigned structured = 0; structured < 2; structured++) {
    struct client c = client_open (door, structured);

    assert (client_do (&c, NBD_CMD_WRITE, 0, 0, huge, buf) == EINVAL);
    assert (client_do (&c, NBD_CMD_READ, 0, 0, huge, buf) == EINVAL);
    assert (client_do (&c, NBD_CMD_READ, 0, SIZE, SECTOR, buf) == EINVAL);
    assert (client_do (&c, NBD_CMD_WRITE, 0, SIZE - SECTOR, 4096, buf)
            == ENOSPC);
    assert (client_do (&c, NBD_CMD_WRITE, 0, UINT64_MAX - 511, SECTOR, buf)
            == ENOSPC);
    assert (client_do (&c, NBD_CMD_WRITE, 0, 0, 0, buf) == EINVAL);
    assert (client_do (&c, NBD_CMD_WRITE, 0x8000, 0, SECTOR, buf) == EINVAL);
    assert (client_do (&c, 999, 0, 0, SECTOR, NULL) == EINVAL);
    assert (client_do (&c, NBD_CMD_TRIM, 0, 0, UINT32_MAX, NULL) == EINVAL);
    round_trip (&c, 30);
    client_leave (&c);
  }
  free (buf);
  take_down ();
}

/* The server answers what the client sent before it closed its side. */
static void
test_half_closed (void)
{
  enum { NR = 60 };
  static uint8_t buf[REGION];
  struct client c;

  bring_up (1, 1000);
  c = client_open (door, false);
  for (uint64_t i = 0; i < NR; i++)
    assert (
        client_request (&c, NBD_CMD_WRITE, 0, i, i * 4096, sizeof buf, buf));
  assert (shutdown (c.fd, SHUT_WR) == 0);
  for (unsigned i = 0; i < NR; i++) {
    struct answer answer;
    bool simple;

    assert (client_answer (&c, &answer, NULL, 0, &simple));
    assert (answer.error == 0);
  }
  client_assert_closed (&c);
  client_close (&c);
  take_down ();
}

int
main (void)
{
  dice = site_seed (1);
  RUN (test_export_name);
  RUN (test_go);
  RUN (test_handshake);
  RUN (test_exports);
  RUN (test_refused_requests);
  RUN (test_half_closed);
  return 0;
}
