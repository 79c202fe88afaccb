/* SPDX-License-Identifier: BSD-3-Clause */

/* The exports NAME.meta and NAME.dirty.  See node_session.c. */

#ifndef NBDM_NODE_SESSION_H
#define NBDM_NODE_SESSION_H

#include <stdint.h>

struct session;

#define RECORD_MAX_READ (1u << 20) /* bytes of a read of NAME.dirty */

/* Serve these bytes as NAME.dirty, and free them at the end. */
void record_begin (struct session *session, void *bytes, uint32_t size);
void record_end (struct session *session); /* also if none has begun */
/* Serve the session's record until the other node leaves or is too slow. */
void node_serve (struct session *session);

#endif /* NBDM_NODE_SESSION_H */
