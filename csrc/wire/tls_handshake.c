/* SPDX-License-Identifier: BSD-3-Clause */

/* The handshake of TLS, of a server and of a client.
 *
 * A certificate is checked within the handshake: by its issuer, its times, its
 * purpose, and at a client by the name of the server.  One CA signs the
 * certificates of both sides, so without the purpose each client could answer
 * in the place of a server, and take its data.  A certificate without any
 * purpose has all of them (RFC 5280).  With a shared key both sides prove that
 * they have it.  The time is limited as a whole, so a side that sends a byte
 * now and then gains nothing.
 *
 * A server reads the files of its certificates for each handshake, so a renewed
 * certificate and a removed CA count at once.  That costs little beside the
 * handshake's own arithmetic.
 *
 * In TLS 1.3 a client is done before the server has checked it: it learns of a
 * refusal from the first bytes that it receives.
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <gnutls/gnutls.h>
#include <gnutls/x509.h>

#include "base/clock.h"
#include "base/error.h"
#include "wire/stream.h"
#include "wire/tls.h"
#include "wire/tls_identity.h"
#include "wire/tls_secrets.h"
#include "wire/tls_stream.h"

/* The peer's certificate was refused: GnuTLS's words for it. */
static int
explain_certificate (gnutls_session_t session)
{
  unsigned status = gnutls_session_get_verify_cert_status (session);
  gnutls_datum_t words = { NULL, 0 };
  int rc;

  if (gnutls_certificate_verification_status_print (status, GNUTLS_CRT_X509,
                                                    &words, 0)
      < 0)
    return set_message (-EACCES, "TLS: the other side's certificate is wrong");
  rc = set_message (-EACCES, "TLS: the other side's certificate: %s",
                    (const char *)words.data);
  gnutls_free (words.data);
  return rc;
}

static int
another_key (const char *words)
{
  return set_message (-EACCES,
                      "TLS: the other side has another key, or none: copy the "
                      "key's file from one side to the other (%s)",
                      words);
}

static bool
has_own_key (gnutls_session_t session)
{
  const struct tls_secrets *secrets = gnutls_session_get_ptr (session);

  return secrets->own_psk != NULL;
}

/* A server whose key does not fit the client's greeting sends one of these. */
static bool
is_alert_of_key (gnutls_session_t session)
{
  gnutls_alert_description_t alert = gnutls_alert_get (session);

  return alert == GNUTLS_A_ILLEGAL_PARAMETER || alert == GNUTLS_A_DECRYPT_ERROR
         || alert == GNUTLS_A_UNKNOWN_PSK_IDENTITY;
}

/* `lookup` is the message of the look-up of a shared key, if that failed. */
static int
explain (gnutls_session_t session, int rc, const char *lookup)
{
  switch (rc) {
  case GNUTLS_E_SRP_PWD_ERROR: /* in spite of its name of PSK too */
    return set_message (-EACCES, "%s", lookup);
  case GNUTLS_E_CERTIFICATE_VERIFICATION_ERROR:
    return explain_certificate (session);
  case GNUTLS_E_FATAL_ALERT_RECEIVED:
    if (has_own_key (session) && is_alert_of_key (session))
      return another_key (tls_alert_name (session));
    return set_message (-EACCES, "TLS: the other side refuses: %s",
                        tls_alert_name (session));
  case GNUTLS_E_CERTIFICATE_REQUIRED:
  case GNUTLS_E_NO_CERTIFICATE_FOUND:
    return set_message (-EACCES, "TLS: the other side has no certificate");
  case GNUTLS_E_DECRYPTION_FAILED:
  case GNUTLS_E_RECEIVED_ILLEGAL_PARAMETER:
    return another_key (gnutls_strerror (rc));
  default:
    return set_message (-EACCES, "TLS: %s", gnutls_strerror (rc));
  }
}

/* Wait for the socket until a time.  -ETIMEDOUT. */
static int
await (int fd, short events, uint64_t until_ns)
{
  struct pollfd pfd = { .fd = fd, .events = events };
  uint64_t now = now_ns ();
  int n = 0;

  if (now < until_ns)
    n = poll (&pfd, 1, (int)((until_ns - now) / NS_PER_MS) + 1);
  if (n < 0 && errno != EINTR)
    return set_error (-errno, "TLS: the handshake");
  return now < until_ns ? 0
                        : set_message (-ETIMEDOUT, "TLS: the handshake took "
                                                   "too long");
}

static int
drain_all (struct stream *stream, uint64_t until_ns)
{
  int rc = 0;

  while (rc == 0 && tls_drain (stream) < 0) {
    if (errno != EAGAIN && errno != EINTR)
      return set_error (-errno, "TLS: the handshake");
    rc = await (stream->fd, POLLOUT, until_ns);
  }
  return rc;
}

static int
fill_some (struct stream *stream, uint64_t until_ns)
{
  int rc = await (stream->fd, POLLIN, until_ns);
  ssize_t n;

  if (rc < 0)
    return rc;
  n = tls_fill (stream);
  if (n == 0)
    return set_message (-ECONNRESET, "TLS: the other side left during the "
                                     "handshake");
  if (n < 0 && errno != EAGAIN && errno != EINTR)
    return set_error (-errno, "TLS: the handshake");
  return 0;
}

/* Tell the other side, if it is still there, and the caller. */
static int
refuse (struct stream *stream, int found, uint64_t until_ns)
{
  gnutls_session_t session = tls_session (stream);
  char lookup[512];

  snprintf (lookup, sizeof lookup, "%s", last_error ());
  (void)gnutls_alert_send_appropriate (session, found);
  (void)drain_all (stream, until_ns);
  return explain (session, found, lookup);
}

