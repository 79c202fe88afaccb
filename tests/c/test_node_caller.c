/* SPDX-License-Identifier: BSD-3-Clause */

/* Calls to nodes that misbehave: an answer that is cut, garbled or late at each
 * of its bytes, and servers that never end.  Each call ends in its time, with
 * an error and a message, or with the whole reply.
 */

#define _GNU_SOURCE

#include "api.h"
#include "base/clock.h"
#include "wire/protocol.h"
#include "direct_site.h"
#include "node_door.h"

#define QUICK_MS 100u
#define TIMEOUT_MS 20000u
#define HEAD 330 /* bytes of a conversation before a reply's data, or more */
#define MAP_BYTES 3000u

enum harm { CUT, FLIP, STALL, GARBAGE, ENDLESS_REPLIES };

/* A server between the caller and the door. */
static struct {
  struct sockaddr_un address;
  int listener;
  pthread_t thread;
  /* Set before a call; the relay's thread reads them with the connection. */
  atomic_int next_harm;
  atomic_u64 next_at;
  /* Its own. */
  enum harm harm;
  uint64_t at; /* the byte of the answers that it harms */
} relay;

static void
judge (struct direct_server *server, const struct nbdm_call *call)
{
  static uint8_t map[MAP_BYTES];

  if (call->kind == NBDM_CALL_META)
    (void)nbdm_server_answer (server, call->number, 0, call->words, call->size);
  else
    (void)nbdm_server_answer (server, call->number, 0, map, sizeof map);
}

/* --- the relay ------------------------------------------------------------ */

static int
connect_door (void)
{
  int fd = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

  assert (fd >= 0);
  assert (
      connect (fd, (struct sockaddr *)&served.address, sizeof served.address)
      == 0);
  return fd;
}

static bool
send_on (int fd, const uint8_t *bytes, size_t size)
{
  while (size > 0) {
    ssize_t n = send (fd, bytes, size, MSG_NOSIGNAL);

    if (n <= 0)
      return false;
    bytes += n;
    size -= (size_t)n;
  }
  return true;
}

/* Until the caller has left. */
static void
await_leave (int fd)
{
  struct pollfd pfd = { .fd = fd, .events = POLLRDHUP };

  (void)poll (&pfd, 1, SITE_DEADLINE_S * 1000);
}

/* False: this was the byte. */
static bool
carry_answer (int caller, uint8_t *bytes, size_t size, uint64_t *passed)
{
  bool here = relay.at >= *passed && relay.at < *passed + size;
  size_t before = here ? (size_t)(relay.at - *passed) : size;

  *passed += size;
  if (here && relay.harm == FLIP) {
    bytes[before] ^= 0xff;
    return send_on (caller, bytes, size);
  }
  if (!send_on (caller, bytes, before) || !here)
    return !here;
  if (relay.harm == STALL)
    await_leave (caller);
  return false;
}

static void
carry (int caller)
{
  static uint8_t bytes[1u << 16];
  int door_fd = connect_door ();
  struct pollfd fds[] = { { .fd = caller, .events = POLLIN },
                          { .fd = door_fd, .events = POLLIN } };
  uint64_t passed = 0;
  bool on = true;

  while (on && poll (fds, 2, SITE_DEADLINE_S * 1000) > 0)
    for (int i = 0; i < 2 && on; i++) {
      ssize_t n = fds[i].revents
                      ? recv (fds[i].fd, bytes, sizeof bytes, MSG_DONTWAIT)
                      : -2;

      if (n == 0 || n == -1)
        on = false;
      else if (n > 0)
        on = i == 0 ? send_on (door_fd, bytes, (size_t)n)
                    : carry_answer (caller, bytes, (size_t)n, &passed);
    }
  close (door_fd);
}

static void
send_garbage (int caller)
{
  uint8_t bytes[4096];

  for (size_t i = 0; i < sizeof bytes; i++)
    bytes[i] = (uint8_t)(i * 31 + relay.at);
  while (send_on (caller, bytes, sizeof bytes))
    ;
}

/* A right greeting, and then the same right reply for ever. */
static void
reply_endlessly (int caller)
{
  const struct nbd_greeting greeting
      = { .magic = htobe64 (NBD_MAGIC),
          .option = htobe64 (NBD_OPTION),
          .flags = htobe16 (NBD_FLAG_FIXED_NEWSTYLE) };
  struct nbd_option_reply ack = { .magic = htobe64 (NBD_OPTION_REPLY),
                                  .option = htobe32 (NBD_OPT_STRUCTURED_REPLY),
                                  .type = htobe32 (NBD_REP_ACK) };
  bool on = send_on (caller, (const uint8_t *)&greeting, sizeof greeting)
            && send_on (caller, (const uint8_t *)&ack, sizeof ack);

  ack.option = htobe32 (NBD_OPT_GO);
  ack.type = htobe32 (NBD_REP_INFO);
  while (on)
    on = send_on (caller, (const uint8_t *)&ack, sizeof ack);
}

static void *
relay_main (void *opaque)
{
  int caller;

  (void)opaque;
  while ((caller = accept4 (relay.listener, NULL, NULL, SOCK_CLOEXEC)) >= 0) {
    relay.harm = (enum harm)atomic_load (&relay.next_harm);
    relay.at = atomic_load (&relay.next_at);
    if (relay.harm == GARBAGE)
      send_garbage (caller);
    else if (relay.harm == ENDLESS_REPLIES)
      reply_endlessly (caller);
    else
      carry (caller);
    close (caller);
  }
  return NULL;
}

