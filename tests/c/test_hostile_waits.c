/* SPDX-License-Identifier: BSD-3-Clause */

/* A remote that reads no more, or never stops to send, and the threads that
 * wait for it: none of them waits for longer than its own command, nor sends
 * without end for others.
 */

#define _GNU_SOURCE

#include "api.h"
#include "base/clock.h"
#include "base/error.h"
#include "wire/conn.h"
#include "wire/protocol.h"
#include "wire/transport.h"
#include "villain.h"

#include <poll.h>
#include <stdatomic.h>

#define DEADLINE_MS 200u
#define SECTOR 512u
#define LONG_MS 60000u

static bool is_libnbd;
static struct villain v;

/* --- a server that reads no more, and threads that wait ---------------------
 */

static atomic_bool over;

static void *
tick_all_the_time (void *opaque)
{
  (void)opaque;
  while (!over) {
    conn_tick (v.conn, DEADLINE_MS, 0);
    poll (NULL, 0, 5);
  }
  return NULL;
}

static void *
write_and_wait (void *opaque)
{
  struct errand *e = errand_make (COMMAND_WRITE, 1u << 20);

  (void)opaque;
  if (conn_issue (v.conn, &e->cmd, &e->waiter) == 0) {
    conn_wait (v.conn, &e->waiter);
    assert (e->cmd.error == ENOTCONN || e->cmd.error == 0);
  }
  free (e);
  return NULL;
}

/* `at` bytes are read, then none; with `answer` the first is answered then. */
static void
stop_reading (size_t at, bool answer)
{
  uint8_t *buf = malloc (at + 1);
  pthread_t ticker, writers[3];
  uint64_t start = now_ns ();
  uint64_t cookie = 0;

  over = false;
  villain_connect (&v);
  for (unsigned i = 0; i < 3; i++)
    assert (pthread_create (&writers[i], NULL, write_and_wait, NULL) == 0);
  assert (pthread_create (&ticker, NULL, tick_all_the_time, NULL) == 0);
  if (at > 0)
    assert (wire_receive (v.fd, buf, at));
  if (at >= sizeof (struct wire_request))
    cookie = ((struct wire_request *)buf)->cookie;
  if (answer)
    villain_reply (&v, cookie, 0);
  for (unsigned i = 0; i < 3; i++)
    pthread_join (writers[i], NULL);
  assert (now_ns () - start < 50 * DEADLINE_MS * UINT64_C (1000000));
  assert (conn_dead (v.conn));
  over = true;
  pthread_join (ticker, NULL);
  villain_end (&v);
  free (buf);
}

static void
test_stops_reading (void)
{
  static const size_t places[] = { 0, 1, 27, 28, 29, 100000, (1u << 20) + 28 };

  for (unsigned i = 0; i < sizeof places / sizeof *places; i++) {
    stop_reading (places[i], false);
    if (places[i] >= 28)
      stop_reading (places[i], true);
  }
}

/* --- threads that are answered, and one that is not yet ---------------------
 */

#define HUGE (4u << 20) /* more than any socket takes */

static void *
write_huge (void *opaque)
{
  struct waiting *w = opaque;
  struct errand *e = errand_make (COMMAND_WRITE, HUGE);

  assert (conn_issue (v.conn, &e->cmd, &e->waiter) == 0);
  conn_wait (v.conn, &e->waiter);
  assert (e->cmd.error == 0);
  free (e);
  w->over = true;
  return NULL;
}

/* A thread that waits for room in the socket gets its answer: it leaves the
 * rest of another thread's bytes to that thread. No thread ticks.
 */
