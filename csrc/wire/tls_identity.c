/* SPDX-License-Identifier: BSD-3-Clause */

/* Whose certificate it is: that of the other side, and our own.
 *
 * The handshake proves that a CA of ours has signed a certificate.  The same CA
 * may have signed those of clients and of other hosts.  So nodes also compare
 * names: the certificate of a node has, as a subjectAltName, the node's name or
 * the host of its `address`.  Both come from the configuration, which is the
 * operator's word for which host a node is.  Wildcards do not count, because
 * one of them would make every node any other one.
 *
 * A node is client and server, so its certificate needs both purposes.  A start
 * checks the node's own certificate as the other nodes will: a wrong one is
 * found before the node is needed.
 */

#include <arpa/inet.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <gnutls/gnutls.h>
#include <gnutls/x509.h>

#include "api.h"
#include "base/error.h"
#include "wire/stream.h"
#include "wire/tls_identity.h"
#include "wire/tls_secrets.h"
#include "wire/tls_stream.h"

#define MOST_NAME 256u /* bytes; names of DNS are shorter */
#define TIMES (GNUTLS_CERT_EXPIRED | GNUTLS_CERT_NOT_ACTIVATED)

/* Has it a name for DNS among its subjectAltNames?  One that is too long ends
 * the search, here and in GnuTLS.
 */
static bool
has_dns_name (gnutls_x509_crt_t certificate)
{
  char name[MOST_NAME];
  int type = GNUTLS_SAN_OTHERNAME;

  for (unsigned i = 0; type >= 0 && type != GNUTLS_SAN_DNSNAME; i++) {
    size_t length = sizeof name;

    type = gnutls_x509_crt_get_subject_alt_name (certificate, i, name, &length,
                                                 NULL);
  }
  return type == GNUTLS_SAN_DNSNAME;
}

static bool
has_address (gnutls_x509_crt_t certificate, const char *text)
{
  unsigned char bytes[sizeof (struct in6_addr)];
  unsigned size = inet_pton (AF_INET, text, bytes) == 1 ? 4 : sizeof bytes;

  if (size == sizeof bytes && inet_pton (AF_INET6, text, bytes) != 1)
    return false;
  return gnutls_x509_crt_check_ip (certificate, bytes, size, 0) != 0;
}

/* GnuTLS compares the subject's common name too if there is no name for DNS. A
 * CA may give any client a common name.
 */
static bool
has_name (gnutls_x509_crt_t certificate, const char *const *names, size_t nr)
{
  bool dns = has_dns_name (certificate);

  for (size_t i = 0; i < nr; i++)
    if (has_address (certificate, names[i])
        || (dns
            && gnutls_x509_crt_check_hostname2 (
                certificate, names[i], GNUTLS_VERIFY_DO_NOT_ALLOW_WILDCARDS)))
      return true;
  return false;
}

/* The other side's certificate, to free; NULL: it has none. */
static gnutls_x509_crt_t
other_certificate (const struct stream *stream)
{
  const gnutls_datum_t *chain = NULL;
  gnutls_x509_crt_t certificate;
  unsigned nr = 0;

  if (stream->tls)
    chain = gnutls_certificate_get_peers (tls_session (stream), &nr);
  if (chain == NULL || nr == 0 || gnutls_x509_crt_init (&certificate) < 0)
    return NULL;
  if (gnutls_x509_crt_import (certificate, &chain[0], GNUTLS_X509_FMT_DER) == 0)
    return certificate;
  gnutls_x509_crt_deinit (certificate);
  return NULL;
}

bool
tls_is_of (const struct stream *stream, const char *const *names, size_t nr)
{
  gnutls_x509_crt_t certificate = other_certificate (stream);
  bool is = certificate && has_name (certificate, names, nr);

  if (certificate)
    gnutls_x509_crt_deinit (certificate);
  return is;
}

/* A name comes from the other side: only what can be printed is shown. */
static size_t
add_name (char *text, size_t size, size_t end, const char *name, size_t length)
{
  int n = snprintf (text + end, size - end, "%s%.*s", end > 0 ? ", " : "",
                    (int)length, name);

  for (char *at = text + end; *at; at++)
    if ((unsigned char)*at < ' ' || (unsigned char)*at > '~')
      *at = '?';
  return n < 0 ? end : end + strlen (text + end);
}

