/* SPDX-License-Identifier: BSD-3-Clause */

/* The handshake of a remote with TLS, on a line that cuts, delays or changes it
 * at each byte of both directions.
 *
 * The server is the direct door and the client secure_connect.c, so each byte
 * is a test of both sides.  A connection that comes about has all that TLS
 * promises: the disk's right size and bytes.  Whatever else happens ends soon,
 * with a reason, and the door serves the next client.
 */

#define _GNU_SOURCE

#include "api.h"
#include "base/clock.h"
#include "base/error.h"
#include "wire/conn.h"
#include "wire/tls.h"
#include "wire/transport.h"
#include "direct_secured.h"
#include "nbd_wire.h"

#define TIMEOUT_MS                                                             \
  400u /* a length that grew has the client wait for so long                   \
        */
#define SLACK_MS 2000u
#define DELAY_MS 3
#define PLAIN_UP 20u   /* bytes before TLS: flags, STARTTLS */
#define PLAIN_DOWN 38u /* greeting, its answer */
#define MARK 0x5a      /* what the first sector holds */

enum way { UP, DOWN, NR_WAYS }; /* to the server, from it */

enum harm { NONE, CUT, DELAY, FLIP };

/* What happens to the next connection. */
struct plan {
  enum harm harm;
  enum way way;
  size_t at;
  uint8_t bit;
};

static struct {
  pthread_mutex_t lock; /* protects all below */
  struct plan plan;
  size_t passed[NR_WAYS]; /* of the last connection */
} line = { .lock = PTHREAD_MUTEX_INITIALIZER };

static int line_fd; /* where the client connects */
static char uri[400];

/* --- the line ---------------------------------------------------------------
 */

struct carried {
  struct plan plan;
  size_t passed[NR_WAYS];
};

/* False: the line is cut. */
static bool
carry_some (struct carried *c, enum way way, int to, uint8_t *bytes,
            size_t size)
{
  const struct plan *plan = &c->plan;
  size_t before = c->passed[way], at = plan->at - before;
  bool hit = plan->harm != NONE && plan->way == way && plan->at >= before
             && at < size;

  c->passed[way] += size;
  pthread_mutex_lock (&line.lock);
  memcpy (line.passed, c->passed, sizeof line.passed);
  pthread_mutex_unlock (&line.lock);
  if (!hit)
    return wire_transmit (to, bytes, size);
  if (plan->harm == FLIP)
    bytes[at] ^= plan->bit;
  if (!wire_transmit (to, bytes, at) || plan->harm == CUT)
    return false;
  if (plan->harm == DELAY)
    poll (NULL, 0, DELAY_MS);
  return wire_transmit (to, bytes + at, size - at);
}

static void
carry (int client, int server)
{
  struct pollfd fds[NR_WAYS] = { { .fd = client, .events = POLLIN },
                                 { .fd = server, .events = POLLIN } };
  const int to[NR_WAYS] = { server, client };
  struct carried c = { .passed = { 0 } };
  bool open = true;

  pthread_mutex_lock (&line.lock);
  c.plan = line.plan;
  pthread_mutex_unlock (&line.lock);
  while (open && poll (fds, NR_WAYS, -1) > 0)
    for (unsigned way = 0; way < NR_WAYS && open; way++)
      if (fds[way].revents) {
        uint8_t bytes[4096];
        ssize_t n = recv (fds[way].fd, bytes, sizeof bytes, 0);

        open = n > 0 && carry_some (&c, way, to[way], bytes, (size_t)n);
      }
}

static void *
line_main (void *opaque)
{
  for (;;) {
    int server, client = accept4 (line_fd, NULL, NULL, SOCK_CLOEXEC);

    if (client < 0)
      return opaque; /* it was shut down */
    server = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert (connect (server, (struct sockaddr *)&served.address,
                     sizeof served.address)
            == 0);
    carry (client, server);
    close (server);
    close (client);
  }
}

static pthread_t
line_begin (void)
{
  struct sockaddr_un address = { .sun_family = AF_UNIX };
  pthread_t thread;

  snprintf (address.sun_path, sizeof address.sun_path, "%.90s/line", site.dir);
  line_fd = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  assert (bind (line_fd, (struct sockaddr *)&address, sizeof address) == 0);
  assert (listen (line_fd, 8) == 0);
  snprintf (uri, sizeof uri, "nbds+unix://%s@/?socket=%s&tls-psk-file=%s",
            TLS_RELAY_USER, address.sun_path, tls_relay_psk_file ());
  assert (pthread_create (&thread, NULL, line_main, NULL) == 0);
  return thread;
}

