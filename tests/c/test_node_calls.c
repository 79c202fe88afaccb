/* SPDX-License-Identifier: BSD-3-Clause */

/* The calls of other nodes: what reaches the control thread, what comes back,
 * and what hostile nodes get.
 */

#define _GNU_SOURCE

#include "api.h"
#include "wire/protocol.h"
#include "direct_site.h"
#include "node_door.h"

#define TIMEOUT_MS 20000u
#define OTHER_CLAIM VOLUME "@1.beta.1.00000000000000000000000000000001"

/* META: its bytes in reverse.  Claims: those of alpha.  DIRTY: 3 MiB of bits.
 */
static void
judge (struct direct_server *server, const struct nbdm_call *call)
{
  static uint8_t bytes[3u << 20];
  const char *no = "beta was promoted in epoch 2";

  switch (call->kind) {
  case NBDM_CALL_META:
    for (uint32_t i = 0; i < call->size; i++)
      bytes[i] = call->words[call->size - 1 - i];
    (void)nbdm_server_answer (server, call->number, 0, bytes, call->size);
    break;
  case NBDM_CALL_CLAIM:
    if (memmem (call->words, call->size, ".alpha.", 7))
      (void)nbdm_server_answer (server, call->number, 0, NULL, 0);
    else
      (void)nbdm_server_answer (server, call->number, -EPERM, no, strlen (no));
    break;
  case NBDM_CALL_DIRTY:
    memset (bytes, 0x5a, sizeof bytes);
    bytes[sizeof bytes - 1] = 7;
    (void)nbdm_server_answer (server, call->number, 0, bytes, sizeof bytes);
    break;
  default:
    assert (call->kind == NBDM_CALL_SESSION_ENDED);
    assert (call->size == strlen (CLAIM));
    assert (memcmp (call->words, CLAIM, call->size) == 0);
  }
}

static void
bring_up_node (void)
{
  bring_up (0, 1000);
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
test_a_call (void)
{
  static const uint32_t sizes[] = { 1, 2, 1000, NBDM_CALL_LEN };
  static uint8_t request[NBDM_CALL_LEN], reply[NBDM_CALL_LEN];

  bring_up_node ();
  for (uint32_t i = 0; i < NBDM_CALL_LEN; i++)
    request[i] = (uint8_t)(1 + i % 251);
  for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; i++) {
    assert (nbdm_call (node_uri (&served, VOLUME ".meta"), request, sizes[i],
                       reply, sizeof reply, TIMEOUT_MS)
            == (int)sizes[i]);
    for (uint32_t at = 0; at < sizes[i]; at++)
      assert (reply[at] == request[sizes[i] - 1 - at]);
  }
  assert (nbdm_call (node_uri (&served, VOLUME ".meta"), request, 100, reply,
                     99, TIMEOUT_MS)
          == -EMSGSIZE);
  take_down_node ();
}

static void
test_a_claim (void)
{
  struct client c;
  uint8_t sector[SECTOR];

  bring_up_node ();
  c = node_open (&served, CLAIM);
  memset (sector, 9, sizeof sector);
  assert (client_do (&c, NBD_CMD_WRITE, 0, 0, SECTOR, sector) == 0);
  assert (client_do (&c, NBD_CMD_FLUSH, 0, 0, 0, NULL) == 0);
  assert (site.image[0] == 9);
  client_leave (&c);
  WAIT_FOR (atomic_load (&nr_ended) == 1);
  assert (atomic_load (&nr_clean) == 1);
  take_down_node ();
}

static void
test_a_map (void)
{
  static uint8_t bits[3u << 20];

  bring_up_node ();
  assert (nbdm_fetch (node_uri (&served, VOLUME ".dirty"), bits, sizeof bits,
                      TIMEOUT_MS)
          == 0);
  assert_filled (bits, 0x5a, sizeof bits - 1);
  assert (bits[sizeof bits - 1] == 7);
  assert (nbdm_fetch (node_uri (&served, VOLUME ".dirty"), bits, 1, TIMEOUT_MS)
          == -ERANGE);
  take_down_node ();
}

/* A volume of ours claims the disk: the refusal's text is the error's, with and
 * without TLS.
 */
static void
test_our_claim (void)
{
  struct site primary = { .size = SIZE,
                          .region_size = REGION,
                          .hold_ms = 1000,
                          .nr_peers = 1,
                          .seed = 1 };

  bring_up_node ();
  site_make (&primary);
  site_open (&primary);
  assert (nbdm_remote_connect (primary.volume, 1,
                               node_uri (&served, OTHER_CLAIM), TIMEOUT_MS)
          == -ECONNREFUSED);
  ASSERT_SAYS ("beta was promoted in epoch 2");
  assert (nbdm_remote_connect (primary.volume, 1, node_uri (&served, CLAIM),
                               TIMEOUT_MS)
          == 0);
  assert (nbdm_disk_admit (primary.volume, 1) == 0);
  site_resync_to_end (&primary, 0);
  site_end (&primary);
  WAIT_FOR (atomic_load (&nr_ended) == 1);
  assert (atomic_load (&nr_clean) == 1);
  take_down_node ();
}

int
main (void)
{
  dice = site_seed (1);
  RUN (test_a_call);
  RUN (test_a_claim);
  RUN (test_a_map);
  RUN (test_our_claim);
  return 0;
}
