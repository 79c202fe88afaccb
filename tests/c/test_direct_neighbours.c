/* SPDX-License-Identifier: BSD-3-Clause */

/* Clients of the direct door that read nothing, or little at a time, or whose
 * writes wait for a remote: no other client waits for them, nor does the
 * server's end.
 */

#define _GNU_SOURCE

#include <stdatomic.h>
#include <sys/ioctl.h>

#include "api.h"
#include "doors/direct.h"
#include "wire/protocol.h"
#include "direct_site.h"

/* Send `nr` requests, or as many as the server takes. */
static void
send_unread (const struct client *c, uint16_t type, uint32_t length,
             unsigned nr)
{
  uint8_t *message = calloc (1, sizeof (struct nbd_request) + length);
  struct nbd_request *header = (void *)message;
  size_t size = sizeof *header + (type == NBD_CMD_WRITE ? length : 0);
  struct pollfd fd = { .fd = c->fd, .events = POLLOUT };

  assert (message);
  for (uint64_t i = 0; i < nr && poll (&fd, 1, 300) > 0; i++) {
    *header = client_header (type, 0, i, i * length % SHARED, length);
    /* The last one may go in part. */
    if (send (c->fd, message, size, MSG_DONTWAIT | MSG_NOSIGNAL)
        < (ssize_t)size)
      break;
  }
  free (message);
}

/* Some clients write and never read their answers: their ranges are free for
 * other clients, and so are the workers.
 */
static void
test_mute_clients (void)
{
  uint8_t *buf = calloc (1, LARGEST);
  struct client mute[4], c;

  bring_up (1, 1000);
  for (unsigned i = 0; i < 4; i++) {
    mute[i] = client_open (door, i % 2);
    /* The answers are more than the socket holds, so no write is answered. */
    send_unread (&mute[i], NBD_CMD_READ, i < 2 ? 8192 : LARGEST / 4, 60);
    send_unread (&mute[i], NBD_CMD_WRITE, i < 2 ? 8192 : LARGEST / 4, 1000);
  }
  c = client_open (door, true);
  for (uint64_t offset = 0; offset < SHARED; offset += LARGEST) {
    assert (client_do (&c, NBD_CMD_WRITE, 0, offset, LARGEST, buf) == 0);
    assert (client_do (&c, NBD_CMD_WRITE, 0, offset, 4096, buf) == 0);
  }
  assert (client_do (&c, NBD_CMD_FLUSH, 0, 0, 0, NULL) == 0);
  round_trip (&c, 90);
  client_leave (&c);
  for (unsigned i = 0; i < 4; i++)
    client_close (&mute[i]);
  free (buf);
  take_down ();
}

enum { DRIPS = 130, DRIP_WORKERS = 128, DRIP_READS = 2, SMALL = 32 << 10 };

/* A client that reads little at a time, and asks for more before it has all. */
struct drip {
  struct client client;
  size_t asked; /* bytes */
  atomic_size_t taken;
};

static struct drip drips[DRIPS];
static atomic_uint nr_drips, nr_dripping; /* clients; of them, with an answer */
static atomic_bool drip_stop;

static void
drip_ask (struct drip *d, uint32_t length)
{
  assert (
      client_request (&d->client, NBD_CMD_READ, 0, d->asked, 0, length, NULL));
  d->asked += length;
}

/* Read so often that the kernel has room for one more piece within the time
 * that a send may take: a blocking send would go on for ever.
 */
static void *
drip_on (void *unused)
{
  static uint8_t ignored[17u << 10];

  (void)unused;
  for (; !drip_stop; poll (NULL, 0, 10))
    for (unsigned i = 0; i < nr_drips; i++) {
      struct drip *d = &drips[i];
      ssize_t n = recv (d->client.fd, ignored, sizeof ignored, MSG_DONTWAIT);

      if (n <= 0)
        continue;
      nr_dripping += d->taken == 0;
      d->taken += (size_t)n;
      while (d->asked - d->taken < DRIP_READS * LARGEST)
        drip_ask (d, SMALL); /* which need no worker */
    }
  return NULL;
}

/* More clients than there are workers read for ever, but little at a time. They
 * do not keep the workers from another client's large read: it is answered
 * before any of them has received one whole answer.
 */