static void
line_end (pthread_t thread)
{
  char path[160];

  (void)shutdown (line_fd, SHUT_RDWR);
  pthread_join (thread, NULL);
  close (line_fd);
  snprintf (path, sizeof path, "%.90s/line", site.dir);
  unlink (path);
}

/* --- one connection ---------------------------------------------------------
 */

static uint64_t
draw (void)
{
  dice = dice * UINT64_C (6364136223846793005) + UINT64_C (1442695040888963407);
  return dice >> 33;
}

static void
assert_all_right (struct conn *conn)
{
  uint8_t sector[SECTOR];

  assert (conn->secrets && conn->stream.tls);
  assert (conn_info (conn)->size == SIZE && !conn_info (conn)->read_only);
  assert (conn_pread (conn, sector, sizeof sector, 0) == 0);
  assert_filled (sector, MARK, sizeof sector);
}

static void
let_go (struct conn *conn)
{
  conn_kill (conn, "the end of the test");
  conn_tick (conn, TIMEOUT_MS, 0);
  conn_put (conn);
}

static void
set_plan (struct plan plan)
{
  pthread_mutex_lock (&line.lock);
  line.plan = plan;
  pthread_mutex_unlock (&line.lock);
}

/* True: it came about. */
static bool
attempt (enum harm harm, enum way way, size_t at)
{
  const uint32_t ms = harm == FLIP ? TIMEOUT_MS : SITE_DEADLINE_S * 1000;
  uint64_t begun = now_ns ();
  struct conn *conn = NULL;
  int rc;

  set_plan ((struct plan){ harm, way, at, (uint8_t)(1u << draw () % 8) });
  rc = conn_open (uri, ms, &conn);
  assert (now_ns () - begun < (ms + SLACK_MS) * NS_PER_MS);
  if (rc < 0) {
    assert (last_error ()[0] != '\0');
    return false;
  }
  assert_all_right (conn);
  let_go (conn);
  return true;
}

/* --- each byte --------------------------------------------------------------
 */

/* The bytes of a handshake without harm. */
static void
measure (size_t *whole)
{
  struct conn *conn;

  set_plan ((struct plan){ .harm = NONE });
  assert (conn_open (uri, SITE_DEADLINE_S * 1000, &conn) == 0);
  pthread_mutex_lock (&line.lock);
  memcpy (whole, line.passed, sizeof line.passed);
  pthread_mutex_unlock (&line.lock);
  assert_all_right (conn);
  let_go (conn);
  printf ("%zu bytes to the server and %zu from it\n", whole[UP], whole[DOWN]);
}

/* Bytes that the test finds again, by a client that stays. */
static struct client
write_mark (void)
{
  struct client c = client_open (door, true);
  uint8_t sector[SECTOR];

  memset (sector, MARK, sizeof sector);
  assert (client_do (&c, NBD_CMD_WRITE, 0, 0, sizeof sector, sector) == 0);
  return c;
}

static void
test_each_byte (void)
{
  const size_t plain[NR_WAYS] = { PLAIN_UP, PLAIN_DOWN };
  unsigned changed = 0, accepted = 0;
  struct client c;
  pthread_t thread;
  size_t whole[NR_WAYS];

  bring_up_secured ();
  c = write_mark ();
  thread = line_begin ();
  measure (whole);
  for (unsigned way = 0; way < NR_WAYS; way++)
    for (size_t at = 0; at < whole[way]; at++) {
      assert (!attempt (CUT, way, at));
      if (at % 4 == draw () % 4) /* these wait */
        assert (attempt (DELAY, way, at));
      if (at < plain[way])
        (void)attempt (FLIP, way, at); /* some of these bits mean nothing */
      else {
        changed++;
        accepted += attempt (FLIP, way, at);
      }
      if (at % 50 == 0)
        assert_works (&c);
    }
  /* The version in a record's head means nothing, nor do some records. */
  printf ("%u of %u changed bytes were accepted\n", accepted, changed);
  assert (accepted < changed / 20);
  line_end (thread);
  client_leave (&c);
  take_down ();
}

int
main (void)
{
  dice = site_seed (now_ns ());
  RUN (test_each_byte);
  return 0;
}
