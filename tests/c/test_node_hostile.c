/* SPDX-License-Identifier: BSD-3-Clause */

/* Hostile nodes and hostile clients at the doors for nodes: what they send is
 * refused with a text or ends their connection, and takes no memory, no time
 * and no place from others.
 */

#define _GNU_SOURCE

#include "api.h"
#include "wire/protocol.h"
#include "direct_site.h"
#include "node_door.h"

#define TIMEOUT_MS 20000u
#define MAP_BYTES (2u << 20)
#define MANY 200 /* connections with a call each */
#define PLACES 64
#define META VOLUME ".meta"
#define DIRTY VOLUME ".dirty"

static atomic_int nr_calls;
static atomic_bool keep_calls;
static uint64_t numbers[2 * MANY]; /* of the calls that were kept */
static atomic_int nr_kept;

static void
judge (struct direct_server *server, const struct nbdm_call *call)
{
  static uint8_t map[MAP_BYTES];

  if (call->kind == NBDM_CALL_SESSION_ENDED)
    return;
  atomic_fetch_add (&nr_calls, 1);
  if (atomic_load (&keep_calls)) {
    numbers[atomic_load (&nr_kept)] = call->number;
    atomic_fetch_add (&nr_kept, 1);
  }
  else if (call->kind == NBDM_CALL_META)
    (void)nbdm_server_answer (server, call->number, 0, call->words, call->size);
  else if (call->kind == NBDM_CALL_DIRTY)
    (void)nbdm_server_answer (server, call->number, 0, map, sizeof map);
  else
    (void)nbdm_server_answer (server, call->number, 0, NULL, 0);
}

static void
bring_up_node (uint32_t call_ms)
{
  const struct nbdm_limits limits = { .call_ms = call_ms };
  char path[96];

  bring_up (0, 1000);
  door_close (&served);
  snprintf (path, sizeof path, "%s/direct", site.dir);
  door_open_limited (&served, site.volume, path, &limits);
  atomic_store (&nr_calls, 0);
  atomic_store (&nr_kept, 0);
  atomic_store (&keep_calls, false);
  node_door_begin (&served, judge);
}

static void
take_down_node (void)
{
  node_door_end (&served);
  wait_no_clients ();
  assert (nbdm_stop (site.volume) == 0);
  site_end (&site);
}

static void
assert_node_works (void)
{
  char reply[8];

  assert (nbdm_call (node_uri (&served, META), "{\"v\":1}", 7, reply,
                     sizeof reply, TIMEOUT_MS)
          == 7);
  assert (memcmp (reply, "{\"v\":1}", 7) == 0);
}

static struct client
greet_node (void)
{
  struct client c = node_greet (&served);

  c.may_end = true;
  return c;
}

/* --- names ---------------------------------------------------------------- */

static void
assert_refused (const struct client *c, uint32_t option, const void *name,
                uint32_t length)
{
  char text[NBDM_TEXT_LEN];

  assert (node_ask (c, option, name, length, text) == NBD_REP_ERR_POLICY);
  assert (strlen (text) > 10);
}

static void
test_names (void)
{
  static char name[8180];
  struct client c;
  const char *wrong[] = { "",
                          VOLUME,
                          ".meta",
                          "@",
                          VOLUME ".metax",
                          VOLUME ".Meta",
                          "x" VOLUME ".meta",
                          VOLUME ".meta ",
                          VOLUME ".sums",
                          "TEST.meta",
                          "tes@1.alpha.1.00",
                          "\xff\xfe.meta",
                          VOLUME "@\xc3\xa4",
                          VOLUME "@\n",
                          VOLUME "@%s%n" };

  bring_up_node (0);
  c = node_greet (&served);
  for (unsigned i = 0; i + 1 < sizeof wrong / sizeof *wrong; i++) {
    assert_refused (&c, NBD_OPT_GO, wrong[i], (uint32_t)strlen (wrong[i]));
    assert_refused (&c, NBD_OPT_INFO, wrong[i], (uint32_t)strlen (wrong[i]));
  }
  assert_refused (&c, NBD_OPT_GO, VOLUME ".meta\0", 10);
  assert_refused (&c, NBD_OPT_GO, VOLUME "@\0", 6);
  assert_refused (&c, NBD_OPT_INFO, CLAIM, (uint32_t)strlen (CLAIM));
  assert_refused (&c, NBD_OPT_INFO, DIRTY, (uint32_t)strlen (DIRTY));
  memset (name, 'a', sizeof name);
  memcpy (name, VOLUME "@", strlen (VOLUME "@"));
  for (uint32_t length = 256; length <= 4096; length *= 2)
    assert_refused (&c, NBD_OPT_GO, name, length);
  assert_refused (&c, NBD_OPT_GO, name, 4096);
  assert (atomic_load (&nr_calls) == 0);
  assert (node_ask (&c, NBD_OPT_INFO, META, (uint32_t)strlen (META), NULL)
          == NBD_REP_ACK);
  /* What looks like a claim is Python's to judge, and this one grants all. */
  assert (node_ask (&c, NBD_OPT_GO, name, 255, NULL) == NBD_REP_ACK);
  client_leave (&c);
  take_down_node ();
}

