/* SPDX-License-Identifier: BSD-3-Clause */

/* How one side of TLS proves its identity, and how it checks the other.  See
 * tls_secrets.c.
 */

#ifndef NBDM_TLS_SECRETS_H
#define NBDM_TLS_SECRETS_H

#include <stdbool.h>

#include <gnutls/gnutls.h>

struct nbd_uri;
struct nbdm_tls;

/* Read-only once loaded: all sessions share it.  A session's pointer
 * (gnutls_session_set_ptr) must be its secrets.
 */
struct tls_secrets {
  gnutls_psk_server_credentials_t psk;     /* a server's, or NULL */
  char *psk_file;                          /* of a server's PSK, or NULL */
  char *certificate, *private_key, *ca;    /* files of a server's; or NULL */
  gnutls_psk_client_credentials_t own_psk; /* a client's, or NULL */
  gnutls_certificate_credentials_t x509;   /* or NULL */
  bool checks_client; /* its certificate; a PSK always proves the client */
  gnutls_priority_t priority;
};

/* Load a server's.  -errno with a message that names the file. */
int tls_secrets_load (const struct nbdm_tls *files, struct tls_secrets **out);
/* Load a server's certificates once more, as the files are now. */
int tls_secrets_renew (const struct tls_secrets *secrets,
                       struct tls_secrets **out);
/* Load those that a URI names for a client, or libnbd's usual ones. */
int tls_secrets_of_uri (const struct nbd_uri *uri, struct tls_secrets **out);
void tls_secrets_free (struct tls_secrets *secrets); /* or NULL */

#endif /* NBDM_TLS_SECRETS_H */
