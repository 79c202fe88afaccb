/* SPDX-License-Identifier: BSD-3-Clause */

/* A relay between a plain socket and TLS, for the tests' clients.
 *
 * It uses GnuTLS in the usual way, with GnuTLS's own reads and writes of the
 * socket, so it shares nothing with csrc/wire/tls.c.
 */

#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>

#include <gnutls/gnutls.h>

#include "test.h"
#include "nbd_wire.h"
#include "tls_relay.h"

#define CARRIED 16384u
#define BABBLE_MS 20
#define BABBLE_BYTES 4096u

/* One direction: bytes that were taken in and have not all gone out. */
struct load {
  char bytes[CARRIED];
  size_t start, end;
  bool over; /* nothing more is taken in */
};

struct relay {
  int plain, secure;
  gnutls_session_t session;
  gnutls_psk_client_credentials_t psk;
  gnutls_psk_server_credentials_t server_psk;
  struct load up, down; /* to the server, and from it */
  bool up_closed;       /* close_notify was sent, or cannot be */
  unsigned update_ms;
  struct timespec updated;
  bool updating; /* new keys have gone out in part */
};

atomic_bool tls_relay_babbles;
static char psk_file[64];

static void
make_psk_file (void)
{
  static const char text[] = TLS_RELAY_USER ":" TLS_RELAY_KEY "\n";
  int fd = memfd_create ("psk", MFD_CLOEXEC);

  assert (fd >= 0 && fchmod (fd, 0600) == 0);
  assert (write (fd, text, sizeof text - 1) == (ssize_t)sizeof text - 1);
  snprintf (psk_file, sizeof psk_file, "/proc/self/fd/%d", fd);
}

const char *
tls_relay_psk_file (void)
{
  static pthread_once_t once = PTHREAD_ONCE_INIT;

  pthread_once (&once, make_psk_file);
  return psk_file;
}

/* --- moving bytes ----------------------------------------------------------
 */

/* False: the socket of the client is gone. */
static bool
take_plain (struct relay *r)
{
  ssize_t n;

  if (r->up.end > 0 || r->up.over)
    return true;
  n = recv (r->plain, r->up.bytes, CARRIED, MSG_DONTWAIT);
  if (n > 0)
    r->up.end = (size_t)n;
  else if (n == 0)
    r->up.over = true;
  else
    return errno == EAGAIN || errno == EINTR;
  return true;
}

/* False: the server is gone. */
static bool
give_secure (struct relay *r)
{
  ssize_t n;

  if (r->updating) /* no other record comes between */
    return true;
  while (r->up.start < r->up.end) {
    n = gnutls_record_send (r->session, r->up.bytes + r->up.start,
                            r->up.end - r->up.start);
    if (n == GNUTLS_E_AGAIN || n == GNUTLS_E_INTERRUPTED)
      return true;
    if (n < 0)
      return false;
    r->up.start += (size_t)n;
  }
  r->up.start = r->up.end = 0;
  if (r->up.over && !r->up_closed) {
    int rc = gnutls_bye (r->session, GNUTLS_SHUT_WR);

    r->up_closed = rc != GNUTLS_E_AGAIN && rc != GNUTLS_E_INTERRUPTED;
  }
  return true;
}

static void
take_secure (struct relay *r)
{
  ssize_t n;

  if (r->down.end > 0 || r->down.over)
    return;
  do
    n = gnutls_record_recv (r->session, r->down.bytes, CARRIED);
  while (n == GNUTLS_E_INTERRUPTED);
  if (n > 0)
    r->down.end = (size_t)n;
  else if (n != GNUTLS_E_AGAIN)
    r->down.over = true;
}