static void
test_other_options (void)
{
  struct client c, old;
  uint8_t context[4 + 4 + 4] = { 0 };

  bring_up_node (0);
  c = node_greet (&served);
  assert (client_ask (&c, NBD_OPT_LIST, NULL, 0) == NBD_REP_ACK);
  assert (client_ask (&c, NBD_OPT_LIST, "x", 1) == NBD_REP_ERR_INVALID);
  assert (client_ask (&c, NBD_OPT_SET_META_CONTEXT, context, sizeof context)
          == NBD_REP_ERR_UNSUP);
  assert (client_ask (&c, NBD_OPT_GO, "\xff\xff\xff\xff\0\0", 6)
          == NBD_REP_ERR_INVALID);
  assert (client_ask (&c, 77, NULL, 0) == NBD_REP_ERR_UNSUP);
  client_close (&c);
  old = greet_node ();
  client_option (&old, NBD_OPT_EXPORT_NAME, CLAIM, (uint32_t)strlen (CLAIM));
  client_assert_closed (&old);
  client_close (&old);
  assert (atomic_load (&nr_calls) == 0);
  assert_node_works ();
  take_down_node ();
}

/* A claim that comes byte by byte is a claim; one that stops is none. */
static void
test_in_pieces (void)
{
  uint8_t bytes[16 + 4 + sizeof CLAIM + 1] = { 0 };
  const uint32_t length = (uint32_t)strlen (CLAIM);
  const struct nbd_option_header head = { .magic = htobe64 (NBD_OPTION),
                                          .option = htobe32 (NBD_OPT_GO),
                                          .length = htobe32 (length + 6) };
  const uint32_t size = htobe32 (length);
  struct client c;

  bring_up_node (0);
  memcpy (bytes, &head, sizeof head);
  memcpy (bytes + sizeof head, &size, sizeof size);
  memcpy (bytes + sizeof head + 4, CLAIM, length);
  for (size_t stop = 0; stop < sizeof bytes; stop += 7) {
    c = greet_node ();
    assert (client_send (&c, bytes, stop));
    client_close (&c);
  }
  c = greet_node ();
  for (size_t i = 0; i < sizeof bytes; i++)
    assert (client_send (&c, bytes + i, 1));
  while (true) {
    uint8_t reply[4096];
    uint32_t room = sizeof reply;

    if (client_option_reply (&c, NBD_OPT_GO, reply, &room) == NBD_REP_ACK)
      break;
  }
  assert_works (&c);
  assert (atomic_load (&nr_calls) == 1);
  client_leave (&c);
  assert_node_works ();
  take_down_node ();
}

/* --- NAME.meta ------------------------------------------------------------ */

static void
test_wrong_requests (void)
{
  static uint8_t buf[NBDM_CALL_LEN + 1];
  struct client c;

  bring_up_node (0);
  for (int structured = 0; structured < 2; structured++) {
    c = node_greet (&served);
    if (structured)
      client_structure (&c);
    assert (node_ask (&c, NBD_OPT_GO, META, (uint32_t)strlen (META), NULL)
            == NBD_REP_ACK);
    /* No call to answer. */
    assert (client_do (&c, NBD_CMD_READ, 0, 0, NBDM_CALL_LEN, buf) == EINVAL);
    assert (client_do (&c, NBD_CMD_WRITE, 0, 1, 10, buf) == EINVAL);
    assert (client_do (&c, NBD_CMD_WRITE, 0, 0, 0, buf) == EINVAL);
    assert (client_do (&c, NBD_CMD_FLUSH, 0, 0, 0, NULL) == EINVAL);
    assert (client_do (&c, NBD_CMD_TRIM, 0, 0, 512, NULL) == EINVAL);
    assert (client_do (&c, 99, 0, 0, 512, NULL) == EINVAL);
    assert (client_do (&c, NBD_CMD_WRITE, 0, 0, 2, "{}") == 0);
    assert (client_do (&c, NBD_CMD_READ, 0, 0, 512, buf) == EINVAL);
    assert (client_do (&c, NBD_CMD_READ, 0, 512, NBDM_CALL_LEN, buf) == EINVAL);
    assert (client_do (&c, NBD_CMD_READ, 0, 0, NBDM_CALL_LEN, buf) == 0);
    assert (memcmp (buf, "{}\0\0", 4) == 0);
    /* Answered once. */
    assert (client_do (&c, NBD_CMD_READ, 0, 0, NBDM_CALL_LEN, buf) == EINVAL);
    c.may_end = true;
    (void)client_request (&c, NBD_CMD_WRITE, 0, 1, 0, NBDM_CALL_LEN + 1, buf);
    client_assert_closed (&c);
    client_close (&c);
  }
  assert (atomic_load (&nr_calls) == 2);
  assert_node_works ();
  take_down_node ();
}