static void
test_dripping_clients (void)
{
  time_t until = time (NULL) + SITE_DEADLINE_S;
  static uint8_t buf[2 * REGION];
  size_t before[DRIPS];
  struct client c;
  pthread_t thread;

  bring_up (1, 1000);
  nr_drips = nr_dripping = 0;
  drip_stop = false;
  assert (pthread_create (&thread, NULL, drip_on, NULL) == 0);
  for (unsigned i = 0; i < DRIPS; i++) {
    drips[i].client = client_open (door, false);
    for (unsigned k = 0; k < DRIP_READS; k++)
      drip_ask (&drips[i], LARGEST);
    nr_drips++;
  }
  c = client_open (door, false);
  for (; nr_dripping < DRIP_WORKERS; poll (NULL, 0, 1))
    assert (time (NULL) < until);
  for (unsigned i = 0; i < DRIPS; i++)
    before[i] = drips[i].taken;
  assert (client_do (&c, NBD_CMD_READ, 0, 0, sizeof buf, buf) == 0);
  for (unsigned i = 0; i < DRIPS; i++)
    assert (drips[i].taken - before[i] < LARGEST);
  drip_stop = true;
  pthread_join (thread, NULL);
  for (unsigned i = 0; i < DRIPS; i++)
    client_close (&drips[i].client);
  client_leave (&c);
  take_down ();
}

static void
wait_inflight (uint32_t least)
{
  time_t until = time (NULL) + SITE_DEADLINE_S;
  struct nbdm_status status;

  do {
    assert (time (NULL) < until);
    poll (NULL, 0, 2);
    nbdm_get_status (site.volume, &status);
  } while (status.inflight < least);
}

/* As many writes as there are workers, and one more, wait for a remote: the
 * server receives the last one whole, and another client reads from the local
 * disk.
 */
static void
test_held_writes (void)
{
  enum { NR = 127 };
  static uint8_t buf[LARGEST];
  struct client writer, other, reader;

  bring_up (1, 3600 * 1000);
  writer = client_open (door, false);
  other = client_open (door, false);
  reader = client_open (door, true);
  peer_cut (site.peers[0], false);
  site_wait_state (&site, 0, NBDM_HOLDING);
  for (uint64_t i = 0; i < NR; i++)
    assert (client_request (&writer, NBD_CMD_WRITE, 0, i, i * 4096, 4096, buf));
  assert (client_request (&writer, NBD_CMD_WRITE, 0, NR, SHARED - LARGEST,
                          LARGEST, buf));
  assert (client_request (&other, NBD_CMD_WRITE, 0, 0, SHARED / 2, 4096, buf));
  wait_inflight (NR + 1);
  assert (client_do (&reader, NBD_CMD_READ, 0, 0, 2 * REGION, buf) == 0);
  end_held ();
  client_close (&writer);
  client_close (&other);
  client_close (&reader);
  nbdm_close (site.volume);
  site_remove (&site);
}

/* A client that reads late gets all of its answers. */
static void
test_late_reader (void)
{
  enum { NR = 100 };
  static uint8_t buf[LARGEST / 4];
  struct client c;
  bool seen[NR] = { false };

  bring_up (1, 1000);
  c = client_open (door, true);
  for (uint64_t i = 0; i < NR; i++)
    assert (client_request (&c, NBD_CMD_READ, 0, i, 0,
                            i % 2 ? sizeof buf : SECTOR, NULL));
  poll (NULL, 0, 200); /* longer than a worker waits for it */
  for (unsigned i = 0; i < NR; i++) {
    struct answer answer;
    bool simple;

    assert (client_answer (&c, &answer, buf, sizeof buf, &simple));
    assert (answer.error == 0 && answer.cookie < NR && !seen[answer.cookie]);
    assert (answer.length == (answer.cookie % 2 ? sizeof buf : SECTOR));
    seen[answer.cookie] = true;
  }
  client_leave (&c);
  take_down ();
}

/* --- flushes, whose answers a worker sends to several clients
 * -----------------
 */

/* How many answers to reads of 8 sectors fill a socket. */
static unsigned
answers_that_fill (void)
{
  static uint8_t buf[sizeof (struct nbd_simple_reply) + 8 * SECTOR];
  unsigned nr = 0;
  int ends[2];

  assert (socketpair (AF_UNIX, SOCK_STREAM, 0, ends) == 0);
  while (send (ends[0], buf, sizeof buf, MSG_DONTWAIT) > 0)
    nr++;
  close (ends[0]);
  close (ends[1]);
  return nr;
}

