/* SPDX-License-Identifier: BSD-3-Clause */

/* An NBD URI, taken apart.  See nbd_uri.c. */

#ifndef NBDM_NBD_URI_H
#define NBDM_NBD_URI_H

#include <stdbool.h>

/* All texts are decoded; they lie in `room`. */
struct nbd_uri {
  bool secure;                                /* with TLS */
  const char *host, *port;                    /* of TCP */
  const char *socket;                         /* of a unix socket, else NULL */
  const char *export;                         /* or "" */
  const char *user;                           /* or NULL */
  const char *psk_file;                       /* or NULL */
  const char *certificates;                   /* a folder, or NULL */
  const char *certificate, *private_key, *ca; /* files instead, or NULL */
  const char *name; /* that the certificate may have besides host, or NULL */
  char *room;
};

/* Does the URI ask for TLS? */
bool nbd_uri_is_secure (const char *text);
/* Is its export a claim of a node's disk (docs/PROTOCOL.md)? */
bool nbd_uri_is_claim (const char *text);
/* Take apart an nbds://, nbds+unix://, nbd:// or nbd+unix:// URI.  -EINVAL with
 * a message, -ENOMEM.
 */
int nbd_uri_parse (const char *text, struct nbd_uri *uri);
void nbd_uri_free (struct nbd_uri *uri);

#endif /* NBDM_NBD_URI_H */
