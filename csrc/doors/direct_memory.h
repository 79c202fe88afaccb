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
/* The session's thread: promise its next op a new buffer of that size.  False:
 * the mailbox rings when there is memory for it; meanwhile budget_press.
 */
bool budget_take_locked (struct session *session, size_t bytes);
/* The session's thread: it found a buffer elsewhere, and waits no more. */
void budget_withdraw_locked (struct session *session);
/* Buffers were freed. */
void budget_settle_locked (struct session *session);
void budget_leave (struct session *session); /* at its end; no op is left */
/* Does any session wait?  Then buffers are not kept for later. */
bool budget_is_short (const struct session *session);
/* Free what is kept for later, and end clients that keep memory and move next
 * to nothing; no effect if another session just did.
 */
void budget_press (struct clients *clients);

#endif /* NBDM_DIRECT_MEMORY_H */
