/* SPDX-License-Identifier: BSD-3-Clause */

/* A volume whose remotes are servers inside the test (nbd_peer.h), so that a
 * test can compare both images at one instant and without a copy. Its files are
 * in memory where a tmpfs exists: these tests write all the time and are not
 * about what a disk keeps.
 */

#ifndef NBDM_SITE_H
#define NBDM_SITE_H

#include <poll.h>
#include <pthread.h>
#include <time.h>

#include "api.h"
#include "volume/volume.h"
#include "nbd_peer.h"
#include "test.h"

#define SITE_DEADLINE_S 60
#define SITE_MAX_PEERS 3

/* Wait until the condition holds; the test fails if that takes too long. */
#define WAIT_FOR(condition)                                                    \
  do {                                                                         \
    time_t until = time (NULL) + SITE_DEADLINE_S;                              \
    while (!(condition)) {                                                     \
      assert (time (NULL) < until);                                            \
      poll (NULL, 0, 1);                                                       \
    }                                                                          \
  } while (0)

struct site {
  /* Set by the test, before site_make. */
  uint64_t size;
  uint32_t region_size;
  uint32_t hold_ms;
  uint32_t nr_peers;
  const char *node; /* the peers are nodes, and this is the site's own; NULL */
  struct peer_params peer; /* the socket, size and seed are ours; `opaque` is
                            * the peer's number */
  uint64_t seed;

  char dir[64];
  char local[80], state[80], sockets[SITE_MAX_PEERS][80];
  struct nbdm_params params;
  struct nbdm *volume;
  struct peer *peers[SITE_MAX_PEERS];
  const uint8_t *image; /* the local disk */
};

/* Images of zeroes, peers that listen, a volume that was created. */
void site_make (struct site *site);
void site_open (struct site *site); /* and start */
/* Of nodes: have this one be primary from the next open on, in a generation
 * that the others hold (`counted`), or have never met.
 */
#define SITE_GENERATION 1000u
void site_promote (struct site *site, bool counted);
/* Stop cleanly, and free all. */
void site_end (struct site *site);
/* The same without the stop, for a volume that was closed. */
void site_remove (struct site *site);

struct nbdm_disk_status site_status (struct site *site, uint32_t remote);
void site_wait_state (struct site *site, uint32_t remote,
                      enum nbdm_remote_state state);
/* Connect and admit, as often as it takes. */
void site_connect (struct site *site, uint32_t remote);
/* One batch, as the policy would call for it; late regions are released once
 * nothing else is left, so the test must have let late writes in by then.
 */
int site_resync (struct site *site, uint32_t remote, struct nbdm_resync *batch);
void site_resync_to_end (struct site *site, uint32_t remote);

/* The seed of this run: NBDM_TEST_SEED, or the one given; printed. */
uint64_t site_seed (uint64_t fixed);

#endif /* NBDM_SITE_H */