static void
test_answered_thread_sends_for_no_other (void)
{
  static uint8_t buf[HUGE];
  struct waiting first = { .over = false }, second = { .over = false };
  uint64_t cookie;

  villain_connect (&v);
  assert (pthread_create (&first.thread, NULL, write_huge, &first) == 0);
  cookie = villain_request (&v).cookie;
  assert (wire_receive (v.fd, buf, HUGE / 2));
  assert (pthread_create (&second.thread, NULL, write_huge, &second) == 0);
  for (unsigned ms = 0; conn_report (v.conn).outstanding < 2; ms++) {
    assert (ms < PATIENCE_MS);
    poll (NULL, 0, 1);
  }
  assert (wire_receive (v.fd, buf, HUGE / 2));
  villain_reply (&v, cookie, 0);
  assert_over (&first);
  cookie = villain_request (&v).cookie;
  assert (wire_receive (v.fd, buf, HUGE));
  villain_reply (&v, cookie, 0);
  assert_over (&second);
  villain_end (&v);
}

/* --- others that never stop to send ------------------------------------------
 */

#define CROWD                                                                  \
  4000u /* commands; so a thread sends for all, as long as it may              \
         */
#define FEW 500u

static struct errand *crowd[CROWD];
static uint64_t first_cookie;
static unsigned nr_crowd;   /* commands that others add, one at each sendmsg */
static unsigned nr_sendmsg; /* since the last of them was wanted */

/* While a thread is in sendmsg, another client's thread adds a command. During
 * the third the first command is answered, and the ticker takes the answer in.
 */
static void
join_crowd (void)
{
  struct errand *e = errand_make (COMMAND_WRITE, SECTOR);
  unsigned n = nr_crowd++;

  nr_sendmsg++;
  assert (n < CROWD);
  if (n == CROWD - 1)
    nr_crowd = 0; /* it ends: or a thread that sends for all never would */
  crowd[n] = e;
  assert (conn_issue (v.conn, &e->cmd, &e->waiter) == 0);
  if (n == 2) {
    villain_reply (&v, first_cookie, 0);
    conn_tick (v.conn, LONG_MS, 0);
  }
}

ssize_t __real_conn_sendmsg (int fd, const struct msghdr *msg, int flags);
ssize_t __wrap_conn_sendmsg (int fd, const struct msghdr *msg, int flags);
ssize_t
__wrap_conn_sendmsg (int fd, const struct msghdr *msg, int flags)
{
  ssize_t n;

  if (nr_crowd == 0)
    return __real_conn_sendmsg (fd, msg, flags);
  join_crowd ();
  poll (NULL, 0, 1); /* it is a long command */
  do {               /* this server reads as quickly as it is sent to */
    struct pollfd pfd = { .fd = fd, .events = POLLOUT };

    poll (&pfd, 1, -1);
    n = __real_conn_sendmsg (fd, msg, flags);
  } while (n < 0 && errno == EAGAIN);
  return n;
}

static void *
read_all (void *opaque)
{
  static uint8_t buf[65536];

  (void)opaque;
  while (recv (v.fd, buf, sizeof buf, 0) > 0)
    ;
  return NULL;
}

enum sender { SESSION, TICKER, WAITER, NR_SENDERS };

/* A thread sends for others, but not for as long as they add commands. */
static void
test_crowd_keeps_no_thread (void)
{
  if (is_libnbd)
    return; /* there each thread sends its own */
  for (enum sender sender = 0; sender < NR_SENDERS; sender++) {
    struct errand *e = errand_make (COMMAND_WRITE, SECTOR);
    pthread_t reader;

    villain_connect (&v);
    first_cookie = htobe64 (2);
    crowd[0] = errand_make (COMMAND_WRITE, SECTOR);
    assert (conn_issue (v.conn, &crowd[0]->cmd, &crowd[0]->waiter) == 0);
    assert (conn_issue (v.conn, &e->cmd, &e->waiter) == 0);
    assert (pthread_create (&reader, NULL, read_all, NULL) == 0);
    nr_crowd = 1;
    nr_sendmsg = 0;
    if (sender == SESSION)
      conn_push (v.conn);
    else if (sender == TICKER)
      conn_tick (v.conn, LONG_MS, 0);
    else
      conn_wait (v.conn, &e->waiter);
    assert (nr_sendmsg > 0 && nr_sendmsg < FEW);
    nr_crowd = 0;
    shutdown (v.fd, SHUT_RDWR);
    pthread_join (reader, NULL);
    villain_end (&v);
    free (e);
    for (unsigned i = 0; i < CROWD && crowd[i]; i++) {
      free (crowd[i]);
      crowd[i] = NULL;
    }
  }
}