static void
test_stop_in_the_middle (void)
{
  struct nbd_request head = client_header (NBD_CMD_WRITE, 0, 1, 0, 1000);
  static uint8_t bytes[1000];
  struct client c;

  bring_up_node (0);
  for (size_t stop = 1; stop < sizeof head + 1000; stop += 97) {
    size_t more = stop > sizeof head ? stop - sizeof head : 0;

    c = node_open (&served, META);
    assert (client_send (&c, &head, stop - more));
    assert (more == 0 || client_send (&c, bytes, more));
    client_close (&c);
  }
  c = node_open (&served, META);
  c.may_end = true;
  head.magic = 0;
  assert (client_send (&c, &head, sizeof head));
  client_assert_closed (&c);
  client_close (&c);
  assert (atomic_load (&nr_calls) == 0);
  assert_node_works ();
  take_down_node ();
}

/* A node that leaves takes its call along: the late answer finds no one. */
static void
test_left_before_the_answer (void)
{
  struct client c;

  bring_up_node (0);
  atomic_store (&keep_calls, true);
  c = node_open (&served, META);
  assert (client_do (&c, NBD_CMD_WRITE, 0, 0, 2, "{}") == 0);
  assert (client_request (&c, NBD_CMD_READ, 0, 1, 0, NBDM_CALL_LEN, NULL));
  WAIT_FOR (atomic_load (&nr_kept) == 1);
  client_close (&c);
  WAIT_FOR (nbdm_server_answer (served.server, numbers[0], -EPERM, "no", 2)
            == -ENOENT);
  atomic_store (&keep_calls, false);
  assert_node_works ();
  take_down_node ();
}

/* No one judges: the other node is refused in time. */
static void
test_never_answered (void)
{
  char text[NBDM_TEXT_LEN];
  uint8_t bits[8];
  struct client c;

  bring_up_node (1000);
  atomic_store (&keep_calls, true);
  assert (nbdm_call (node_uri (&served, META), "{}", 2, bits, sizeof bits,
                     TIMEOUT_MS)
          == -ECONNREFUSED);
  ASSERT_SAYS ("did not answer");
  assert (nbdm_fetch (node_uri (&served, DIRTY), bits, sizeof bits, TIMEOUT_MS)
          == -ECONNREFUSED);
  ASSERT_SAYS ("did not decide in time");
  c = node_greet (&served);
  assert (node_ask (&c, NBD_OPT_GO, CLAIM, (uint32_t)strlen (CLAIM), text)
          == NBD_REP_ERR_POLICY);
  assert (strstr (text, "did not decide in time"));
  assert (nbdm_server_answer (served.server, numbers[2], 0, NULL, 0)
          == -ENOENT);
  /* And the caller has a time of its own. */
  assert (nbdm_call (node_uri (&served, META), "{}", 2, bits, sizeof bits, 50)
          == -ETIMEDOUT);
  client_close (&c);
  take_down_node ();
}

