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
/* Into the handshake, if need be in the place of the oldest there. */
void clients_add (struct clients *clients, struct session *session);
/* There are no descriptors: end the oldest handshake.  False: there is none. */
bool clients_make_room (struct clients *clients);
/* From the handshake: 0; -EUSERS: there are too many; -ECONNRESET: it was
 * given up meanwhile.
 */
int clients_admit (struct session *session);
/* Out of the list; and, when it is freed, out of the count. */
void clients_remove (struct session *session);
void clients_removed (struct clients *clients);
/* Tell all of them to end, and wait until they have. */
void clients_disconnect (struct clients *clients);
/* Only wait for that; -ETIMEDOUT. */
int clients_wait_gone (struct clients *clients, uint64_t until_ns);

#endif /* NBDM_DIRECT_CLIENTS_H */