/* False: the socket of the client is gone. */
static bool
give_plain (struct relay *r)
{
  while (r->down.start < r->down.end) {
    ssize_t n = send (r->plain, r->down.bytes + r->down.start,
                      r->down.end - r->down.start, MSG_DONTWAIT | MSG_NOSIGNAL);

    if (n < 0 && errno == EAGAIN)
      return true;
    if (n < 0)
      return false;
    r->down.start += (size_t)n;
  }
  r->down.start = r->down.end = 0;
  return !r->down.over;
}

static void
wait_for_either (struct relay *r)
{
  struct pollfd fds[] = { { .fd = r->plain }, { .fd = r->secure } };

  if (r->up.end == 0 && !r->up.over)
    fds[0].events |= POLLIN;
  if (r->down.end > 0)
    fds[0].events |= POLLOUT;
  if (r->updating || r->up.end > 0 || (r->up.over && !r->up_closed))
    fds[1].events |= POLLOUT;
  if (r->down.end == 0)
    fds[1].events |= POLLIN;
  if (fds[0].events == 0)
    fds[0].fd = -1; /* its end would be reported for ever */
  if (gnutls_record_check_pending (r->session) == 0 || r->down.end > 0)
    (void)poll (fds, 2, r->server_psk ? BABBLE_MS : -1);
}

/* Not in the middle of a record that has gone out in part. */
static void
babble (struct relay *r)
{
  if (r->server_psk && tls_relay_babbles && r->up.end == 0 && !r->up_closed)
    (void)gnutls_record_send2 (r->session, "", 0, BABBLE_BYTES, 0);
}

/* Not in the middle of a record that has gone out in part. */
static bool
is_time_for_update (const struct relay *r)
{
  struct timespec now;

  clock_gettime (CLOCK_MONOTONIC, &now);
  return r->update_ms > 0 && r->up.end == 0
         && (now.tv_sec - r->updated.tv_sec) * 1000
                    + (now.tv_nsec - r->updated.tv_nsec) / 1000000
                >= (long)r->update_ms;
}

/* A full socket must not keep this thread here: the server may read nothing
 * until its own bytes are taken in.  False: the server is gone.
 */
static bool
update_keys (struct relay *r)
{
  int rc;

  if (!r->updating && !is_time_for_update (r))
    return true;
  rc = gnutls_session_key_update (r->session, GNUTLS_KU_PEER);
  r->updating = rc == GNUTLS_E_AGAIN || rc == GNUTLS_E_INTERRUPTED;
  clock_gettime (CLOCK_MONOTONIC, &r->updated);
  return rc == 0 || r->updating;
}

static void
relay_free (struct relay *r)
{
  gnutls_deinit (r->session);
  if (r->psk)
    gnutls_psk_free_client_credentials (r->psk);
  if (r->server_psk)
    gnutls_psk_free_server_credentials (r->server_psk);
  close (r->plain);
  close (r->secure);
  free (r);
}

static void *
carry (void *opaque)
{
  struct relay *r = opaque;

  while (take_plain (r) && give_secure (r) && update_keys (r)) {
    babble (r);
    take_secure (r);
    if (!give_plain (r))
      break;
    wait_for_either (r);
  }
  relay_free (r);
  return NULL;
}

/* --- coming ----------------------------------------------------------------
 */

static void
use_key (struct relay *r, const struct tls_options *o)
{
  const char *user = o->user ? o->user : TLS_RELAY_USER;
  const char *hex = o->key ? o->key : TLS_RELAY_KEY;
  const gnutls_datum_t key
      = { (unsigned char *)(uintptr_t)hex, (unsigned)strlen (hex) };

  assert (gnutls_psk_allocate_client_credentials (&r->psk) == 0);
  if (user[0] == '\0')
    return;
  assert (
      gnutls_psk_set_client_credentials (r->psk, user, &key, GNUTLS_PSK_KEY_HEX)
      == 0);
  assert (gnutls_credentials_set (r->session, GNUTLS_CRD_PSK, r->psk) == 0);
}