/* --- a handshake without an end ----------------------------------------------
 */

static char flood_uri[400];

/* The client asks for TLS, and gets it. */
static bool
secure (int fd)
{
  struct __attribute__ ((packed)) {
    uint32_t flags;
    struct nbd_option_header option;
  } hello;
  const struct nbd_option_reply ack = { .magic = htobe64 (NBD_OPTION_REPLY),
                                        .option = htobe32 (NBD_OPT_STARTTLS),
                                        .type = htobe32 (NBD_REP_ACK) };
  void (*const around) (int) = wire_secure;

  if (!wire_receive (fd, &hello, sizeof hello)
      || !wire_transmit (fd, &ack, sizeof ack))
    return false;
  around (fd);
  return true;
}

/* Send replies about the export without end. */
static void *
flood (void *opaque)
{
  static struct __attribute__ ((packed)) {
    struct nbd_option_reply reply;
    uint16_t info;
    char words[2];
  } infos[4096];
  const int much = 64 << 20;
  const struct nbd_greeting greeting = { .magic = htobe64 (NBD_MAGIC),
                                         .option = htobe64 (NBD_OPTION),
                                         .flags = htobe16 (3) };

  (void)opaque;
  for (unsigned i = 0; i < 4096; i++) {
    infos[i].reply.magic = htobe64 (NBD_OPTION_REPLY);
    infos[i].reply.option = htobe32 (NBD_OPT_GO);
    infos[i].reply.type = htobe32 (NBD_REP_INFO);
    infos[i].reply.length = htobe32 (4);
    infos[i].info = htobe16 (i % 2 ? NBD_INFO_DESCRIPTION : 4711);
    memcpy (infos[i].words, "hi", 2);
  }
  v.fd = accept4 (v.listener, NULL, NULL, SOCK_CLOEXEC);
  assert (v.fd >= 0);
  /* With so many bytes in the socket the client never reads all of them; only
   * root may do this.
   */
  (void)setsockopt (v.fd, SOL_SOCKET, SO_SNDBUFFORCE, &much, sizeof much);
  if (wire_transmit (v.fd, &greeting, sizeof greeting)
      && (!v.tls || secure (v.fd)))
    while (wire_transmit (v.fd, infos, sizeof infos))
      ;
  villain_hang_up (&v);
  return NULL;
}

static void *
connect_to_flood (void *opaque)
{
  struct waiting *w = opaque;
  struct conn *conn;

  assert (conn_open (flood_uri, 300, &conn) == -ETIMEDOUT);
  assert (strstr (last_error (), "no answer within 300 ms"));
  w->over = true;
  return NULL;
}

static void
test_handshake_without_end (void)
{
  for (unsigned tcp = 0; tcp < 2; tcp++) {
    struct waiting w = { .over = false };

    v.tcp = tcp;
    villain_listen (&v, flood_uri, sizeof flood_uri);
    assert (pthread_create (&v.thread, NULL, flood, NULL) == 0);
    assert (pthread_create (&w.thread, NULL, connect_to_flood, &w) == 0);
    assert_over (&w);
    pthread_join (v.thread, NULL);
    close (v.listener);
    if (!tcp)
      unlink (v.where);
  }
  v.tcp = false;
}

int
main (void)
{
  const char *transport = getenv ("NBDM_TRANSPORT");

  alarm (150); /* nothing here may hang */
  is_libnbd = transport && strcmp (transport, "libnbd") == 0;
  RUN (test_stops_reading);
  if (!getenv ("NBDM_TEST_TLS")) { /* they watch the bytes that leave */
    RUN (test_answered_thread_sends_for_no_other);
    RUN (test_crowd_keeps_no_thread);
  }
  RUN (test_handshake_without_end);
  return 0;
}