/* A client whose answers have all left, and just fill its socket. */
static struct client
full (unsigned nr)
{
  struct client c = client_open (door, false);
  time_t until = time (NULL) + SITE_DEADLINE_S;

  for (unsigned i = 1; i <= nr; i++) {
    int all = (int)(i * (sizeof (struct nbd_simple_reply) + 8 * SECTOR));
    int came = 0;

    assert (client_request (&c, NBD_CMD_READ, 0, i, 0, 8 * SECTOR, NULL));
    while (came < all) {
      assert (ioctl (c.fd, FIONREAD, &came) == 0);
      assert (time (NULL) < until);
      poll (NULL, 0, came < all ? 1 : 0);
    }
  }
  return c;
}

/* Clients that read nothing do not delay the flushes of other clients. */
static void
test_flushes_of_the_deaf (void)
{
  enum { NR = 90, FLUSH_MS = 300, MOST_MS = 1500 };
  unsigned nr = answers_that_fill ();
  struct client deafs[NR], first, c;
  struct timespec from, to;
  struct answer answer;
  bool simple;

  bring_up_limited (120, CLIENT_DEADLINE_S * 1000);
  for (int i = 0; i < NR; i++)
    deafs[i] = full (nr);
  first = client_open (door, false);
  c = client_open (door, false);
  peer_slow_flushes (site.peers[0], FLUSH_MS, 0);
  clock_gettime (CLOCK_MONOTONIC, &from);
  assert (client_request (&first, NBD_CMD_FLUSH, 0, 1, 0, 0, NULL));
  assert (client_request (&c, NBD_CMD_FLUSH, 0, 2, 0, 0, NULL));
  for (int i = 0; i < NR; i++)
    assert (client_request (&deafs[i], NBD_CMD_FLUSH, 0, 3, 0, 0, NULL));
  assert (client_answer (&c, &answer, NULL, 0, &simple));
  assert (answer.error == 0 && answer.cookie == 2);
  clock_gettime (CLOCK_MONOTONIC, &to);
  assert ((to.tv_sec - from.tv_sec) * 1000
              + (to.tv_nsec - from.tv_nsec) / 1000000
          < MOST_MS);
  peer_slow_flushes (site.peers[0], 0, 0);
  for (int i = 0; i < NR; i++)
    client_close (&deafs[i]);
  client_close (&first);
  client_leave (&c);
  take_down ();
}

/* --- the end -------------------------------------------------------------- */

/* The server's end does not wait for a client that sends options without end
 * and reads nothing: the handshake's own limit is half a minute.
 */
static void
test_end_while_shaking_hands (void)
{
  const struct nbd_option_header option
      = { .magic = htobe64 (NBD_OPTION), .option = htobe32 (NBD_OPT_LIST) };
  struct client asking;
  struct pollfd fd = { .events = POLLOUT };
  time_t before;

  bring_up (1, 1000);
  asking = client_connect (door, NBD_FLAG_FIXED_NEWSTYLE);
  fd.fd = asking.fd;
  while (poll (&fd, 1, 300) > 0)
    assert (send (asking.fd, &option, sizeof option, MSG_DONTWAIT) > 0
            || errno == EAGAIN);
  assert (nbdm_stop (site.volume) == 0);
  before = time (NULL);
  door_close (&served);
  assert (time (NULL) - before < 15);
  client_close (&asking);
  nbdm_close (site.volume);
  site_remove (&site);
}

/* A client that does not read does not keep the server from ending. */
static void
test_end_with_mute_client (void)
{
  struct client mute;
  struct pollfd fd = { .events = POLLIN };

  bring_up (1, 1000);
  mute = client_open (door, false);
  fd.fd = mute.fd;
  send_unread (&mute, NBD_CMD_READ, LARGEST / 4, 60);
  assert (poll (&fd, 1, SITE_DEADLINE_S * 1000) == 1); /* the first has come */
  assert (nbdm_stop (site.volume) == 0);
  door_close (&served);
  wait_no_clients ();
  client_close (&mute);
  nbdm_close (site.volume);
  site_remove (&site);
}