static void
test_wrong_answers (void)
{
  static uint8_t buf[NBDM_CALL_LEN + 1];
  struct client c;

  bring_up_node (0);
  atomic_store (&keep_calls, true);
  c = node_greet (&served);
  client_structure (&c);
  assert (node_ask (&c, NBD_OPT_GO, META, (uint32_t)strlen (META), NULL)
          == NBD_REP_ACK);
  assert (client_do (&c, NBD_CMD_WRITE, 0, 0, 2, "{}") == 0);
  assert (client_request (&c, NBD_CMD_READ, 0, 1, 0, NBDM_CALL_LEN, NULL));
  WAIT_FOR (atomic_load (&nr_kept) == 1);
  assert (nbdm_server_answer (served.server, numbers[0], 1, NULL, 0)
          == -EINVAL);
  assert (nbdm_server_answer (served.server, numbers[0], 0, buf, sizeof buf)
          == -EINVAL);
  assert (
      nbdm_server_answer (served.server, numbers[0], -EPERM, buf, NBDM_TEXT_LEN)
      == -EINVAL);
  assert (nbdm_server_answer (served.server, numbers[0] + 1, 0, buf, 1)
          == -ENOENT);
  assert (nbdm_server_answer (served.server, numbers[0], 0, buf, NBDM_CALL_LEN)
          == 0);
  assert (nbdm_server_answer (served.server, numbers[0], 0, buf, 1) == -ENOENT);
  client_close (&c);
  take_down_node ();
}

/* --- many ----------------------------------------------------------------- */

static void
test_ten_thousand_calls (void)
{
  static uint8_t reply[NBDM_CALL_LEN];
  struct client c;

  bring_up_node (0);
  c = node_open (&served, META);
  for (uint32_t i = 0; i < 10000; i++) {
    assert (client_do (&c, NBD_CMD_WRITE, 0, 0, sizeof i, &i) == 0);
    assert (client_do (&c, NBD_CMD_READ, 0, 0, NBDM_CALL_LEN, reply) == 0);
    assert (memcmp (reply, &i, sizeof i) == 0);
  }
  client_leave (&c);
  assert (atomic_load (&nr_calls) == 10000);
  take_down_node ();
}

/* Calls that are never answered give way to new ones, and each of them goes:
 * no more than the places are ever waiting.
 */
static void
test_many_connections (void)
{
  static struct client many[MANY];
  int waiting = 0;

  bring_up_node (0);
  atomic_store (&keep_calls, true);
  for (int i = 0; i < MANY; i++) {
    many[i] = node_open (&served, META);
    many[i].may_end = true;
    (void)client_request (&many[i], NBD_CMD_WRITE, 0, 1, 0, 2, "{}");
    (void)client_request (&many[i], NBD_CMD_READ, 0, 2, 0, NBDM_CALL_LEN, NULL);
  }
  WAIT_FOR (atomic_load (&nr_kept) >= PLACES);
  atomic_store (&keep_calls, false);
  assert_node_works ();
  for (int i = 0; i < atomic_load (&nr_kept); i++)
    waiting += nbdm_server_answer (served.server, numbers[i], 0, "x", 1) == 0;
  assert (waiting <= PLACES);
  for (int i = 0; i < MANY; i++)
    client_close (&many[i]);
  take_down_node ();
}

/* The end of the server ends every call. */
static void
test_end_with_calls (void)
{
  struct client many[8];

  bring_up_node (0);
  atomic_store (&keep_calls, true);
  for (int i = 0; i < 8; i++) {
    many[i] = node_open (&served, META);
    assert (client_do (&many[i], NBD_CMD_WRITE, 0, 0, 2, "{}") == 0);
    assert (
        client_request (&many[i], NBD_CMD_READ, 0, 2, 0, NBDM_CALL_LEN, NULL));
  }
  WAIT_FOR (atomic_load (&nr_kept) == 8);
  take_down_node ();
  for (int i = 0; i < 8; i++) {
    client_assert_closed (&many[i]);
    client_close (&many[i]);
  }
}

/* --- NAME.dirty ----------------------------------------------------------- */

static void
test_maps (void)
{
  static uint8_t buf[MAP_BYTES], bits[MAP_BYTES];
  struct client first, second, third;

  bring_up_node (0);
  first = node_open (&served, DIRTY);
  assert (client_do (&first, NBD_CMD_READ, 0, MAP_BYTES - 1, 2, buf) == EINVAL);
  assert (client_do (&first, NBD_CMD_READ, 0, UINT64_MAX, 2, buf) == EINVAL);
  assert (client_do (&first, NBD_CMD_READ, 0, 0, MAP_BYTES, buf) == EINVAL);
  assert (client_do (&first, NBD_CMD_READ, 0, 0, 0, buf) == EINVAL);
  assert (client_do (&first, NBD_CMD_TRIM, 0, 0, 512, NULL) == EINVAL);
  second = node_open (&served, DIRTY);
  third = node_greet (&served);
  assert_refused (&third, NBD_OPT_GO, DIRTY, (uint32_t)strlen (DIRTY));
  first.may_end = true;
  (void)client_request (&first, NBD_CMD_WRITE, 0, 1, 0, 512, buf);
  client_assert_closed (&first);
  client_close (&first);
  WAIT_FOR (
      nbdm_fetch (node_uri (&served, DIRTY), bits, sizeof bits, TIMEOUT_MS)
      == 0);
  client_close (&second);
  client_close (&third);
  take_down_node ();
}

