/* SPDX-License-Identifier: BSD-3-Clause */

/* What the handshake needs of a TLS stream.  See tls.c. */

#ifndef NBDM_TLS_STREAM_H
#define NBDM_TLS_STREAM_H

#include <stdbool.h>
#include <sys/types.h>

#include <gnutls/gnutls.h>

struct stream;
struct tls_secrets;

/* Put TLS around a plain stream; `flags` are GNUTLS_SERVER or GNUTLS_CLIENT.
 * -ENOMEM with a message.
 */
int tls_begin (struct stream *stream, unsigned flags);
/* Free these with the stream. */
void tls_keep (struct stream *stream, struct tls_secrets *secrets);
gnutls_session_t tls_session (const struct stream *stream);
/* Is there something received that GnuTLS has not taken? */
bool tls_has_received (const struct stream *stream);
/* Receive, if it is false; as recv without waiting. */
ssize_t tls_fill (struct stream *stream);
/* Send what GnuTLS has written.  -1 and EAGAIN: something is left. */
ssize_t tls_drain (struct stream *stream);
/* The name of the alert that came last. */
const char *tls_alert_name (gnutls_session_t session);

#endif /* NBDM_TLS_STREAM_H */
