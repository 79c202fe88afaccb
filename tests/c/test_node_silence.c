/* SPDX-License-Identifier: BSD-3-Clause */

/* A primary that is gone is noticed at the node that it writes to, and one that
 * only has nothing to say is not taken for it.
 */

#define _GNU_SOURCE

#include "api.h"
#include "base/clock.h"
#include "wire/protocol.h"
#include "schedules.h"
#include "door.h"
#include "nbd_client.h"
#include "tls_relay.h"
#include "node_door.h"

#define SILENCE_MS 1500u
#define LATE_MS (6 * SILENCE_MS) /* on a machine with much else to do */
#define AT (5u * REGION)
#define LARGE (8u << 20) /* bytes of a read; sockets take less */

static struct door served;
static void
bring_up_node (uint32_t silence_ms)
{
  const struct nbdm_limits limits = { .silence_ms = silence_ms };
  char path[96];

  bring_up (0, 1000);
  snprintf (path, sizeof path, "%s/direct", site.dir);
  door_open_limited (&served, site.volume, path, &limits);
  node_door_begin (&served, grant_all);
}

static void
assert_works (const struct client *c)
{
  uint8_t sector[SECTOR] = { 0 };

  assert (client_do (c, NBD_CMD_READ, 0, 0, sizeof sector, sector) == 0);
}

static uint64_t
since_ms (uint64_t begin)
{
  return (now_ns () - begin) / NS_PER_MS;
}

/* The session ends because of silence, neither early nor late. */
static void
assert_ends (uint64_t begin)
{
  WAIT_FOR (atomic_load (&nr_ended) == 1);
  assert (atomic_load (&nr_clean) == 0);
  assert (since_ms (begin) >= SILENCE_MS - 10);
  assert (since_ms (begin) < LATE_MS);
}

/* --- gone ------------------------------------------------------------------
 */

static void
after_an_answer (void)
{
  struct client c;
  uint64_t begin;

  bring_up_node (SILENCE_MS);
  c = node_open (&served, CLAIM);
  assert_works (&c);
  begin = now_ns ();
  assert_ends (begin);
  client_assert_closed (&c);
  client_close (&c);
  node_door_end (&served);
}

static void
before_any_request (void)
{
  uint64_t begin = now_ns ();
  struct client c;

  bring_up_node (SILENCE_MS);
  c = node_open (&served, CLAIM);
  assert_ends (begin);
  client_close (&c);
  node_door_end (&served);
}

/* In the middle of a payload, whose request is under way. */
static void
within_a_payload (void)
{
  static const uint8_t some[5000];
  struct nbd_request head
      = client_header (NBD_CMD_WRITE, 0, 1, AT, 2 * sizeof some);
  struct client c;
  uint64_t begin;

  bring_up_node (SILENCE_MS);
  c = node_open (&served, CLAIM);
  assert (client_send (&c, &head, sizeof head));
  assert (client_send (&c, some, sizeof some));
  begin = now_ns ();
  assert_ends (begin);
  client_close (&c);
  node_door_end (&served);
}

/* Answers wait for it, so many that it gets no more: it owes the next step. */
static void
without_reading (void)
{
  struct client c;
  uint64_t begin;

  bring_up_node (SILENCE_MS);
  c = node_open (&served, CLAIM);
  c.may_end = true;
  begin = now_ns ();
  for (uint64_t i = 0; i < 20; i++)
    assert (client_request (&c, NBD_CMD_READ, 0, i, 0, LARGE, NULL));
  assert_ends (begin);
  client_close (&c);
  node_door_end (&served);
}

/* --- alive -----------------------------------------------------------------
 */

static void
with_requests_now_and_then (void)
{
  uint64_t begin;
  struct client c;

  bring_up_node (SILENCE_MS);
  c = node_open (&served, CLAIM);
  for (begin = now_ns (); since_ms (begin) < 3 * SILENCE_MS;) {
    assert_works (&c);
    poll (NULL, 0, SILENCE_MS / 8);
  }
  client_leave (&c);
  WAIT_FOR (atomic_load (&nr_ended) == 1);
  assert (atomic_load (&nr_clean) == 1);
  node_door_end (&served);
}

/* It waits for our disk, and need not say anything. */
static void
while_the_disk_hangs (void)
{
  static uint8_t sector[SECTOR];
  bool simple;
  struct answer answer;
  struct client c;

  bring_up_node (SILENCE_MS);
  c = node_open (&served, CLAIM);
  assert (client_request (&c, NBD_CMD_WRITE, 0, 1, AT, SECTOR, sector));
  wait_at_gate ();
  poll (NULL, 0, 2 * SILENCE_MS);
  open_gate ();
  assert (client_answer (&c, &answer, NULL, 0, &simple) && answer.error == 0);
  client_leave (&c);
  WAIT_FOR (atomic_load (&nr_ended) == 1);
  assert (atomic_load (&nr_clean) == 1);
  node_door_end (&served);
}

/* A primary of ours that has nothing to do asks in time, by the usual limits of
 * both.
 */
static void
a_primary_without_clients (void)
{
  struct site primary = { .size = SIZE,
                          .region_size = REGION,
                          .hold_ms = 1000,
                          .nr_peers = 1,
                          .seed = 1 };

  bring_up_node (0);
  site_make (&primary);
  site_open (&primary);
  assert (
      nbdm_remote_connect (primary.volume, 1, node_uri (&served, CLAIM), 10000)
      == 0);
  assert (nbdm_disk_admit (primary.volume, 1) == 0);
  poll (NULL, 0, 12000);
  assert (atomic_load (&nr_ended) == 0);
  assert (site_status (&primary, 0).remote.connected);
  site_end (&primary);
  WAIT_FOR (atomic_load (&nr_ended) == 1);
  assert (atomic_load (&nr_clean) == 1);
  node_door_end (&served);
}

static const struct schedule schedules[] = {
  { "gone after an answer", NULL, after_an_answer },
  { "gone before any request", NULL, before_any_request },
  { "gone within a payload", NULL, within_a_payload },
  { "gone without reading", NULL, without_reading },
  { "alive with requests now and then", NULL, with_requests_now_and_then },
  { "alive while the disk hangs", "local_write:1=wait:gate",
    while_the_disk_hangs },
  { "a primary without clients", NULL, a_primary_without_clients },
};

int
main (int argc, char *argv[])
{
  return run_schedules (schedules, sizeof schedules / sizeof *schedules, argc,
                        argv);
}