/* --- claims --------------------------------------------------------------- */

static void
test_lost_connection (void)
{
  char text[NBDM_TEXT_LEN];
  struct client c, second, late;

  bring_up_node (0);
  c = node_open (&served, CLAIM);
  second = node_open (&served, CLAIM);
  late = node_greet (&served);
  assert_works (&c);
  assert_works (&second);
  client_close (&c); /* without a goodbye: the session is over */
  client_assert_closed (&second);
  WAIT_FOR (atomic_load (&nr_ended) == 1);
  assert (atomic_load (&nr_clean) == 0);
  /* Once it is reported, the name is Python's to judge again. */
  assert (node_ask (&late, NBD_OPT_GO, CLAIM, (uint32_t)strlen (CLAIM), text)
          == NBD_REP_ACK);
  client_leave (&late);
  client_close (&second);
  WAIT_FOR (atomic_load (&nr_ended) == 2);
  assert (atomic_load (&nr_clean) == 1);
  take_down_node ();
}

/* One of two has said goodbye: the other goes on, and no third one joins. */
static void
test_one_of_two_parts (void)
{
  char text[NBDM_TEXT_LEN];
  struct client c, second, late;

  bring_up_node (0);
  c = node_open (&served, CLAIM);
  second = node_open (&served, CLAIM);
  client_leave (&c);
  late = node_greet (&served);
  assert (node_ask (&late, NBD_OPT_GO, CLAIM, (uint32_t)strlen (CLAIM), text)
          == NBD_REP_ERR_POLICY);
  assert (strstr (text, "claim a higher session"));
  assert_works (&second);
  client_leave (&second);
  WAIT_FOR (atomic_load (&nr_ended) == 1);
  assert (atomic_load (&nr_clean) == 1);
  client_close (&late);
  take_down_node ();
}

/* The volume is closed, and says why. */
static void
test_closed (void)
{
  const char *why = "alpha is primary: connect there, or nbd-mirror promote";
  uint8_t context[4 + 4 + 4] = { 0 };
  char text[NBDM_TEXT_LEN];
  struct client c, old;

  bring_up (0, 1000);
  assert (nbdm_server_listener (served.server, 0, NBDM_CLOSED, why) == 0);
  assert (nbdm_server_listener (served.server, 1, NBDM_CLOSED, why) == -EINVAL);
  assert (nbdm_server_listener (served.server, 0, 3, why) == -EINVAL);
  c = node_greet (&served);
  assert (node_ask (&c, NBD_OPT_GO, "", 0, text) == NBD_REP_ERR_POLICY);
  assert (strcmp (text, why) == 0);
  assert (node_ask (&c, NBD_OPT_INFO, "any", 3, text) == NBD_REP_ERR_POLICY);
  assert (strcmp (text, why) == 0);
  assert (client_ask (&c, NBD_OPT_LIST, NULL, 0) == NBD_REP_ERR_POLICY);
  client_structure (&c);
  assert (client_ask (&c, NBD_OPT_SET_META_CONTEXT, context, sizeof context)
          == NBD_REP_ERR_POLICY);
  old = greet_node ();
  client_option (&old, NBD_OPT_EXPORT_NAME, NULL, 0);
  client_assert_closed (&old);
  client_close (&old);
  assert (nbdm_server_listener (served.server, 0, NBDM_CLIENTS, NULL) == 0);
  assert (node_ask (&c, NBD_OPT_GO, "", 0, text) == NBD_REP_ACK);
  assert_works (&c);
  client_leave (&c);
  take_down ();
}

int
main (void)
{
  dice = site_seed (1);
  RUN (test_names);
  RUN (test_other_options);
  RUN (test_in_pieces);
  RUN (test_wrong_requests);
  RUN (test_stop_in_the_middle);
  RUN (test_left_before_the_answer);
  RUN (test_never_answered);
  RUN (test_wrong_answers);
  RUN (test_ten_thousand_calls);
  RUN (test_many_connections);
  RUN (test_end_with_calls);
  RUN (test_maps);
  RUN (test_lost_connection);
  RUN (test_one_of_two_parts);
  RUN (test_closed);
  return 0;
}