static void
list_names (gnutls_x509_crt_t certificate, char *text, size_t size)
{
  char name[MOST_NAME];
  size_t end = 0;

  text[0] = '\0';
  for (unsigned i = 0; end + 1 < size; i++) {
    size_t length = sizeof name;
    int type = gnutls_x509_crt_get_subject_alt_name (certificate, i, name,
                                                     &length, NULL);

    if (type == GNUTLS_E_REQUESTED_DATA_NOT_AVAILABLE)
      break;
    if (type == GNUTLS_SAN_DNSNAME)
      end = add_name (text, size, end, name, length);
    else if (type == GNUTLS_SAN_IPADDRESS)
      end = add_name (text, size, end, "an address", 10);
  }
}

void
tls_describe (const struct stream *stream, char *text, size_t size)
{
  gnutls_x509_crt_t certificate = other_certificate (stream);

  text[0] = '\0';
  if (certificate == NULL)
    return;
  list_names (certificate, text, size);
  gnutls_x509_crt_deinit (certificate);
}

/* --- Our own ---------------------------------------------------------------
 */

static int
refuse_status (const char *path, const char *use, unsigned status)
{
  bool late = (status & ~(unsigned)GNUTLS_CERT_INVALID & ~TIMES) == 0;
  gnutls_datum_t words = { NULL, 0 };
  int rc = late ? -ETIME : -EACCES;

  if (gnutls_certificate_verification_status_print (status, GNUTLS_CRT_X509,
                                                    &words, 0)
      < 0)
    return set_message (rc, "%s: %s: it is wrong", path, use);
  rc = set_message (rc, "%s: %s: %s", path, use, (const char *)words.data);
  gnutls_free (words.data);
  return rc;
}

/* As the other nodes verify it, when they call and when they are called. */
static int
verify_own (gnutls_x509_trust_list_t trust, gnutls_x509_crt_t *chain,
            unsigned nr, const char *path)
{
  static const struct {
    const char *purpose, *use;
  } uses[] = { { GNUTLS_KP_TLS_WWW_CLIENT, "as a client's certificate" },
               { GNUTLS_KP_TLS_WWW_SERVER, "as a server's certificate" } };

  for (size_t i = 0; i < sizeof uses / sizeof *uses; i++) {
    gnutls_typed_vdata_st must
        = { .type = GNUTLS_DT_KEY_PURPOSE_OID,
            .data = (unsigned char *)(uintptr_t)uses[i].purpose };
    unsigned status = 0;

    if (gnutls_x509_trust_list_verify_crt2 (trust, chain, nr, &must, 1, 0,
                                            &status, NULL)
        < 0)
      return set_message (-EACCES, "%s: %s: it cannot be verified", path,
                          uses[i].use);
    if (status != 0)
      return refuse_status (path, uses[i].use, status);
  }
  return 0;
}

static int
check_chain (gnutls_x509_trust_list_t trust, gnutls_x509_crt_t *chain,
             unsigned nr, const char *path, const char *const *names,
             uint32_t nr_names)
{
  char has[512];

  if (has_name (chain[0], names, nr_names))
    return verify_own (trust, chain, nr, path);
  list_names (chain[0], has, sizeof has);
  return set_message (-EACCES,
                      "%s: the other nodes refuse it: it has not the name %s, "
                      "nor the address %s; its names are: %s",
                      path, names[0], names[nr_names - 1],
                      has[0] ? has : "none");
}

static void
free_chain (gnutls_x509_crt_t *chain, unsigned nr)
{
  for (unsigned i = 0; i < nr; i++)
    gnutls_x509_crt_deinit (chain[i]);
  gnutls_free (chain);
}

int
nbdm_tls_check (const struct nbdm_tls *files, const char *const *names,
                uint32_t nr_names)
{
  struct tls_secrets *secrets;
  gnutls_x509_trust_list_t trust;
  gnutls_x509_crt_t *chain = NULL;
  unsigned nr = 0;
  int rc = tls_secrets_load (files, &secrets);

  if (rc < 0)
    return rc;
  gnutls_certificate_get_trust_list (secrets->x509, &trust);
  if (gnutls_certificate_get_x509_crt (secrets->x509, 0, &chain, &nr) < 0)
    rc = set_error (-ENOMEM, "TLS");
  else
    rc = check_chain (trust, chain, nr, files->certificate, names, nr_names);
  free_chain (chain, nr);
  tls_secrets_free (secrets);
  return rc;
}
