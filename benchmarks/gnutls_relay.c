/* SPDX-License-Identifier: BSD-3-Clause */

/* A bare relay over TLS, to compare our TLS with: GnuTLS in its usual way, with
 * its own reads and writes, and nothing of NBD.
 *
 *   gnutls_relay client|server LISTEN CONNECT PSK-FILE
 *
 * An address is a path, or a TCP port of 127.0.0.1.  A client has TLS where it
 * connects, a server where it listens.
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <gnutls/gnutls.h>

#define CARRIED (256u << 10)
#define PRIORITY                                                               \
  "NORMAL:-VERS-ALL:+VERS-TLS1.3:-CIPHER-ALL:+AES-128-GCM:+ECDHE-PSK"

struct relay {
  gnutls_session_t session;
  int plain, secure;
};

static bool is_client;
static const char *to, *psk_file;

static void
fail (const char *what)
{
  perror (what);
  exit (1);
}

/* A socket, and its address. */
static int
make_socket (const char *text, struct sockaddr_storage *address,
             socklen_t *size)
{
  struct sockaddr_un *un = (void *)address;
  struct sockaddr_in *in = (void *)address;
  const int on = 1;
  int fd;

  memset (address, 0, sizeof *address);
  if (text[0] == '/') {
    un->sun_family = AF_UNIX;
    snprintf (un->sun_path, sizeof un->sun_path, "%s", text);
    *size = sizeof *un;
    return socket (AF_UNIX, SOCK_STREAM, 0);
  }
  in->sin_family = AF_INET;
  in->sin_addr.s_addr = htonl (INADDR_LOOPBACK);
  in->sin_port = htons ((uint16_t)atoi (text));
  *size = sizeof *in;
  fd = socket (AF_INET, SOCK_STREAM, 0);
  (void)setsockopt (fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  (void)setsockopt (fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  return fd;
}

static int
listen_on (const char *text)
{
  struct sockaddr_storage address;
  socklen_t size;
  int fd = make_socket (text, &address, &size);

  if (bind (fd, (struct sockaddr *)&address, size) < 0 || listen (fd, 8) < 0)
    fail (text);
  return fd;
}

static int
connect_to (const char *text)
{
  struct sockaddr_storage address;
  socklen_t size;
  int fd = make_socket (text, &address, &size);

  if (connect (fd, (struct sockaddr *)&address, size) < 0)
    fail (text);
  return fd;
}

/* --- TLS ------------------------------------------------------------------ */

static void
use_key (gnutls_session_t session)
{
  char user[64], hex[129];
  gnutls_psk_client_credentials_t ours;
  gnutls_psk_server_credentials_t theirs;
  gnutls_datum_t key = { (unsigned char *)hex, 0 };
  FILE *file = fopen (psk_file, "re");

  if (!file || fscanf (file, "%63[^:]:%128s", user, hex) != 2)
    fail (psk_file);
  fclose (file);
  key.size = (unsigned)strlen (hex);
  if (is_client) {
    gnutls_psk_allocate_client_credentials (&ours);
    gnutls_psk_set_client_credentials (ours, user, &key, GNUTLS_PSK_KEY_HEX);
    gnutls_credentials_set (session, GNUTLS_CRD_PSK, ours);
    return;
  }
  gnutls_psk_allocate_server_credentials (&theirs);
  gnutls_psk_set_server_credentials_file (theirs, psk_file);
  gnutls_credentials_set (session, GNUTLS_CRD_PSK, theirs);
}

static bool
shake_hands (struct relay *r)
{
  int rc;

  gnutls_init (&r->session, (is_client ? GNUTLS_CLIENT : GNUTLS_SERVER)
                                | GNUTLS_NO_SIGNAL | GNUTLS_NO_TICKETS);
  gnutls_priority_set_direct (r->session, PRIORITY, NULL);
  use_key (r->session);
  gnutls_transport_set_int (r->session, r->secure);
  do
    rc = gnutls_handshake (r->session);
  while (rc < 0 && !gnutls_error_is_fatal (rc));
  if (rc < 0)
    fprintf (stderr, "the handshake: %s\n", gnutls_strerror (rc));
  return rc == 0;
}

/* --- Carrying ------------------------------------------------------------- */

static void
end (struct relay *r)
{
  (void)shutdown (r->plain, SHUT_RDWR);
  (void)shutdown (r->secure, SHUT_RDWR);
}

static void *
seal (void *opaque)
{
  struct relay *r = opaque;
  char *buf = malloc (CARRIED);
  ssize_t n;

  while (buf && (n = recv (r->plain, buf, CARRIED, 0)) > 0)
    for (ssize_t done = 0, sent; done < n; done += sent) {
      sent = gnutls_record_send (r->session, buf + done, (size_t)(n - done));
      if (sent < 0)
        goto out;
    }
out:
  end (r);
  free (buf);
  return NULL;
}

static void
open_all (struct relay *r)
{
  static _Thread_local char buf[16384];
  ssize_t n;

  while ((n = gnutls_record_recv (r->session, buf, sizeof buf)) > 0)
    for (ssize_t done = 0, sent; done < n; done += sent) {
      sent = send (r->plain, buf + done, (size_t)(n - done), MSG_NOSIGNAL);
      if (sent < 0)
        return;
    }
}

/* It lasts as long as the process: a benchmark has a few connections. */
static void *
carry (void *opaque)
{
  struct relay *r = calloc (1, sizeof *r);
  int taken = (int)(intptr_t)opaque, other = connect_to (to);
  pthread_t thread;

  r->plain = is_client ? taken : other;
  r->secure = is_client ? other : taken;
  if (shake_hands (r) && pthread_create (&thread, NULL, seal, r) == 0) {
    open_all (r);
    end (r);
    pthread_join (thread, NULL);
  }
  close (r->plain);
  close (r->secure);
  return NULL;
}

int
main (int argc, char *argv[])
{
  const int on = 1;
  int listener;

  if (argc != 5)
    return 2;
  is_client = strcmp (argv[1], "client") == 0;
  to = argv[3];
  psk_file = argv[4];
  listener = listen_on (argv[2]);
  for (;;) {
    int fd = accept (listener, NULL, NULL);
    pthread_t thread;

    if (fd < 0)
      fail ("accept");
    (void)setsockopt (fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (pthread_create (&thread, NULL, carry, (void *)(intptr_t)fd) == 0)
      pthread_detach (thread);
  }
}
