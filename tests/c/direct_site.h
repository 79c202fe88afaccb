/* SPDX-License-Identifier: BSD-3-Clause */

/* A volume behind the direct door, its remotes and its clients, all in this
 * process: so the sanitizers see every side, and a remote can be lost with a
 * command under way.
 */

#ifndef NBDM_DIRECT_SITE_H
#define NBDM_DIRECT_SITE_H

#include "api.h"
#include "wire/protocol.h"
#include "site.h"
#include "door.h"
#include "nbd_client.h"
#include "tls_relay.h"

#include <poll.h>

#define REGION 65536u
#define SECTOR 512u
#define LARGEST (1u << 20) /* bytes of a write of the load */
#define SHARED (8u << 20)  /* where all write */
#define BIG SHARED      /* bytes of a request: 8 take a budget of the least */
#define OWN (64u << 10) /* behind it each client of the load has its own */
#define CLIENTS 3
#define SIZE (SHARED + (CLIENTS + 1) * OWN + 5 * SECTOR)

static uint64_t dice;
static struct site site;
static struct door served;
static const char *const door = served.address.sun_path; /* of its clients */

/* The door has TLS, and clients reach it through a relay: run-one's "tls". */
static void
secure_all (void)
{
  door_psk = tls_relay_psk_file ();
  client_secure = tls_relay;
}

static void
open_door (void)
{
  char path[96];

  if (getenv ("NBDM_TEST_TLS"))
    secure_all ();
  snprintf (path, sizeof path, "%s/direct", site.dir);
  door_open (&served, site.volume, path);
}

static void
bring_up (uint32_t nr_peers, uint32_t hold_ms)
{
  alarm (150); /* nothing here may hang */
  site = (struct site){ .size = SIZE,
                        .region_size = REGION,
                        .hold_ms = hold_ms,
                        .nr_peers = nr_peers,
                        .seed = dice };
  site_make (&site);
  site_open (&site);
  for (uint32_t i = 0; i < nr_peers; i++) {
    site_connect (&site, i);
    site_resync_to_end (&site, i);
  }
  open_door ();
}

static TEST_UNUSED void
bring_up_with (const struct nbdm_limits *limits)
{
  char path[96];

  bring_up (1, 1000);
  door_close (&served);
  snprintf (path, sizeof path, "%s/direct", site.dir);
  door_open_limited (&served, site.volume, path, limits);
}

/* The door has these limits, and its clients share the least memory that is
 * allowed.
 */
static TEST_UNUSED void
bring_up_limited (uint32_t max_clients, uint32_t stall_ms)
{
  const struct nbdm_limits limits
      = { .max_clients = max_clients, .stall_ms = stall_ms, .max_memory = 1 };

  bring_up_with (&limits);
}

static TEST_UNUSED void
assert_works (const struct client *c)
{
  uint8_t sector[SECTOR] = { 0 };

  assert (client_do (c, NBD_CMD_READ, 0, 0, sizeof sector, sector) == 0);
}

static void
wait_no_clients (void)
{
  time_t until = time (NULL) + SITE_DEADLINE_S;
  struct nbdm_status status;

  for (;;) {
    nbdm_get_status (site.volume, &status);
    if (status.clients == 0)
      break;
    assert (time (NULL) < until);
    poll (NULL, 0, 2);
  }
  assert (status.inflight == 0);
}

/* Stop, and fail unless every remote has what local has. */
static TEST_UNUSED void
take_down (void)
{
  door_close (&served);
  wait_no_clients ();
  for (uint32_t i = 0; i < site.nr_peers; i++)
    site_resync_to_end (&site, i);
  assert (nbdm_stop (site.volume) == 0);
  for (uint32_t i = 0; i < site.nr_peers; i++)
    assert (memcmp (site.image, peer_image (site.peers[i]), SIZE) == 0);
  site_end (&site);
}

/* End the door while writes wait for a remote that does not come back: the stop
 * of the volume ends their wait.
 */
static TEST_UNUSED void
end_held (void)
{
  nbdm_server_end (served.server);
  assert (nbdm_stop (site.volume) == 0);
  door_close (&served);
}

static void
assert_filled (const uint8_t *bytes, uint8_t value, size_t size)
{
  for (size_t i = 0; i < size; i++)
    assert (bytes[i] == value);
}

/* Writes of every kind and length, and what is read then. */
static TEST_UNUSED void
round_trip (const struct client *c, uint8_t value)
{
  static uint8_t buf[LARGEST];
  static const uint32_t sizes[]
      = { SECTOR, 4096, REGION, REGION + SECTOR, LARGEST };

  for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; i++)
    for (uint16_t fua = 0; fua <= NBD_CMD_FLAG_FUA; fua++) {
      uint64_t offset = LARGEST + i * SECTOR;

      memset (buf, ++value, sizes[i]);
      assert (client_do (c, NBD_CMD_WRITE, fua, offset, sizes[i], buf) == 0);
      assert (client_do (c, NBD_CMD_CACHE, 0, offset, sizes[i], NULL) == 0);
      memset (buf, 0, sizes[i]);
      assert (client_do (c, NBD_CMD_READ, 0, offset, sizes[i], buf) == 0);
      assert_filled (buf, value, sizes[i]);
    }
  assert (client_do (c, NBD_CMD_FLUSH, 0, 0, 0, NULL) == 0);
  assert (client_do (c, NBD_CMD_TRIM, 0, LARGEST, REGION, NULL) == 0);
  assert (client_do (c, NBD_CMD_WRITE_ZEROES,
                     NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FUA, LARGEST + REGION,
                     REGION, NULL)
          == 0);
  assert (client_do (c, NBD_CMD_READ, 0, LARGEST, 2 * REGION, buf) == 0);
  assert_filled (buf, 0, 2 * REGION);
  /* Up to the last sector. */
  memset (buf, value, SECTOR);
  assert (client_do (c, NBD_CMD_WRITE, 0, SIZE - SECTOR, SECTOR, buf) == 0);
}

/* A client that asks for many reads and receives no answer. */
static TEST_UNUSED struct client
client_deaf (uint32_t length)
{
  struct client c = client_open (door, false);

  for (uint64_t i = 0; i < 20; i++)
    assert (client_request (&c, NBD_CMD_READ, 0, i, 0, length, NULL));
  return c;
}

#endif /* NBDM_DIRECT_SITE_H */
