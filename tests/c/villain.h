/* SPDX-License-Identifier: BSD-3-Clause */

/* A server that follows the protocol up to the end of the handshake, and from
 * there on does what the test says, byte by byte: its end of the socket is the
 * test's.  For tests of one connection, without a volume.
 */

#ifndef NBDM_VILLAIN_H
#define NBDM_VILLAIN_H

#include <arpa/inet.h>
#include <endian.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "wire/conn.h"
#include "wire/transport.h"
#include "test.h"
#include "nbd_wire.h"
#include "tls_relay.h"

#define VILLAIN_SIZE (64u << 20) /* bytes of the disk it says it has */

/* A thread that waits for something which must come. */
#define PATIENCE_MS 10000u

struct waiting {
  pthread_t thread;
  atomic_bool over;
};

static TEST_UNUSED void
assert_over (struct waiting *w)
{
  for (unsigned ms = 0; !w->over; ms++) {
    assert (ms < PATIENCE_MS);
    poll (NULL, 0, 1);
  }
  pthread_join (w->thread, NULL);
}

struct villain {
  bool tcp, tls; /* TLS: also of all, in run-one's "tls" */
  int room; /* bytes it takes before it reads them, or 0: as the kernel has it
             */
  uint64_t size; /* of its disk, or 0: VILLAIN_SIZE */
  int listener, fd;
  char where[108]; /* its address */
  pthread_t thread;
  struct conn *conn; /* the client's end */
};

static TEST_UNUSED void *
villain_greet (void *opaque)
{
  struct villain *v = opaque;

  v->fd = accept4 (v->listener, NULL, NULL, SOCK_CLOEXEC);
  assert (v->fd >= 0);
  assert (wire_handshake (v->fd, v->size ? v->size : VILLAIN_SIZE, false));
  return NULL;
}

static TEST_UNUSED void
villain_uri (struct villain *v, char *uri, size_t max)
{
  const char *scheme = "nbd", *user = "";
  int n;

  v->tls = v->tls || getenv ("NBDM_TEST_TLS");
  if (v->tls) {
    scheme = "nbds";
    user = TLS_RELAY_USER "@";
    tls_relay_secure_peers ();
  }
  n = v->tcp ? snprintf (uri, max, "%s://%s%s/?", scheme, user, v->where)
             : snprintf (uri, max, "%s+unix://%s/?socket=%s&", scheme, user,
                         v->where);
  if (v->tls)
    snprintf (uri + n, max - (size_t)n, "tls-psk-file=%s",
              tls_relay_psk_file ());
  else
    uri[n - 1] = '\0';
}

static TEST_UNUSED void
villain_listen (struct villain *v, char *uri, size_t max)
{
  struct sockaddr_in in
      = { .sin_family = AF_INET, .sin_addr.s_addr = htonl (INADDR_LOOPBACK) };
  struct sockaddr_un un = { .sun_family = AF_UNIX };
  socklen_t size = sizeof in;

  v->listener
      = socket (v->tcp ? AF_INET : AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  assert (v->listener >= 0);
  if (v->room > 0)
    assert (setsockopt (v->listener, SOL_SOCKET, SO_RCVBUF, &v->room,
                        sizeof v->room)
            == 0);
  if (v->tcp) {
    assert (bind (v->listener, (struct sockaddr *)&in, sizeof in) == 0);
    assert (getsockname (v->listener, (struct sockaddr *)&in, &size) == 0);
    snprintf (v->where, sizeof v->where, "127.0.0.1:%d", ntohs (in.sin_port));
  }
  else {
    snprintf (un.sun_path, sizeof un.sun_path, "/tmp/nbdm-villain.%d.%lx",
              getpid (), (unsigned long)pthread_self ());
    unlink (un.sun_path);
    assert (bind (v->listener, (struct sockaddr *)&un, sizeof un) == 0);
    snprintf (v->where, sizeof v->where, "%s", un.sun_path);
  }
  villain_uri (v, uri, max);
  assert (listen (v->listener, 1) == 0);
}

static TEST_UNUSED int
villain_attempt (struct villain *v)
{
  char uri[400];
  int rc;

  villain_listen (v, uri, sizeof uri);
  assert (pthread_create (&v->thread, NULL, villain_greet, v) == 0);
  rc = conn_open (uri, 10000, &v->conn);
  pthread_join (v->thread, NULL);
  close (v->listener);
  if (!v->tcp)
    unlink (v->where);
  return rc;
}

/* v->conn and v->fd are the two ends when this returns. */
static TEST_UNUSED void
villain_connect (struct villain *v)
{
  assert (villain_attempt (v) == 0);
}

static TEST_UNUSED void
villain_hang_up (struct villain *v)
{
  if (v->fd >= 0)
    close (v->fd);
  v->fd = -1;
}

static TEST_UNUSED void
villain_end (struct villain *v)
{
  conn_kill (v->conn, "the end of the test");
  for (int i = 0; i < 3; i++)
    conn_tick (v->conn, 1000, 0);
  conn_put (v->conn);
  villain_hang_up (v);
}

/* The next request's header; its payload is still to be read. */
static TEST_UNUSED struct wire_request
villain_request (struct villain *v)
{
  struct wire_request request;

  assert (wire_receive (v->fd, &request, sizeof request));
  assert (request.magic == htobe32 (REQUEST_MAGIC));
  return request;
}

static TEST_UNUSED void
villain_reply (struct villain *v, uint64_t cookie, uint32_t error)
{
  const struct wire_reply reply = { .magic = htobe32 (REPLY_MAGIC),
                                    .error = htobe32 (error),
                                    .cookie = cookie };

  assert (wire_transmit (v->fd, &reply, sizeof reply));
}

/* A command, what it needs and its waiter, in memory of their own: so that the
 * sanitizer sees a thread that touches them once they are gone.
 */
struct errand {
  struct command cmd;
  struct waiter waiter;
  uint8_t data[];
};

static TEST_UNUSED struct errand *
errand_make (enum command_kind kind, uint64_t length)
{
  bool data = kind == COMMAND_READ || kind == COMMAND_WRITE;
  struct errand *e = calloc (1, sizeof *e + (data ? length : 0));

  assert (e);
  e->cmd.kind = kind;
  e->cmd.length = kind == COMMAND_FLUSH ? 0 : length;
  e->cmd.buf = data ? e->data : NULL;
  return e;
}

static TEST_UNUSED bool
errand_done (struct villain *v, const struct errand *e)
{
  return conn_answered_all (v->conn, &e->waiter);
}

#endif /* NBDM_VILLAIN_H */
