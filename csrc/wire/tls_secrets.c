/* SPDX-License-Identifier: BSD-3-Clause */

/* The files of TLS: a file of shared keys (PSK), or certificates of X.509.
 *
 * TLS 1.3 is the least and the only version: it has no renegotiation, and each
 * of its key exchanges is ephemeral.  So "PSK" alone, without Diffie-Hellman,
 * is not among them: a key that is stolen later opens no recorded connection.
 *
 * AES-128-GCM comes first, as processors have instructions for it.  A shared
 * key is bound to SHA-256, which leaves out AES-256-GCM, and GnuTLS's own order
 * would take ChaCha20 next: a sixth of the speed at 1 MiB.
 *
 * A server reads its file of shared keys at every handshake, and certificates
 * too (tls_handshake.c).  So a key or a CA that is removed opens no connection
 * any more, and a certificate that is renewed counts, without a restart;
 * connections that are open stay open.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "api.h"
#include "base/error.h"
#include "wire/nbd_uri.h"
#include "wire/secret_file.h"
#include "wire/tls_secrets.h"

#define CIPHERS "-CIPHER-ALL:+AES-128-GCM:+AES-256-GCM:+CHACHA20-POLY1305"
#define TLS13 "NORMAL:-VERS-ALL:+VERS-TLS1.3:" CIPHERS ":%SERVER_PRECEDENCE"
#define TLS13_PSK TLS13 ":-KX-ALL:+ECDHE-PSK:+DHE-PSK"

static int
bad_file (const char *path, const char *why)
{
  return set_message (-EINVAL, "TLS: %s: %s", path, why);
}

/* GnuTLS calls it within a server's handshake.  -1 with a message: the
 * handshake fails.  1: there is no such user; GnuTLS takes a random key, so
 * that clients cannot find out which users there are.
 */
static int
find_psk (gnutls_session_t session, const gnutls_datum_t *user,
          gnutls_datum_t *key)
{
  const struct tls_secrets *secrets = gnutls_session_get_ptr (session);
  struct psk psk;
  int rc = psk_read (secrets->psk_file, user, &psk);

  if (rc != 0)
    return rc < 0 ? -1 : rc;
  *key = psk.key;
  secret_file_free (&psk.text);
  return 0;
}

/* The key is read at each handshake; here a fault is found before a client
 * comes.
 */
static int
load_psk (struct tls_secrets *secrets, const char *path)
{
  struct psk psk;
  int rc = psk_read (path, NULL, &psk);

  if (rc != 0)
    return rc < 0 ? rc : bad_file (path, "it has no line NAME:KEY");
  psk_free (&psk);
  secrets->psk_file = strdup (path);
  if (secrets->psk_file == NULL
      || gnutls_psk_allocate_server_credentials (&secrets->psk) < 0)
    return set_error (-ENOMEM, "TLS");
  gnutls_psk_set_server_credentials_function2 (secrets->psk, find_psk);
  return 0;
}

static int
load_own (struct tls_secrets *secrets, const char *certificate, const char *key)
{
  gnutls_datum_t shown, secret;
  int rc = certificate_file_read (certificate, &shown);

  if (rc < 0)
    return rc;
  rc = secret_file_read (key, &secret);
  if (rc == 0) {
    rc = gnutls_certificate_set_x509_key_mem (secrets->x509, &shown, &secret,
                                              GNUTLS_X509_FMT_PEM);
    if (rc < 0)
      rc = set_message (-EINVAL, "TLS: %s and %s: %s", certificate, key,
                        gnutls_strerror (rc));
    secret_file_free (&secret);
  }
  secret_file_free (&shown);
  return rc < 0 ? rc : 0;
}

static int
load_trust (struct tls_secrets *secrets, const char *ca)
{
  gnutls_datum_t text;
  int rc = certificate_file_read (ca, &text);

  if (rc < 0)
    return rc;
  rc = gnutls_certificate_set_x509_trust_mem (secrets->x509, &text,
                                              GNUTLS_X509_FMT_PEM);
  secret_file_free (&text);
  if (rc <= 0)
    return bad_file (ca,
                     rc < 0 ? gnutls_strerror (rc) : "it holds no certificate");
  return 0;
}

