/* SPDX-License-Identifier: BSD-3-Clause */

/* All connections.  See direct_clients.c. */

#ifndef NBDM_DIRECT_CLIENTS_H
#define NBDM_DIRECT_CLIENTS_H

#include <stdbool.h>
#include <stdint.h>

struct clients;
struct nbdm_limits;
struct session;

void clients_init (struct clients *clients, const struct nbdm_limits *limits);
void clients_destroy (struct clients *clients);
/* Add a session in the handshake, if necessary in the place of another one: the
 * oldest from where most of them come.
 */
void clients_add (struct clients *clients, struct session *session);
/* No descriptor, memory or thread is left for a client: end a handshake, as
 * above.  False: no connection is in the handshake.
 */
bool clients_make_room (struct clients *clients);
/* Admit a session after its handshake: 0; -EUSERS with a message: too many
 * clients, or too many of its host; -ECONNRESET: the session was ended in the
 * meantime.
 */
int clients_admit (struct session *session);
/* Remove a session from the list, and from the count when it is freed. */
void clients_remove (struct session *session);
void clients_removed (struct clients *clients);
/* Tell all sessions to end, and wait until they have ended. */
void clients_disconnect (struct clients *clients);
/* Only wait until all sessions have ended; -ETIMEDOUT. */
int clients_wait_gone (struct clients *clients, uint64_t until_ns);

#endif /* NBDM_DIRECT_CLIENTS_H */