static bool
finish (struct relay *r)
{
  int rc;

  gnutls_transport_set_int (r->session, r->secure);
  do
    rc = gnutls_handshake (r->session);
  while (rc < 0 && !gnutls_error_is_fatal (rc));
  if (rc < 0)
    fprintf (stderr, "the handshake of TLS: %s\n", gnutls_strerror (rc));
  return rc == 0;
}

static bool
shake_hands (struct relay *r, const struct tls_options *o)
{
  const char *priority = o->priority ? o->priority : "NORMAL:+ECDHE-PSK";

  assert (gnutls_init (&r->session, GNUTLS_CLIENT | GNUTLS_NO_SIGNAL) == 0);
  assert (gnutls_priority_set_direct (r->session, priority, NULL) == 0);
  use_key (r, o);
  if (o->max_record)
    assert (gnutls_record_set_max_recv_size (r->session, o->max_record) == 0);
  return finish (r);
}

static bool
shake_hands_as_server (struct relay *r)
{
  assert (gnutls_init (&r->session, GNUTLS_SERVER | GNUTLS_NO_SIGNAL) == 0);
  assert (gnutls_priority_set_direct (r->session, "NORMAL:+ECDHE-PSK", NULL)
          == 0);
  assert (gnutls_psk_allocate_server_credentials (&r->server_psk) == 0);
  assert (gnutls_psk_set_server_credentials_file (r->server_psk,
                                                  tls_relay_psk_file ())
          == 0);
  assert (gnutls_credentials_set (r->session, GNUTLS_CRD_PSK, r->server_psk)
          == 0);
  return finish (r);
}

int
tls_relay (int fd)
{
  const struct tls_options usual = { 0 };
  int plain = tls_relay_with (fd, &usual);

  assert (plain >= 0);
  return plain;
}

static void
begin_carrying (struct relay *r)
{
  pthread_t thread;

  assert (fcntl (r->secure, F_SETFL, fcntl (r->secure, F_GETFL) | O_NONBLOCK)
          == 0);
  assert (pthread_create (&thread, NULL, carry, r) == 0);
  pthread_detach (thread);
}

/* Returns the plain end for the user of `fd`. */
static struct relay *
relay_new (int fd, int *plain)
{
  struct relay *r = calloc (1, sizeof *r);
  int pair[2];

  assert (r);
  assert (socketpair (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
  r->secure = fd;
  r->plain = pair[0];
  *plain = pair[1];
  clock_gettime (CLOCK_MONOTONIC, &r->updated);
  return r;
}

int
tls_relay_with (int fd, const struct tls_options *options)
{
  int plain;
  struct relay *r = relay_new (fd, &plain);

  r->update_ms = options->update_ms;
  if (!shake_hands (r, options)) {
    close (plain);
    relay_free (r);
    return -1;
  }
  begin_carrying (r);
  return plain;
}

/* A server's: its descriptor becomes the plain end, as others use its number.
 */
static void
secure_peer (int fd)
{
  /* The thread sanitizer knows the ordering of dup, not of fcntl's dup. */
  int plain, real = dup (fd);
  struct relay *r = relay_new (real, &plain);

  assert (real >= 0 && dup3 (plain, fd, O_CLOEXEC) == fd);
  close (plain);
  if (shake_hands_as_server (r))
    begin_carrying (r);
  else
    relay_free (r); /* `fd` reads the end */
}

void
tls_relay_secure_peers (void)
{
  wire_secure = secure_peer;
}

void
peer_uri (char *uri, size_t size, const char *socket)
{
  int n;

  if (getenv ("NBDM_TEST_TLS")) {
    tls_relay_secure_peers ();
    n = snprintf (uri, size, "nbds+unix://%s@/?socket=%s&tls-psk-file=%s",
                  TLS_RELAY_USER, socket, tls_relay_psk_file ());
  }
  else
    n = snprintf (uri, size, "nbd+unix:///?socket=%s", socket);
  assert (n > 0 && (size_t)n < size);
}
