/* SPDX-License-Identifier: BSD-3-Clause */

/* Read the files of TLS.  See secret_file.c. */

#ifndef NBDM_SECRET_FILE_H
#define NBDM_SECRET_FILE_H

#include <gnutls/gnutls.h>

/* Read a whole secret, or certificates.  The text ends with a NUL that `size`
 * does not count.  -errno with a message that names the file.
 */
int secret_file_read (const char *path, gnutls_datum_t *text);
int certificate_file_read (const char *path, gnutls_datum_t *text);
void secret_file_free (gnutls_datum_t *text); /* of both; or {0} */

/* A key of a file of shared keys, which has a line NAME:HEX for each. */
struct psk {
  gnutls_datum_t text; /* the file's */
  const char *name;    /* in `text` */
  gnutls_datum_t key;  /* by gnutls_malloc */
};

/* Read the user's key, or the first one without a user.  0; 1: the file has no
 * such key; -errno with a message.  Call psk_free only after 0.
 */
int psk_read (const char *path, const gnutls_datum_t *user, struct psk *psk);
void psk_free (struct psk *psk);

#endif /* NBDM_SECRET_FILE_H */
