/* SPDX-License-Identifier: BSD-3-Clause */

/* How long a server may be silent.  See silence.c. */

#ifndef NBDM_SILENCE_H
#define NBDM_SILENCE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/atomics.h"

struct command;
struct conn;

int silence_init (struct conn *conn); /* the handshake is done; -ENOMEM */
void silence_free (struct conn *conn);
/* The bytes of a request and its answer. */
uint64_t command_bytes (const struct command *cmd);
bool is_ask (const struct conn *conn, const struct command *cmd);
/* Kill the connection if it was silent for too long, and ask the server if
 * it was silent for a while.  The ticker calls it.
 */
void silence_tick (struct conn *conn, uint64_t deadline_ns, uint64_t hurry_ns);
/* Bytes in the socket that the other side has not taken. */
uint64_t socket_queue (const struct conn *conn);
/* Add to a counter that only this thread writes. */
void counter_add (atomic_u64 *counter, uint64_t bytes);

#endif /* NBDM_SILENCE_H */
