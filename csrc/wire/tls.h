/* SPDX-License-Identifier: BSD-3-Clause */

/* TLS 1.3 around a stream.  See tls.c. */

#ifndef NBDM_TLS_H
#define NBDM_TLS_H

#include <stddef.h>
#include <stdint.h>

struct stream;
struct tls_secrets;

/* The handshake of a server on a plain stream, which then is a TLS stream; it
 * blocks up to `until_ns`.  -errno with a message: the stream is plain, and the
 * connection must end.  The secrets must live as long as the stream.
 */
int tls_accept (struct stream *stream, const struct tls_secrets *secrets,
                uint64_t until_ns);

/* The handshake of a client, as above.  The server's certificate must be that
 * of `host`; NULL: of any host, so only with a CA of the user's own.  With a
 * `node`, a name or NULL, it must be that of this node (tls_identity.h).
 */
int tls_connect (struct stream *stream, const struct tls_secrets *secrets,
                 const char *host, const char *node, uint64_t until_ns);
size_t tls_bytes (void); /* that a stream takes, without GnuTLS's own */
/* After EPROTO from a stream: what went wrong, or NULL. */
const char *tls_trouble (const struct stream *stream);

#endif /* NBDM_TLS_H */