/* The server reads these files again for each handshake: tls_secrets_renew. */
static bool
keep_paths (struct tls_secrets *secrets, const struct nbdm_tls *files)
{
  secrets->certificate = strdup (files->certificate);
  secrets->private_key = strdup (files->private_key);
  secrets->ca = files->ca ? strdup (files->ca) : NULL;
  return secrets->certificate && secrets->private_key
         && (secrets->ca || files->ca == NULL);
}

static int
load_x509 (struct tls_secrets *secrets, const struct nbdm_tls *files)
{
  int rc;

  if (files->certificate == NULL || files->private_key == NULL)
    return set_message (-EINVAL, "TLS needs a certificate and its key");
  if (!keep_paths (secrets, files)
      || gnutls_certificate_allocate_credentials (&secrets->x509) < 0)
    return set_error (-ENOMEM, "TLS");
  rc = load_own (secrets, files->certificate, files->private_key);
  secrets->checks_client = files->ca != NULL;
  return rc == 0 && files->ca ? load_trust (secrets, files->ca) : rc;
}

/* `psk`: shared keys alone. */
static int
secrets_new (bool psk, struct tls_secrets **out)
{
  struct tls_secrets *secrets = calloc (1, sizeof *secrets);
  int rc;

  if (secrets == NULL)
    return set_error (-ENOMEM, "TLS");
  rc = gnutls_priority_init (&secrets->priority, psk ? TLS13_PSK : TLS13, NULL);
  if (rc < 0) {
    tls_secrets_free (secrets);
    return set_message (-EOPNOTSUPP, "TLS 1.3: GnuTLS here has none: %s",
                        gnutls_strerror (rc));
  }
  *out = secrets;
  return 0;
}

int
tls_secrets_load (const struct nbdm_tls *files, struct tls_secrets **out)
{
  struct tls_secrets *secrets;
  int rc = secrets_new (files->psk != NULL, &secrets);

  if (rc < 0)
    return rc;
  rc = files->psk ? load_psk (secrets, files->psk) : load_x509 (secrets, files);
  if (rc < 0)
    tls_secrets_free (secrets);
  else
    *out = secrets;
  return rc;
}

int
tls_secrets_renew (const struct tls_secrets *secrets, struct tls_secrets **out)
{
  const struct nbdm_tls files = { .certificate = secrets->certificate,
                                  .private_key = secrets->private_key,
                                  .ca = secrets->ca };

  return tls_secrets_load (&files, out);
}

/* --- A client's ------------------------------------------------------------
 */

static int
load_own_psk (struct tls_secrets *secrets, const char *path, const char *user)
{
  const gnutls_datum_t name = { (unsigned char *)(uintptr_t)user,
                                user ? (unsigned)strlen (user) : 0 };
  struct psk psk;
  int rc = psk_read (path, user ? &name : NULL, &psk);

  if (rc < 0)
    return rc;
  if (rc > 0 && user)
    return set_message (-EINVAL, "TLS: %s: it has no key of %s", path, user);
  if (rc > 0)
    return bad_file (path, "it has no line NAME:KEY");
  rc = gnutls_psk_allocate_client_credentials (&secrets->own_psk);
  if (rc == 0)
    rc = gnutls_psk_set_client_credentials (secrets->own_psk, psk.name,
                                            &psk.key, GNUTLS_PSK_KEY_RAW);
  psk_free (&psk);
  return rc < 0 ? bad_file (path, gnutls_strerror (rc)) : 0;
}

