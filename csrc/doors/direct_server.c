/* SPDX-License-Identifier: BSD-3-Clause */

/* The direct door: listens, and starts a thread for each client.
 *
 * Why a server of our own beside nbdkit: nbdkit gives each request a thread for
 * as long as it lasts.  A request that waits for a remote then costs two
 * wake-ups, more than all other work of a mirror: that halves the writes a
 * second (docs/performance.md).  The Python door has nbdkit's filters.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "api.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/lock.h"
#include "base/thread.h"
#include "doors/direct.h"
#include "doors/direct_clients.h"
#include "doors/direct_server.h"
#include "doors/direct_session.h"
#include "doors/export.h"
#include "doors/node_calls.h"
#include "doors/node_session.h"
#include "wire/receive.h"
#include "wire/tls.h"
#include "wire/tls_secrets.h"

#define STACK_BYTES (512u << 10)
#define ACCEPT_PAUSE_MS 100 /* without descriptors or memory for a client */

struct listener {
  int fd;                      /* the caller closes it */
  struct tls_secrets *secrets; /* NULL: without TLS */
  /* Under the server's lock. */
  uint32_t kind; /* enum nbdm_listener_kind */
  char text[NBDM_TEXT_LEN];
};

struct direct_server {
  struct exports exports;
  struct clients clients;
  struct listener listeners[NBDM_MAX_LISTENERS];
  uint32_t nr_listeners;
  pthread_mutex_t lock; /* of the listeners; none is taken under it */
  struct node_calls calls;
  int end_fd;           /* an eventfd: nbdm_server_end */
  atomic_bool hands_on; /* the sockets listen for the next program */
  uint64_t accepted;
};

/* --- The log ---------------------------------------------------------- */

void
direct_log (const struct session *s, const char *fmt, ...)
{
  char words[NBDM_REASON_LEN + 96];
  va_list args;
  int n = snprintf (words, sizeof words,
                    "client %llu: ", (unsigned long long)s->number);

  va_start (args, fmt);
  vsnprintf (words + n, sizeof words - (size_t)n, fmt, args);
  va_end (args);
  /* Any host may cause lines in the handshake, and must not keep those about
   * clients out of the log.
   */
  nbdm_log (atomic_load (&s->shaking_hands) ? NBDM_LOG_STRANGERS
                                            : NBDM_LOG_CLIENTS,
            "error", words);
}

/* --- Clients ---------------------------------------------------------- */

static void
session_free (struct session *s)
{
  lane_destroy (&s->lane);
  free (s->inbox);
  record_end (s);
  stream_end (&s->stream);
  close_socket (s->fd);
  pthread_mutex_destroy (&s->lock);
  free (s);
}

/* Notice within two minutes that a client's machine is gone, also if nothing is
 * sent to it.  On a unix socket these have no effect.
 */
