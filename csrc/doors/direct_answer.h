/* SPDX-License-Identifier: BSD-3-Clause */

/* Answers to a client.  See direct_answer.c. */

#ifndef NBDM_DIRECT_ANSWER_H
#define NBDM_DIRECT_ANSWER_H

#include <stddef.h>

struct op;
struct session;

/* Get an op with a buffer of `room` bytes, counted as under way.  NULL: no
 * memory.
 */
struct op *op_get (struct session *session, size_t room);
void op_drop (struct op *op); /* without an answer */
/* Queue the answer `rc`, with `body_size` bytes of the buffer, for the next
 * answers_push.  The caller must not use the op after this.  -ESHUTDOWN
 * sends no answer: the session ends once the other requests are answered.
 * Only the session's thread calls it.
 */
void answer_put (struct op *op, int rc, size_t body_size);
/* Send what the socket has room for.  No effect while a worker sends.  Only
 * the session's thread calls it.
 */
void answers_push (struct session *session);
/* The client has read nothing for long, and the server ends: drop the unsent
 * answers and the client.  Only the session's thread calls it.
 */
void answers_give_up (struct session *session);
/* Bytes that the client's machine has not acknowledged; 0 on a unix socket,
 * where sent bytes have arrived.
 */
int answers_unread (int fd);
/* All answers are sent, and the server ends the connection.  Wait until they
 * have arrived, for a bounded time.  Only the session's thread calls it.
 */
void answers_part (struct session *session);
/* Queue the answer and send the queue.  Blocks on the socket, up to
 * DIRECT_SEND_MS and one send more, unless another thread sends or has found
 * the client slow.  Op and session may be freed when this returns.  Only a
 * worker calls it.
 */
void answer_send (struct op *op, int rc, size_t body_size);
/* The same without blocking, for a worker that answers several clients: a
 * client that does not read delays no other.
 */
void answer_send_shared (struct op *op, int rc);
void spare_free_locked (struct session *session); /* their buffers */
void ops_free (struct session *session); /* the spare ones, at the end */

#endif /* NBDM_DIRECT_ANSWER_H */
