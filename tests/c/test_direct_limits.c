/* SPDX-License-Identifier: BSD-3-Clause */

/* The direct door's limits: how many clients there may be, how many of them in
 * the handshake, and how long an option is.
 */

#define _GNU_SOURCE

#include "api.h"
#include "base/clock.h"
#include "wire/protocol.h"
#include "direct_site.h"

#define STALL_MS 400
#define MEMORY (12 * BIG)
#define IDLE 300     /* clients, which take a third of it */
#define WAITS_MS 400 /* a client without memory */
#define HANDSHAKE_MS UINT64_C (600)
#define SHAKING 64 /* as many as are let in at once */

/* --- how many there may be --------------------------------------------------
 */

/* The type of the reply to GO. */
static uint32_t
ask_to_go (const struct client *c)
{
  return client_ask (c, NBD_OPT_GO, "\0\0\0\0\0\0", 6);
}

static struct client
greeted (void)
{
  return client_connect (door, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
}

/* The client beyond the limit gets an error and may ask again; a client that
 * knows only EXPORT_NAME is disconnected. The other clients are not disturbed.
 */
static void
test_too_many_clients (void)
{
  struct client clients[3], c, old;

  bring_up_limited (3, STALL_MS);
  for (int i = 0; i < 3; i++) {
    clients[i] = client_open (door, false);
    assert_works (&clients[i]);
  }
  c = greeted ();
  assert (client_ask (&c, NBD_OPT_INFO, "\0\0\0\0\0\0", 6) == NBD_REP_ACK);
  assert (ask_to_go (&c) == NBD_REP_ERR_POLICY);
  assert (ask_to_go (&c) == NBD_REP_ERR_POLICY);
  old = greeted ();
  client_option (&old, NBD_OPT_EXPORT_NAME, NULL, 0);
  client_assert_closed (&old);
  client_close (&old);
  client_leave (&clients[1]);
  while (ask_to_go (&c) != NBD_REP_ACK)
    poll (NULL, 0, 1); /* its thread is still to end */
  assert_works (&c);
  assert_works (&clients[0]);
  assert_works (&clients[2]);
  client_leave (&c);
  client_leave (&clients[0]);
  client_leave (&clients[2]);
  take_down ();
}

/* Connections that say nothing give way to new ones, the oldest first; clients
 * that say nothing do not.
 */
static void
test_silent_handshakes (void)
{
  static struct client silent[SHAKING + 40];
  struct client idle, c;

  bring_up_limited (8, STALL_MS);
  idle = client_open (door, false);
  assert_works (&idle);
  for (int i = 0; i < SHAKING; i++)
    silent[i] = greeted ();
  for (int i = SHAKING; i < SHAKING + 40; i++) {
    silent[i] = greeted ();
    c = client_open (door, true);
    assert_works (&c);
    client_leave (&c);
  }
  client_assert_closed (&silent[0]);
  client_assert_closed (&silent[39]);
  assert_works (&idle);
  assert (ask_to_go (&silent[SHAKING + 39]) == NBD_REP_ACK);
  assert_works (&silent[SHAKING + 39]);
  for (int i = 0; i < SHAKING + 40; i++)
    client_close (&silent[i]);
  client_leave (&idle);
  take_down ();
}

/* --- handshakes that do not end --------------------------------------------
 */

/* One byte of an option every so often; false: the door has closed. */
static bool
send_a_byte (struct client *c, unsigned n)
{
  struct nbd_option_header head
      = { htobe64 (NBD_OPTION), htobe32 (NBD_OPT_LIST), htobe32 (8000) };
  const uint8_t *bytes = (const uint8_t *)&head;

  return client_send (c, n < sizeof head ? &bytes[n] : &bytes[8], 1);
}

/* A whole option, again and again. */
static bool
send_an_option (struct client *c, unsigned n)
{
  struct nbd_option_header head = { htobe64 (NBD_OPTION), htobe32 (99), 0 };
  struct nbd_option_reply reply;

  (void)n;
  return client_send (c, &head, sizeof head)
         && client_receive (c, &reply, sizeof reply);
}

/* The handshake ends after its time, however much comes within it; clients
 * have all the time they want.
 */
static void
test_endless_handshakes (void)
{
  static bool (*const steps[]) (struct client *, unsigned)
      = { send_a_byte, send_an_option };
  const struct nbdm_limits limits = { .handshake_ms = HANDSHAKE_MS };
  struct client idle;

  bring_up_with (&limits);
  idle = client_open (door, false);
  for (unsigned i = 0; i < sizeof steps / sizeof *steps; i++) {
    struct client c = greeted ();
    uint64_t begun = now_ns ();

    c.may_end = true;
    for (unsigned n = 0; steps[i](&c, n); n++) {
      assert (now_ns () - begun < 10 * HANDSHAKE_MS * NS_PER_MS);
      poll (NULL, 0, 20);
    }
    assert (now_ns () - begun >= (HANDSHAKE_MS - 100) * NS_PER_MS);
    client_close (&c);
  }
  assert_works (&idle);
  client_leave (&idle);
  take_down ();
}

/* --- the memory of clients ---------------------------------------------------
 */

/* A write without its last byte: true if the door had memory for all of it. */
static bool
gets_memory (const struct client *c)
{
  static const uint8_t data[BIG];
  struct nbd_request header = client_header (NBD_CMD_WRITE, 0, 1, 0, BIG);
  struct pollfd fd = { .fd = c->fd, .events = POLLOUT };
  size_t sent = 0;

  client_send (c, &header, sizeof header);
  while (sent < BIG - 1 && poll (&fd, 1, WAITS_MS) == 1) {
    ssize_t n = send (c->fd, data + sent, BIG - 1 - sent,
                      MSG_DONTWAIT | MSG_NOSIGNAL);

    assert (n > 0 || (n < 0 && errno == EAGAIN));
    sent += n > 0 ? (size_t)n : 0;
  }
  return sent == BIG - 1;
}

static unsigned
count_that_get_memory (void)
{
  struct client hogs[MEMORY / BIG + 1];
  unsigned nr = 0;

  for (unsigned i = 0; i < MEMORY / BIG + 1; i++) {
    hogs[i] = client_open (door, false);
    nr += gets_memory (&hogs[i]);
  }
  for (unsigned i = 0; i < MEMORY / BIG + 1; i++)
    client_close (&hogs[i]);
  return nr;
}

/* What a client takes by being there is part of the memory of all; but so much
 * is always left that the largest request fits.
 */
static void
test_clients_count_as_memory (void)
{
  static struct client idle[IDLE];
  const struct nbdm_limits limits = { .max_clients = 2 * IDLE,
                                      .max_memory = MEMORY,
                                      .stall_ms = CLIENT_DEADLINE_S * 1000 };

  bring_up_with (&limits);
  assert (count_that_get_memory () == MEMORY / BIG - 1);
  wait_no_clients ();
  for (unsigned i = 0; i < IDLE; i++)
    idle[i] = client_open (door, false);
  assert (count_that_get_memory () == NBDM_MAX_REQUEST / BIG);
  for (unsigned i = 0; i < IDLE; i++)
    client_leave (&idle[i]);
  wait_no_clients ();
  assert (count_that_get_memory () == MEMORY / BIG - 1);
  take_down ();
}

/* --- options that are long --------------------------------------------------
 */

static void
test_long_options (void)
{
  static uint8_t buf[1u << 20];
  static const uint32_t lengths[] = { 8193, 32u << 10, 1u << 20 };
  struct client c, old;

  bring_up_limited (2, STALL_MS);
  c = greeted ();
  for (unsigned i = 0; i < 3; i++)
    for (uint32_t option = NBD_OPT_LIST; option < 12; option++)
      assert (client_ask (&c, option, buf, lengths[i]) == NBD_REP_ERR_TOO_BIG);
  assert (ask_to_go (&c) == NBD_REP_ACK);
  assert_works (&c);
  client_leave (&c);
  old = greeted ();
  old.may_end = true;
  client_option (&old, NBD_OPT_EXPORT_NAME, buf, 32u << 10);
  client_assert_closed (&old);
  client_close (&old);
  take_down ();
}

int
main (void)
{
  dice = site_seed (1);
  RUN (test_too_many_clients);
  RUN (test_silent_handshakes);
  RUN (test_endless_handshakes);
  RUN (test_clients_count_as_memory);
  RUN (test_long_options);
  return 0;
}
