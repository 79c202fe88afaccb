/* SPDX-License-Identifier: BSD-3-Clause */

/* A client's thread.  See direct_session.c. */

#ifndef NBDM_DIRECT_SESSION_H
#define NBDM_DIRECT_SESSION_H

struct session;

/* Serve a client, from the handshake until it or the server ends. */
void session_run (struct session *session);

#endif /* NBDM_DIRECT_SESSION_H */
