/* SPDX-License-Identifier: BSD-3-Clause */

/* Whose certificate it is.  See tls_identity.c. */

#ifndef NBDM_TLS_IDENTITY_H
#define NBDM_TLS_IDENTITY_H

#include <stdbool.h>
#include <stddef.h>

struct stream;

/* Is the other side's certificate of one of these names?  A name may be an
 * address.  False without a certificate.  The handshake must have verified it.
 */
bool tls_is_of (const struct stream *stream, const char *const *names,
                size_t nr);
/* The names that the certificate has, for a message: "alpha, an address".
 * Empty: it has none, or there is no certificate.
 */
void tls_describe (const struct stream *stream, char *text, size_t size);

#endif /* NBDM_TLS_IDENTITY_H */