/* The folder has the files that libnbd's and nbdkit's have. */
static int
load_folder (struct tls_secrets *secrets, const char *folder)
{
  char ca[PATH_MAX], certificate[PATH_MAX], key[PATH_MAX];
  int rc;

  snprintf (ca, sizeof ca, "%s/ca-cert.pem", folder);
  snprintf (certificate, sizeof certificate, "%s/client-cert.pem", folder);
  snprintf (key, sizeof key, "%s/client-key.pem", folder);
  rc = load_trust (secrets, ca);
  if (rc == 0 && access (certificate, F_OK) == 0)
    rc = load_own (secrets, certificate, key);
  return rc;
}

/* Where libnbd looks.  False: there is none. */
static bool
usual_folder (char *folder, size_t size)
{
  static const char *const places[]
      = { "%s/.pki/libnbd", "%s/.config/pki/libnbd" };
  const char *home = getenv ("HOME");
  char ca[PATH_MAX + 16];

  for (size_t i = 0; i < 3; i++) {
    if (geteuid () != 0 && home && i < 2)
      snprintf (folder, size, places[i], home);
    else
      snprintf (folder, size, "/etc/pki/libnbd");
    snprintf (ca, sizeof ca, "%s/ca-cert.pem", folder);
    if (access (ca, F_OK) == 0)
      return true;
  }
  return false;
}

/* The CAs that this host trusts sign certificates for anybody: they prove
 * something only together with a host's name.
 */
static int
load_own_x509 (struct tls_secrets *secrets, const char *folder, bool has_name)
{
  char usual[PATH_MAX];
  int rc = gnutls_certificate_allocate_credentials (&secrets->x509);

  if (rc < 0)
    return set_error (-ENOMEM, "TLS");
  if (folder)
    return load_folder (secrets, folder);
  if (usual_folder (usual, sizeof usual))
    return load_folder (secrets, usual);
  if (!has_name)
    return set_message (-EINVAL, "TLS: a unix socket has no host's name to "
                                 "check a certificate by, so the URI must name "
                                 "a folder: tls-certificates=FOLDER");
  rc = gnutls_certificate_set_x509_system_trust (secrets->x509);
  return rc < 0 ? set_message (-ENOENT,
                               "TLS: this host trusts no certificates, "
                               "and the URI names none: %s",
                               gnutls_strerror (rc))
                : 0;
}

/* The files of a node, which is a server too. */
static int
load_files (struct tls_secrets *secrets, const struct nbd_uri *uri)
{
  int rc;

  if (uri->ca == NULL || uri->certificate == NULL || uri->private_key == NULL)
    return set_message (-EINVAL, "TLS: the URI must name all of "
                                 "tls-certificate-file, tls-key-file and "
                                 "tls-ca-file");
  if (gnutls_certificate_allocate_credentials (&secrets->x509) < 0)
    return set_error (-ENOMEM, "TLS");
  rc = load_trust (secrets, uri->ca);
  return rc < 0 ? rc : load_own (secrets, uri->certificate, uri->private_key);
}

int
tls_secrets_of_uri (const struct nbd_uri *uri, struct tls_secrets **out)
{
  struct tls_secrets *secrets;
  int rc = secrets_new (uri->psk_file != NULL, &secrets);

  if (rc < 0)
    return rc;
  if (uri->psk_file)
    rc = load_own_psk (secrets, uri->psk_file, uri->user);
  else if (uri->ca || uri->certificate || uri->private_key)
    rc = load_files (secrets, uri);
  else
    rc = load_own_x509 (secrets, uri->certificates, uri->socket == NULL);
  if (rc < 0)
    tls_secrets_free (secrets);
  else
    *out = secrets;
  return rc;
}

void
tls_secrets_free (struct tls_secrets *secrets)
{
  if (secrets == NULL)
    return;
  if (secrets->psk)
    gnutls_psk_free_server_credentials (secrets->psk);
  if (secrets->own_psk)
    gnutls_psk_free_client_credentials (secrets->own_psk);
  if (secrets->x509)
    gnutls_certificate_free_credentials (secrets->x509);
  if (secrets->priority)
    gnutls_priority_deinit (secrets->priority);
  free (secrets->psk_file);
  free (secrets->certificate);
  free (secrets->private_key);
  free (secrets->ca);
  free (secrets);
}
