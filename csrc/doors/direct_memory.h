/* SPDX-License-Identifier: BSD-3-Clause */

/* The memory that clients share.  See direct_memory.c. */

#ifndef NBDM_DIRECT_MEMORY_H
#define NBDM_DIRECT_MEMORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct budget;
struct clients;
struct session;

void budget_init (struct budget *budget, uint64_t limit, uint64_t stall_ns);
void budget_end (struct budget *budget);
/* A session takes these bytes by being there, and gives them back. */
void budget_come (struct budget *budget, uint64_t bytes);
void budget_go (struct budget *budget, uint64_t bytes);
/* Reserve a new buffer of that size for the next op.  False: the mailbox
 * rings when there is memory; until then the thread calls budget_press.
 * Only the session's thread calls it.
 */
bool budget_take_locked (struct session *session, size_t bytes);
/* The session found another buffer and waits no more.  Only its thread
 * calls it.
 */
void budget_withdraw_locked (struct session *session);
/* Buffers were freed. */
void budget_settle_locked (struct session *session);
void budget_leave (struct session *session); /* at its end; no op is left */
/* Does any session wait?  Then no buffer is kept for reuse. */
bool budget_is_short (const struct session *session);
/* Free the buffers kept for reuse, and end clients that keep memory and move
 * too little of it.  No effect if another session just did that.
 */
void budget_press (struct clients *clients);

#endif /* NBDM_DIRECT_MEMORY_H */
