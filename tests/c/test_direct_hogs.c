/* SPDX-License-Identifier: BSD-3-Clause */

/* Clients of the direct door that keep the memory which others wait for: which
 * ones are disconnected, and when.
 */

#define _GNU_SOURCE

#include "api.h"
#include "wire/protocol.h"
#include "direct_site.h"

#include <poll.h>

#define STALL_MS 400
#define SLOW_STALL_MS 1000

static uint8_t *buf; /* BIG bytes */

/* A client that begins a write and never sends the rest. */
static struct client
halting (void)
{
  struct client c = client_open (door, false);
  struct nbd_request header = client_header (NBD_CMD_WRITE, 0, 1, 0, BIG);

  client_send (&c, &header, sizeof header);
  client_send (&c, buf, 100);
  return c;
}

static void
assert_dropped (const struct client *c)
{
  ssize_t n;

  do
    n = recv (c->fd, buf, BIG, 0);
  while (n > 0);
  assert (n == 0 || errno == ECONNRESET);
}

/* Clients that hold all the memory and receive nothing are disconnected when
 * another client waits for it, and only then; small requests never wait.
 */
static void
test_memory_that_is_kept (void)
{
  enum { DEAF = 3, HALTING = 9 };
  struct client deafs[DEAF], halts[HALTING], c;

  bring_up_limited (100, STALL_MS);
  c = client_open (door, false);
  for (int i = 0; i < DEAF; i++)
    deafs[i] = client_deaf (BIG);
  for (int i = 0; i < HALTING; i++)
    halts[i] = halting ();
  for (int i = 0; i < 50; i++)
    assert_works (&c);
  for (int i = 0; i < 4; i++) {
    assert (client_do (&c, NBD_CMD_WRITE, 0, 0, BIG, buf) == 0);
    assert (client_do (&c, NBD_CMD_READ, 0, 0, BIG, buf) == 0);
  }
  for (int i = 0; i < DEAF; i++) {
    assert_dropped (&deafs[i]);
    client_close (&deafs[i]);
  }
  for (int i = 0; i < HALTING; i++)
    client_close (&halts[i]);
  client_leave (&c);
  take_down ();
}

/* A client that reads slowly is not disconnected, though others wait for its
 * memory.
 */
static void
test_slow_is_not_deaf (void)
{
  struct timespec from, to;
  struct client slow, deaf_one;
  struct answer answer;
  bool simple;

  bring_up_limited (100, SLOW_STALL_MS);
  slow = client_open (door, false);
  for (uint64_t i = 0; i < 7; i++)
    assert (client_request (&slow, NBD_CMD_READ, 0, i, 0, BIG, NULL));
  deaf_one = client_deaf (BIG);
  clock_gettime (CLOCK_MONOTONIC, &from);
  for (unsigned i = 0; i < 7; i++) {
    assert (client_answer (&slow, &answer, NULL, 0, &simple));
    assert (answer.error == 0);
    for (uint32_t at = 0; at < BIG; at += LARGEST) {
      assert (client_receive (&slow, buf, LARGEST));
      poll (NULL, 0, SLOW_STALL_MS / 25);
    }
  }
  clock_gettime (CLOCK_MONOTONIC, &to);
  assert (to.tv_sec - from.tv_sec >= 2 * SLOW_STALL_MS / 1000);
  client_leave (&slow);
  client_close (&deaf_one);
  take_down ();
}

/* --- memory that is given back too slowly -------------------------------- */

#define HOGS ((64u << 20) / BIG) /* take the whole budget */
#define TRICKLE (200u << 10)     /* bytes, */
#define TRICKLE_MS 100 /* that often: twice what `stall_ns` asks for */

/* Each hog sends a little of its payload at a time, until the other client has
 * an answer, and before any of them has sent all.
 */
static void
trickle_until_answered (const struct client *hogs, uint64_t payload,
                        const struct client *other)
{
  struct pollfd fd = { .fd = other->fd, .events = POLLIN };
  time_t until = time (NULL) + SITE_DEADLINE_S;

  for (uint64_t sent = 0; fd.revents == 0; sent += TRICKLE) {
    assert (time (NULL) < until && sent + TRICKLE < payload);
    for (unsigned i = 0; i < HOGS; i++)
      (void)client_send (&hogs[i], buf, TRICKLE);
    (void)poll (&fd, 1, TRICKLE_MS);
  }
}

/* Hogs keep all the memory and move more than what shows that they are there,
 * but too little to give it back soon: another client gets the memory.
 */
static void
assert_hogs_give_way (struct client (*hog) (void), uint64_t payload)
{
  struct client hogs[HOGS], c;
  struct answer answer;
  bool simple;

  bring_up_limited (100, STALL_MS);
  for (unsigned i = 0; i < HOGS; i++) {
    hogs[i] = hog ();
    hogs[i].may_end = true;
  }
  c = client_open (door, false);
  assert (client_request (&c, NBD_CMD_READ, 0, 1, 0, BIG, NULL));
  trickle_until_answered (hogs, payload, &c);
  assert (client_answer (&c, &answer, NULL, 0, &simple) && !answer.error);
  assert (client_receive (&c, buf, BIG));
  client_leave (&c);
  for (unsigned i = 0; i < HOGS; i++)
    client_close (&hogs[i]);
  take_down ();
}

/* An answer that is not read, before a write that is refused: its payload is
 * dropped as it comes, and gives no memory back.
 */
static struct client
busy_deaf (void)
{
  struct client c = client_open (door, false);
  struct nbd_request header
      = client_header (NBD_CMD_WRITE, 0, 2, 0, UINT32_MAX);

  assert (client_request (&c, NBD_CMD_READ, 0, 1, 0, BIG, NULL));
  client_send (&c, &header, sizeof header);
  return c;
}

static void
test_slow_writers_give_way (void)
{
  assert_hogs_give_way (halting, BIG - 100);
}

static void
test_busy_deafs_give_way (void)
{
  assert_hogs_give_way (busy_deaf, UINT32_MAX);
}

/* --- the end ------------------------------------------------------------- */

/* The server ends while some clients keep all the memory and others wait for
 * it.
 */
static void
test_end_while_waiting (void)
{
  struct client deafs[4];

  bring_up_limited (100, CLIENT_DEADLINE_S * 1000);
  for (int i = 0; i < 4; i++)
    deafs[i] = client_deaf (BIG);
  door_close (&served);
  for (int i = 0; i < 4; i++) {
    assert_dropped (&deafs[i]);
    client_close (&deafs[i]);
  }
  open_door ();
  take_down ();
}

int
main (void)
{
  dice = site_seed (1);
  buf = calloc (1, BIG);
  assert (buf);
  RUN (test_memory_that_is_kept);
  RUN (test_slow_is_not_deaf);
  RUN (test_slow_writers_give_way);
  RUN (test_busy_deafs_give_way);
  RUN (test_end_while_waiting);
  free (buf);
  return 0;
}