static void
set_options (int fd)
{
  const int on = 1, idle_s = 60, step_s = 10, steps = 6;

  receive_prepare (fd);
  (void)setsockopt (fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  (void)setsockopt (fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
  (void)setsockopt (fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle_s, sizeof idle_s);
  (void)setsockopt (fd, IPPROTO_TCP, TCP_KEEPINTVL, &step_s, sizeof step_s);
  (void)setsockopt (fd, IPPROTO_TCP, TCP_KEEPCNT, &steps, sizeof steps);
}

static struct session *
session_new (struct direct_server *server, int fd,
             const struct listener *listener)
{
  struct session *s = calloc (1, sizeof *s);

  if (s == NULL) {
    close_socket (fd);
    return NULL;
  }
  s->server = server;
  s->fd = fd;
  s->stream = stream_plain (fd);
  s->secrets = listener->secrets;
  s->listener = (uint32_t)(listener - server->listeners);
  s->number = ++server->accepted;
  atomic_init (&s->shaking_hands, true);
  pthread_mutex_init (&s->lock, NULL);
  s->inbox = malloc (DIRECT_INBOX);
  s->fixed = DIRECT_INBOX + (s->secrets ? tls_bytes () : 0);
  set_options (fd);
  if (lane_init (&s->lane) == 0 && s->inbox)
    return s;
  session_free (s);
  return NULL;
}

static void *
session_main (void *opaque)
{
  struct session *s = opaque;
  struct clients *clients = s->clients;

  session_run (s);
  clients_remove (s);
  session_free (s);
  clients_removed (clients);
  return NULL;
}

static int
begin_session (struct direct_server *server, int fd,
               const struct listener *listener)
{
  struct session *s = session_new (server, fd, listener);
  int rc;

  if (s == NULL)
    return -ENOMEM;
  clients_add (&server->clients, s);
  rc = thread_start (session_main, s, STACK_BYTES);
  if (rc == 0)
    return 0;
  clients_remove (s);
  session_free (s);
  clients_removed (&server->clients);
  return rc;
}

/* False: no descriptor, memory or thread is left for a client.  A
 * handshake gives its own back; otherwise connections that send nothing would
 * keep all clients out.
 */
static bool
accept_one (struct direct_server *server, const struct listener *listener)
{
  int fd = accept4 (listener->fd, NULL, NULL, SOCK_CLOEXEC);

  if (fd < 0 && (errno == EAGAIN || errno == EINTR || errno == ECONNABORTED))
    return true;
  if (fd >= 0 && begin_session (server, fd, listener) == 0)
    return true;
  (void)clients_make_room (&server->clients);
  return false;
}

static void
accept_all (struct direct_server *server)
{
  struct pollfd fds[1 + NBDM_MAX_LISTENERS]
      = { { .fd = server->end_fd, .events = POLLIN } };

  for (uint32_t i = 0; i < server->nr_listeners; i++)
    fds[1 + i]
        = (struct pollfd){ .fd = server->listeners[i].fd, .events = POLLIN };
  while (!fds[0].revents) {
    bool now = true;

    if (poll (fds, 1 + server->nr_listeners, -1) <= 0)
      continue;
    for (uint32_t i = 0; i < server->nr_listeners; i++)
      if (fds[1 + i].revents && !fds[0].revents)
        now = accept_one (server, &server->listeners[i]) && now;
    if (!now)
      (void)poll (fds, 1, ACCEPT_PAUSE_MS);
  }
}

/* --- The API ---------------------------------------------------------- */

int
nbdm_server_open (struct nbdm *v, const int *listen_fds, uint32_t nr,
                  const struct nbdm_limits *limits, struct direct_server **out)
{
  struct direct_server *server = calloc (1, sizeof *server);
  int rc;

  if (server == NULL)
    return set_error (-ENOMEM, "the direct door");
  TAILQ_INIT (&server->exports);
  rc = exports_add (&server->exports, "", v, false);
  if (rc < 0) {
    free (server);
    return rc;
  }
  server->end_fd = eventfd (0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (server->end_fd < 0) {
    rc = set_error (-errno, "the direct door");
    exports_free (&server->exports);
    free (server);
    return rc;
  }
  /* A client that has disconnected again must not block us in accept. */
  for (uint32_t i = 0; i < nr && i < NBDM_MAX_LISTENERS; i++) {
    int flags = fcntl (listen_fds[i], F_GETFL);

    if (flags >= 0)
      (void)fcntl (listen_fds[i], F_SETFL, flags | O_NONBLOCK);
    receive_prepare (listen_fds[i]);
    server->listeners[server->nr_listeners++].fd = listen_fds[i];
  }
  pthread_mutex_init (&server->lock, NULL);
  node_calls_init (&server->calls, limits);
  clients_init (&server->clients, limits);
  *out = server;
  return 0;
}

int
nbdm_server_tls (struct direct_server *server, uint32_t listener,
                 const struct nbdm_tls *files)
{
  struct tls_secrets *secrets;
  int rc;

  if (listener >= server->nr_listeners)
    return set_message (-EINVAL, "TLS: there is no listener %u", listener);
  rc = tls_secrets_load (files, &secrets);
  if (rc < 0)
    return rc;
  tls_secrets_free (server->listeners[listener].secrets);
  server->listeners[listener].secrets = secrets;
  return 0;
}

int
nbdm_server_listener (struct direct_server *server, uint32_t listener,
                      uint32_t kind, const char *text)
{
  size_t size = text ? strlen (text) : 0;

  if (listener >= server->nr_listeners)
    return set_message (-EINVAL, "there is no listener %u", listener);
  if (kind > NBDM_CLOSED)
    return set_message (-EINVAL, "there is no kind %u of listeners", kind);
  if (size >= NBDM_TEXT_LEN)
    return set_message (-EINVAL, "a listener's text has %u bytes at most",
                        NBDM_TEXT_LEN - 1);
  LOCK_FOR_SCOPE (&server->lock);
  server->listeners[listener].kind = kind;
  memset (server->listeners[listener].text, 0, NBDM_TEXT_LEN);
  if (size > 0)
    memcpy (server->listeners[listener].text, text, size);
  return 0;
}

uint32_t
direct_listener (const struct session *s, char *text)
{
  const struct listener *listener = &s->server->listeners[s->listener];

  LOCK_FOR_SCOPE (&s->server->lock);
  if (text)
    memcpy (text, listener->text, NBDM_TEXT_LEN);
  return listener->kind;
}

struct node_calls *
direct_calls (struct direct_server *server)
{
  return &server->calls;
}

struct exports *
direct_exports (struct direct_server *server)
{
  return &server->exports;
}

uint32_t
nbdm_server_max_clients (const struct direct_server *server)
{
  return server->clients.max_admitted;
}

/* Take no more requests; answer those under way.  A client in the handshake has
 * none, and may not read an answer.  To all clients it looks like a lost
 * connection: those that reconnect send their unanswered requests again, to the
 * next server.
 */
static void
end_sessions (struct direct_server *server)
{
  if (!atomic_load (&server->hands_on))
    for (uint32_t i = 0; i < server->nr_listeners; i++)
      (void)shutdown (server->listeners[i].fd, SHUT_RDWR); /* clients fail */
  clients_disconnect (&server->clients);
}

int
nbdm_server_start (struct direct_server *server)
{
  int rc = exports_start (&server->exports);

  if (rc < 0)
    exports_end (&server->exports);
  return rc;
}

void
nbdm_server_run (struct direct_server *server)
{
  accept_all (server);
  end_sessions (server);
  exports_end (&server->exports);
  node_calls_over (&server->calls);
}

void
nbdm_server_hand_on (struct direct_server *server)
{
  atomic_store (&server->hands_on, true);
}

void
nbdm_server_end (struct direct_server *server)
{
  (void)eventfd_write (server->end_fd, 1);
}

int
nbdm_server_drain (struct direct_server *server, uint32_t timeout_ms)
{
  uint64_t until_ns = now_ns () + timeout_ms * NS_PER_MS;

  nbdm_server_end (server);
  return clients_wait_gone (&server->clients, until_ns);
}

void
nbdm_server_close (struct direct_server *server)
{
  close (server->end_fd);
  clients_destroy (&server->clients);
  node_calls_destroy (&server->calls);
  pthread_mutex_destroy (&server->lock);
  exports_free (&server->exports);
  for (uint32_t i = 0; i < server->nr_listeners; i++)
    tls_secrets_free (server->listeners[i].secrets);
  free (server);
}