static atomic_bool hold_advice;
static atomic_uint nr_advised;

int __real_posix_fadvise (int fd, off_t offset, off_t length, int advice);
int __wrap_posix_fadvise (int fd, off_t offset, off_t length, int advice);
int
__wrap_posix_fadvise (int fd, off_t offset, off_t length, int advice)
{
  (void)fd;
  (void)offset;
  (void)advice;
  assert (length <= NBDM_MAX_REQUEST);
  nr_advised++;
  while (hold_advice)
    poll (NULL, 0, 1);
  return 0;
}

/* Clients have the disk read ahead, which takes long, as often as they may: the
 * threads that read for others stay free.
 */
static void
test_reading_ahead (void)
{
  uint8_t *buf = calloc (1, LARGEST);
  struct client ahead[2], c;

  bring_up (1, 1000);
  hold_advice = true;
  for (unsigned i = 0; i < 2; i++) {
    ahead[i] = client_open (door, false);
    for (unsigned k = 0; k < DIRECT_MAX_OPS; k++)
      assert (client_request (&ahead[i], NBD_CMD_CACHE, 0, k, 0, SIZE, NULL));
  }
  WAIT_FOR (nr_advised > 0);
  c = client_open (door, false);
  assert (client_do (&c, NBD_CMD_READ, 0, 0, LARGEST, buf) == 0);
  assert (nr_advised < DIRECT_MAX_OPS);
  hold_advice = false;
  for (unsigned i = 0; i < 2; i++) {
    for (unsigned k = 0; k < DIRECT_MAX_OPS; k++) {
      struct answer answer;
      bool simple;

      assert (client_answer (&ahead[i], &answer, NULL, 0, &simple));
      assert (answer.error == 0);
    }
    client_leave (&ahead[i]);
  }
  client_leave (&c);
  free (buf);
  take_down ();
}

static atomic_bool hold_zeroes;
static atomic_uint nr_zeroing;

int __real_fallocate (int fd, int mode, off_t offset, off_t length);
int __wrap_fallocate (int fd, int mode, off_t offset, off_t length);
int
__wrap_fallocate (int fd, int mode, off_t offset, off_t length)
{
  nr_zeroing += hold_zeroes;
  while (hold_zeroes)
    poll (NULL, 0, 1);
  return __real_fallocate (fd, mode, offset, length);
}

/* A client zeroes as much as it may, on a disk that takes long for it: the
 * threads that write and flush for others stay free.
 */
static void
test_long_zeroes (void)
{
  uint8_t *buf = calloc (1, LARGEST);
  struct client zeroing[2], c;

  bring_up (1, 1000);
  hold_zeroes = true;
  for (unsigned i = 0; i < 2; i++) {
    zeroing[i] = client_open (door, false);
    for (unsigned k = 0; k < DIRECT_MAX_OPS; k++)
      assert (client_request (&zeroing[i], NBD_CMD_WRITE_ZEROES, 0, k,
                              k % 64 * SECTOR, SECTOR, NULL));
  }
  WAIT_FOR (nr_zeroing > 0);
  c = client_open (door, false);
  assert (client_do (&c, NBD_CMD_WRITE, 0, SHARED - LARGEST, LARGEST, buf)
          == 0);
  assert (client_do (&c, NBD_CMD_FLUSH, 0, 0, 0, NULL) == 0);
  hold_zeroes = false;
  for (unsigned i = 0; i < 2; i++) {
    for (unsigned k = 0; k < DIRECT_MAX_OPS; k++) {
      struct answer answer;
      bool simple;

      assert (client_answer (&zeroing[i], &answer, NULL, 0, &simple));
      assert (answer.error == 0);
    }
    client_leave (&zeroing[i]);
  }
  client_leave (&c);
  free (buf);
  take_down ();
}

int
main (void)
{
  dice = site_seed (1);
  RUN (test_mute_clients);
  RUN (test_dripping_clients);
  RUN (test_held_writes);
  RUN (test_late_reader);
  RUN (test_flushes_of_the_deaf);
  RUN (test_reading_ahead);
  RUN (test_long_zeroes);
  RUN (test_end_with_mute_client);
  RUN (test_end_while_shaking_hands);
  return 0;
}
