/* SPDX-License-Identifier: BSD-3-Clause */

/* The files of TLS: a file of shared keys (PSK), or certificates of X.509.
 *
 * TLS 1.3 is the least and the only version: it has no renegotiation, and each
 * of its key exchanges is ephemeral.  So "PSK" alone, without Diffie-Hellman,
 * is not among them: a key that is stolen later opens no recorded connection.
 *
 * GnuTLS reads a server's file of shared keys at every handshake.  So a key
 * that is removed from the file opens no connection any more, without a
 * restart; connections that are open stay open.
 */

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "api.h"
#include "base/error.h"
#include "wire/tls_secrets.h"

#define TLS13 "NORMAL:-VERS-ALL:+VERS-TLS1.3"
#define TLS13_PSK TLS13 ":-KX-ALL:+ECDHE-PSK:+DHE-PSK"

static int
bad_file (const char *path, const char *why)
{
  return set_message (-EINVAL, "TLS: %s: %s", path, why);
}

/* GnuTLS does not say which file is missing, or that it may not be read. */
static int
check_readable (const char *path)
{
  FILE *file = fopen (path, "re");

  if (file == NULL)
    return set_error (-errno, "TLS: %s", path);
  fclose (file);
  return 0;
}

/* Any reader of a secret could be this server. */
static int
check_secret (const char *path)
{
  struct stat st;
  int rc = check_readable (path);

  if (rc < 0)
    return rc;
  if (stat (path, &st) < 0)
    return set_error (-errno, "TLS: %s", path);
  if (st.st_mode & (S_IRWXG | S_IRWXO)
      || (st.st_uid != 0 && st.st_uid != geteuid ()))
    return set_message (-EACCES,
                        "TLS: %s: other users may read this secret, or change "
                        "it; chown it to this user, and chmod 600 it",
                        path);
  return 0;
}

static int
load_psk (struct tls_secrets *secrets, const char *path)
{
  int rc = check_secret (path);

  if (rc < 0)
    return rc;
  if (gnutls_psk_allocate_server_credentials (&secrets->psk) < 0)
    return set_error (-ENOMEM, "TLS");
  rc = gnutls_psk_set_server_credentials_file (secrets->psk, path);
  return rc < 0 ? bad_file (path, gnutls_strerror (rc)) : 0;
}

static int
load_own (struct tls_secrets *secrets, const struct nbdm_tls *files)
{
  int rc = check_readable (files->certificate);

  if (rc == 0)
    rc = check_secret (files->private_key);
  if (rc < 0)
    return rc;
  rc = gnutls_certificate_set_x509_key_file (secrets->x509, files->certificate,
                                             files->private_key,
                                             GNUTLS_X509_FMT_PEM);
  if (rc < 0)
    return set_message (-EINVAL, "TLS: %s and %s: %s", files->certificate,
                        files->private_key, gnutls_strerror (rc));
  return 0;
}

static int
load_trust (struct tls_secrets *secrets, const struct nbdm_tls *files)
{
  int rc = check_readable (files->ca);

  if (rc < 0)
    return rc;
  rc = gnutls_certificate_set_x509_trust_file (secrets->x509, files->ca,
                                               GNUTLS_X509_FMT_PEM);
  if (rc <= 0)
    return bad_file (files->ca,
                     rc < 0 ? gnutls_strerror (rc) : "it holds no certificate");
  secrets->checks_client = true;
  return 0;
}

static int
load_x509 (struct tls_secrets *secrets, const struct nbdm_tls *files)
{
  int rc;

  if (files->certificate == NULL || files->private_key == NULL)
    return set_message (-EINVAL, "TLS needs a certificate and its key");
  if (gnutls_certificate_allocate_credentials (&secrets->x509) < 0)
    return set_error (-ENOMEM, "TLS");
  rc = load_own (secrets, files);
  return rc == 0 && files->ca ? load_trust (secrets, files) : rc;
}

int
tls_secrets_load (const struct nbdm_tls *files, struct tls_secrets **out)
{
  struct tls_secrets *secrets = calloc (1, sizeof *secrets);
  int rc;

  if (secrets == NULL)
    return set_error (-ENOMEM, "TLS");
  rc = gnutls_priority_init (&secrets->priority, files->psk ? TLS13_PSK : TLS13,
                             NULL);
  if (rc < 0)
    rc = set_message (-EOPNOTSUPP, "TLS 1.3: GnuTLS here has none: %s",
                      gnutls_strerror (rc));
  else
    rc = files->psk ? load_psk (secrets, files->psk)
                    : load_x509 (secrets, files);
  if (rc < 0) {
    tls_secrets_free (secrets);
    return rc;
  }
  *out = secrets;
  return 0;
}

void
tls_secrets_free (struct tls_secrets *secrets)
{
  if (secrets == NULL)
    return;
  if (secrets->psk)
    gnutls_psk_free_server_credentials (secrets->psk);
  if (secrets->x509)
    gnutls_certificate_free_credentials (secrets->x509);
  if (secrets->priority)
    gnutls_priority_deinit (secrets->priority);
  free (secrets);
}
