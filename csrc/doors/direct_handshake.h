/* SPDX-License-Identifier: BSD-3-Clause */

/* The handshake.  See direct_handshake.c. */

#ifndef NBDM_DIRECT_HANDSHAKE_H
#define NBDM_DIRECT_HANDSHAKE_H

struct session;

/* Negotiate; blocks, for up to half a minute of a client's silence.  0: the
 * client is admitted; or -errno: it left, wants nothing, or speaks no NBD.
 */
int direct_handshake (struct session *session);

#endif /* NBDM_DIRECT_HANDSHAKE_H */
