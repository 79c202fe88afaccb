/* SPDX-License-Identifier: BSD-3-Clause */

/* The handshake.  See direct_handshake.c. */

#ifndef NBDM_DIRECT_HANDSHAKE_H
#define NBDM_DIRECT_HANDSHAKE_H

struct session;

/* Negotiate; blocks, at most half a minute while the client is silent.  0: the
 * client is admitted; -errno: it disconnected, wants no export, or speaks no
 * NBD.
 */
int direct_handshake (struct session *session);

#endif /* NBDM_DIRECT_HANDSHAKE_H */
