/* SPDX-License-Identifier: BSD-3-Clause */

/* TLS for clients that know none: a thread carries their bytes.  See
 * tls_relay.c.
 */

#ifndef NBDM_TLS_RELAY_H
#define NBDM_TLS_RELAY_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

#define TLS_RELAY_USER "mirror"
#define TLS_RELAY_KEY "8f1d0cb7e4a25936d1f0b86e27c4a95d" /* hexadecimal */

/* The name of a file with that user and key, which ends with the process. */
const char *tls_relay_psk_file (void);

/* A client of TLS; what is NULL or 0 is as usual. */
struct tls_options {
  const char *priority;   /* a string of GnuTLS */
  const char *user, *key; /* hexadecimal; a user "" has none */
  unsigned max_record;    /* bytes; the server must send no longer ones */
  unsigned update_ms;     /* ask for new keys, and have them, so often */
};

/* Shake hands as a client of TLS on a connected socket.  Returns the socket
 * that takes its place: what goes in and out there is carried over TLS.  -1:
 * the handshake failed, and `fd` is closed.
 */
int tls_relay_with (int fd, const struct tls_options *options);
/* The same, as usual; it must not fail. */
int tls_relay (int fd);

/* Peers with TLS send records that hold nothing but padding, 200 KiB of them a
 * second.
 */
extern atomic_bool tls_relay_babbles;

/* Peers have TLS from now on. */
void tls_relay_secure_peers (void);
/* The URI of a peer (nbd_peer.c) at that socket: with TLS, which the peers then
 * have too, in run-one's "tls".
 */
void peer_uri (char *uri, size_t size, const char *socket);

#endif /* NBDM_TLS_RELAY_H */
