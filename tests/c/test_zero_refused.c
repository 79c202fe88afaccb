/* SPDX-License-Identifier: BSD-3-Clause */

/* A server that offers to zero and then refuses: its remote is sent data in the
 * place of zeroes, and no later connection asks it again.
 */

#include "api.h"
#include "site.h"

#include <errno.h>
#include <stdatomic.h>

#define REGION 65536u
#define SIZE (64u * REGION)

static struct site site;
static atomic_uint connects;

static void
make_site (uint32_t error)
{
  site = (struct site){ .size = SIZE,
                        .region_size = REGION,
                        .nr_peers = 1,
                        .peer.refuse_zeroes = error,
                        .seed = site_seed (1) };
  connects = 0;
  site_make (&site);
  site_open (&site);
}

/* Act as a keeper does: connect, copy, and connect again after each error. */
static void
bring_in_sync (void)
{
  struct nbdm_resync batch = { .max_bytes = SIZE, .pace.depth = 4 };

  while (site_status (&site, 0).state != NBDM_IN_SYNC) {
    if (!site_status (&site, 0).remote.admitted) {
      assert (connects++ < 4);
      site_connect (&site, 0);
    }
    (void)site_resync (&site, 0, &batch);
  }
}

static void
assert_equal (void)
{
  assert (nbdm_flush (site.volume) == 0);
  assert (memcmp (site.image, peer_image (site.peers[0]), SIZE) == 0);
}

/* The new volume is a hole from end to end. */
static void
test_a_resync_of_holes_ends (uint32_t error)
{
  make_site (error);
  memset (peer_image (site.peers[0]), 7, SIZE);
  bring_in_sync ();
  assert (connects == 2);
  assert_equal ();
  site_end (&site);
}

static void
test_what_a_client_zeroes_ends_in_sync (uint32_t error)
{
  static uint8_t bytes[REGION];

  make_site (error);
  memset (bytes, 7, sizeof bytes);
  for (uint64_t at = 0; at < SIZE; at += REGION)
    assert (nbdm_pwrite (site.volume, bytes, REGION, at, 0) == 0);
  bring_in_sync ();
  assert (connects == 1);
  /* The first one costs the connection, and no other does. */
  assert (nbdm_zero (site.volume, 4 * REGION, REGION, 0) == 0);
  assert (site_status (&site, 0).state == NBDM_OUT_OF_SYNC);
  bring_in_sync ();
  assert (connects == 2);
  assert (nbdm_zero (site.volume, 4 * REGION, 9 * REGION, NBDM_MAY_TRIM) == 0);
  assert (site_status (&site, 0).state == NBDM_IN_SYNC);
  assert_equal ();
  site_end (&site);
}

int
main (void)
{
  static const uint32_t errors[] = { EINVAL, EOPNOTSUPP };

  for (unsigned i = 0; i < sizeof errors / sizeof *errors; i++) {
    test_a_resync_of_holes_ends (errors[i]);
    test_what_a_client_zeroes_ends_in_sync (errors[i]);
  }
  return 0;
}