static void
relay_begin (void)
{
  relay.address.sun_family = AF_UNIX;
  snprintf (relay.address.sun_path, sizeof relay.address.sun_path, "%s/relay",
            site.dir);
  relay.listener = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  assert (bind (relay.listener, (struct sockaddr *)&relay.address,
                sizeof relay.address)
          == 0);
  assert (listen (relay.listener, 16) == 0);
  assert (pthread_create (&relay.thread, NULL, relay_main, NULL) == 0);
}

static void
relay_end (void)
{
  shutdown (relay.listener, SHUT_RDWR);
  assert (pthread_join (relay.thread, NULL) == 0);
  close (relay.listener);
  unlink (relay.address.sun_path);
}

/* --- calls ---------------------------------------------------------------- */

static const char *
relay_uri (const char *name)
{
  static char uri[256];

  snprintf (uri, sizeof uri, "nbd+unix:///%s?socket=%s", name,
            relay.address.sun_path);
  return uri;
}

/* Only what comes late, or never ends, needs a short time. */
static uint32_t
time_of (enum harm harm, uint64_t at)
{
  bool waits = harm == FLIP || harm == STALL || harm == ENDLESS_REPLIES;

  return waits && at != UINT64_MAX ? QUICK_MS : TIMEOUT_MS;
}

/* Call, or fetch: what it returned, in its time. */
static int
reach (enum harm harm, uint64_t at, bool fetches)
{
  uint32_t timeout_ms = time_of (harm, at);
  uint64_t begin = now_ns ();
  uint8_t reply[MAP_BYTES];
  int rc;

  atomic_store (&relay.next_harm, (int)harm);
  atomic_store (&relay.next_at, at);
  if (fetches)
    rc = nbdm_fetch (relay_uri (VOLUME ".dirty"), reply, MAP_BYTES, timeout_ms);
  else
    rc = nbdm_call (relay_uri (VOLUME ".meta"), "hello", 5, reply, 5,
                    timeout_ms);
  assert (now_ns () - begin < (timeout_ms + 5000) * NS_PER_MS);
  assert (rc >= 0 || *last_error () != '\0');
  return rc;
}

static void
bring_up_node (void)
{
  bring_up (0, 1000);
  node_door_begin (&served, judge);
  relay_begin ();
}

static void
take_down_node (void)
{
  relay_end ();
  node_door_end (&served);
  assert (nbdm_stop (site.volume) == 0);
  site_end (&site);
}

static void
test_cut (void)
{
  bring_up_node ();
  for (uint64_t at = 0; at < HEAD; at++)
    for (int fetches = 0; fetches < 2; fetches++)
      assert (reach (CUT, at, fetches) == -ECONNRESET);
  assert (reach (CUT, 60000, false) == -ECONNRESET);
  assert (reach (CUT, UINT64_MAX, false) == 5);
  assert (reach (CUT, UINT64_MAX, true) == 0);
  take_down_node ();
}

/* A flipped bit of the data, or of a flag, changes nothing that is checked. */
static void
test_garbled (void)
{
  int nr_refused = 0;

  bring_up_node ();
  for (uint64_t at = 0; at < HEAD; at++)
    for (int fetches = 0; fetches < 2; fetches++)
      nr_refused += reach (FLIP, at, fetches) < 0;
  assert (nr_refused > HEAD / 2);
  assert (reach (FLIP, UINT64_MAX, false) == 5);
  take_down_node ();
}

static void
test_late (void)
{
  bring_up_node ();
  for (uint64_t at = 0; at < HEAD; at += 13)
    assert (reach (STALL, at, at % 2) == -ETIMEDOUT);
  ASSERT_SAYS ("no answer within 100 ms");
  take_down_node ();
}

static void
test_no_node (void)
{
  uint8_t reply[8];

  bring_up_node ();
  for (uint64_t at = 0; at < 20; at++)
    assert (reach (GARBAGE, at, at % 2) == -EPROTO);
  assert (reach (ENDLESS_REPLIES, 0, false) == -ETIMEDOUT);
  assert (nbdm_call ("http://here/", "x", 1, reply, 8, QUICK_MS) == -EINVAL);
  assert (nbdm_call ("nbd+unix:///?socket=/nowhere", "x", 1, reply, 8, QUICK_MS)
          == -ENOENT);
  assert (nbdm_call ("nbd://127.0.0.1:1/", "x", 1, reply, 8, TIMEOUT_MS)
          == -ECONNREFUSED);
  assert (nbdm_call (node_uri (&served, VOLUME ".meta"), "x", 0, reply, 8,
                     TIMEOUT_MS)
          == -EINVAL);
  /* The volume's clients are no nodes. */
  assert (nbdm_server_listener (served.server, 0, NBDM_CLIENTS, NULL) == 0);
  assert (nbdm_call (node_uri (&served, VOLUME ".meta"), "x", 1, reply, 8,
                     TIMEOUT_MS)
          == -EPROTO);
  assert (
      nbdm_server_listener (served.server, 0, NBDM_CLOSED, "beta is primary")
      == 0);
  assert (nbdm_call (node_uri (&served, VOLUME ".meta"), "x", 1, reply, 8,
                     TIMEOUT_MS)
          == -ECONNREFUSED);
  ASSERT_SAYS ("beta is primary");
  take_down_node ();
}

int
main (void)
{
  dice = site_seed (1);
  RUN (test_cut);
  RUN (test_garbled);
  RUN (test_late);
  RUN (test_no_node);
  return 0;
}
