/* SPDX-License-Identifier: BSD-3-Clause */

/* What other nodes find at the door.  See node_handshake.c. */

#ifndef NBDM_NODE_HANDSHAKE_H
#define NBDM_NODE_HANDSHAKE_H

struct handshake;

/* Answer an option at a listener for nodes, or at a closed one; enum next. */
int node_option (struct handshake *h);

#endif /* NBDM_NODE_HANDSHAKE_H */
