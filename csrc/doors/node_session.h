/* SPDX-License-Identifier: BSD-3-Clause */

/* The exports NAME.meta and NAME.dirty.  See node_session.c. */

#ifndef NBDM_NODE_SESSION_H
#define NBDM_NODE_SESSION_H

struct session;

#define RECORD_MAX_READ (1u << 20) /* bytes of a read of NAME.dirty */

/* Serve the session's record until the other node leaves or is too slow. */
void node_serve (struct session *session);

#endif /* NBDM_NODE_SESSION_H */