static int
shake_hands (struct stream *stream, uint64_t until_ns)
{
  gnutls_session_t session = tls_session (stream);
  int rc, found;

  do {
    found = gnutls_handshake (session);
    if (found < 0 && gnutls_error_is_fatal (found))
      return refuse (stream, found, until_ns);
    rc = drain_all (stream, until_ns);
    if (rc == 0 && found < 0 && !tls_has_received (stream))
      rc = fill_some (stream, until_ns);
  } while (rc == 0 && found < 0);
  return rc;
}

/* A text that GnuTLS checks the other side's certificate by; it copies none. */
static gnutls_typed_vdata_st
must_have (gnutls_vdata_types_t type, const char *text)
{
  return (gnutls_typed_vdata_st){ .type = type,
                                  .data = (unsigned char *)(uintptr_t)text };
}

static int
use_secrets (gnutls_session_t session, const struct tls_secrets *secrets)
{
  int rc = gnutls_priority_set (session, secrets->priority);

  gnutls_session_set_ptr (session, (void *)(uintptr_t)secrets);
  if (rc == 0 && secrets->psk)
    rc = gnutls_credentials_set (session, GNUTLS_CRD_PSK, secrets->psk);
  if (rc == 0 && secrets->own_psk)
    rc = gnutls_credentials_set (session, GNUTLS_CRD_PSK, secrets->own_psk);
  if (rc == 0 && secrets->x509)
    rc = gnutls_credentials_set (session, GNUTLS_CRD_CERTIFICATE,
                                 secrets->x509);
  if (secrets->checks_client)
    gnutls_certificate_server_set_request (session, GNUTLS_CERT_REQUIRE);
  return rc < 0 ? set_message (-EINVAL, "TLS: %s", gnutls_strerror (rc)) : 0;
}

/* A file that cannot be used turns the other side away, as a wrong one does. */
static int
renew (struct stream *stream, const struct tls_secrets **secrets)
{
  struct tls_secrets *fresh;
  char why[512];

  if ((*secrets)->certificate == NULL)
    return 0;
  if (tls_secrets_renew (*secrets, &fresh) < 0) {
    snprintf (why, sizeof why, "%s", last_error ());
    return set_message (-EACCES, "%s", why);
  }
  tls_keep (stream, fresh);
  *secrets = fresh;
  return 0;
}

static int
begin (struct stream *stream, const struct tls_secrets *secrets, unsigned flags)
{
  int rc = tls_begin (stream, flags);

  if (rc < 0)
    return rc;
  rc = renew (stream, &secrets);
  if (rc == 0)
    rc = use_secrets (tls_session (stream), secrets);
  if (rc < 0)
    stream_end (stream);
  return rc;
}

/* `nr` texts to check a certificate by; 0: there is none to check. */
static int
finish (struct stream *stream, gnutls_typed_vdata_st *checks, unsigned nr,
        uint64_t until_ns)
{
  int rc;

  if (nr > 0)
    gnutls_session_set_verify_cert2 (tls_session (stream), checks, nr, 0);
  rc = shake_hands (stream, until_ns);
  if (rc < 0)
    stream_end (stream);
  else if (nr > 0) /* GnuTLS kept them, and they are the caller's */
    gnutls_session_set_verify_cert2 (tls_session (stream), NULL, 0, 0);
  return rc;
}

int
tls_accept (struct stream *stream, const struct tls_secrets *secrets,
            uint64_t until_ns)
{
  gnutls_typed_vdata_st checks[]
      = { must_have (GNUTLS_DT_KEY_PURPOSE_OID, GNUTLS_KP_TLS_WWW_CLIENT) };
  int rc = begin (stream, secrets, GNUTLS_SERVER);

  return rc < 0 ? rc
                : finish (stream, checks, secrets->checks_client ? 1 : 0,
                          until_ns);
}

/* A name that is no address, for servers with several certificates. */
static bool
is_name (const char *host)
{
  struct in6_addr ignored;

  return inet_pton (AF_INET, host, &ignored) != 1
         && inet_pton (AF_INET6, host, &ignored) != 1;
}

/* Before a byte of ours leaves. */
static int
check_node (struct stream *stream, const char *host, const char *node)
{
  const char *const names[] = { node, host };
  char has[256];

  if (tls_is_of (stream, names, host ? 2 : 1))
    return 0;
  tls_describe (stream, has, sizeof has);
  stream_end (stream);
  return set_message (
      -EACCES,
      "TLS: the other side's certificate is not of node %s: its "
      "names are: %s",
      node, has[0] ? has : "none");
}

int
tls_connect (struct stream *stream, const struct tls_secrets *secrets,
             const char *host, const char *node, uint64_t until_ns)
{
  gnutls_typed_vdata_st checks[]
      = { must_have (GNUTLS_DT_KEY_PURPOSE_OID, GNUTLS_KP_TLS_WWW_SERVER),
          must_have (GNUTLS_DT_DNS_HOSTNAME, host) };
  unsigned nr = secrets->x509 == NULL ? 0 : host && node == NULL ? 2 : 1;
  int rc = begin (stream, secrets, GNUTLS_CLIENT);

  if (rc < 0)
    return rc;
  if (host && is_name (host))
    rc = gnutls_server_name_set (tls_session (stream), GNUTLS_NAME_DNS, host,
                                 strlen (host));
  if (rc < 0) {
    stream_end (stream);
    return set_message (-EINVAL, "TLS: %s: %s", host, gnutls_strerror (rc));
  }
  rc = finish (stream, checks, nr, until_ns);
  return rc == 0 && node && secrets->x509 ? check_node (stream, host, node)
                                          : rc;
}
