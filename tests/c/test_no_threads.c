/* SPDX-License-Identifier: BSD-3-Clause */

/* The direct door when the system cannot make a thread: the session's own
 * thread completes requests that have begun, the others wait for the one worker
 * that always exists, and no thread waits for itself.
 *
 * pthread_create fails for the door's threads while the test says so.
 */

#define _GNU_SOURCE

#include "api.h"
#include "wire/protocol.h"
#include "site.h"
#include "door.h"
#include "nbd_client.h"

#include <poll.h>
#include <stdatomic.h>

#define REGION 65536u
#define SIZE (16u * REGION)
#define BLOCK 4096u

static struct site site;
static atomic_bool no_threads;
static atomic_uint refused;
static _Thread_local bool is_tests; /* and not one of the door's */

int __real_pthread_create (pthread_t *thread, const pthread_attr_t *attr,
                           void *(*start) (void *), void *opaque);

int
__wrap_pthread_create (pthread_t *thread, const pthread_attr_t *attr,
                       void *(*start) (void *), void *opaque)
{
  if (no_threads && !is_tests && !peer_thread) {
    refused++;
    return EAGAIN;
  }
  return __real_pthread_create (thread, attr, start, opaque);
}

static void
assert_answered (struct client *c, unsigned nr)
{
  while (nr-- > 0) {
    struct answer answer;
    bool simple;

    assert (client_answer (c, &answer, NULL, 0, &simple));
    assert (answer.error == 0);
  }
}

static void
write_at (struct client *c, uint64_t cookie, uint64_t offset, uint32_t length,
          uint8_t stamp)
{
  static uint8_t buf[2 * REGION];

  memset (buf, stamp, length);
  assert (client_request (c, NBD_CMD_WRITE, 0, cookie, offset, length, buf));
}

/* The remote is silent.  One write is express and waits for it; one of the same
 * range keeps the only worker; a large one and a flush wait for that.  Then the
 * remote is lost, so that the first has to be completed, and comes back.
 */
static void
test_begun_is_completed (const char *door)
{
  struct client c = client_open (door, false);

  write_at (&c, 1, 0, BLOCK, 1); /* the extent is in the set from now on */
  assert_answered (&c, 1);
  no_threads = true;
  peer_hold (site.peers[0], PEER_HOLD_ANSWERS);
  write_at (&c, 2, 0, BLOCK, 2);
  write_at (&c, 3, 0, BLOCK, 3);
  write_at (&c, 4, 4 * REGION, 2 * REGION, 4);
  assert (client_request (&c, NBD_CMD_FLUSH, 0, 5, 0, 0, NULL));
  while (refused == 0)
    poll (NULL, 0, 1);
  peer_cut (site.peers[0], false);
  peer_hold (site.peers[0], PEER_GO);
  site_wait_state (&site, 0, NBDM_OUT_OF_SYNC);
  assert_answered (&c, 4);
  site_connect (&site, 0);
  site_resync_to_end (&site, 0);
  write_at (&c, 6, BLOCK, BLOCK, 6);
  assert_answered (&c, 1);
  client_leave (&c);
  no_threads = false;
}

/* A connection that says nothing; it fails the test if the door is silent for
 * longer than a third of what a handshake may be.
 */
static struct client
connected (const char *door)
{
  const struct timeval deadline = { .tv_sec = 10 };
  struct sockaddr_un address = { .sun_family = AF_UNIX };
  struct client c = { .fd = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0) };

  snprintf (address.sun_path, sizeof address.sun_path, "%s", door);
  assert (setsockopt (c.fd, SOL_SOCKET, SO_RCVTIMEO, &deadline, sizeof deadline)
          == 0);
  assert (connect (c.fd, (struct sockaddr *)&address, sizeof address) == 0);
  return c;
}

/* A client for which there is no thread is turned away, and the next is not: it
 * gets that of a connection which says nothing.
 */
static void
test_client_without_thread (const char *door)
{
  struct nbd_greeting greeting;
  struct client silent = connected (door), c;

  client_receive (&silent, &greeting, sizeof greeting);
  no_threads = true;
  refused = 0;
  c = connected (door);
  client_assert_closed (&c);
  client_close (&c);
  assert (refused == 1);
  client_assert_closed (&silent);
  client_close (&silent);
  no_threads = false;
  c = client_open (door, true);
  write_at (&c, 1, 2 * BLOCK, BLOCK, 7);
  assert_answered (&c, 1);
  client_leave (&c);
}

int
main (void)
{
  struct door door;
  char path[96];

  alarm (100); /* nothing here may hang */
  is_tests = true;
  site = (struct site){ .size = SIZE,
                        .region_size = REGION,
                        .hold_ms = 200,
                        .nr_peers = 1,
                        .seed = site_seed (1) };
  site_make (&site);
  site_open (&site);
  site_connect (&site, 0);
  site_resync_to_end (&site, 0);
  snprintf (path, sizeof path, "%s/direct", site.dir);
  door_open (&door, site.volume, path);

  test_begun_is_completed (path);
  test_client_without_thread (path);

  door_close (&door);
  site_resync_to_end (&site, 0);
  assert (nbdm_stop (site.volume) == 0);
  assert (memcmp (site.image, peer_image (site.peers[0]), SIZE) == 0);
  site_end (&site);
  return 0;
}
