/* SPDX-License-Identifier: BSD-3-Clause */

/* Answers to a client.  See direct_answer.c. */

#ifndef NBDM_DIRECT_ANSWER_H
#define NBDM_DIRECT_ANSWER_H

#include <stddef.h>

struct op;
struct session;

/* An op with `room` bytes of buffer, counted as under way.  NULL: no memory. */
struct op *op_get (struct session *session, size_t room);
void op_drop (struct op *op); /* without an answer */
/* The session's thread: its answer is `rc`, with `body_size` bytes of its
 * buffer; to be sent with the next answers_push.  The op is not ours any more.
 * -ESHUTDOWN has no answer: the session ends once the others are answered.
 */
void answer_put (struct op *op, int rc, size_t body_size);
/* The session's thread: send what the socket has room for.  No effect while a
 * worker does.
 */
void answers_push (struct session *session);
/* The session's thread: the client has taken nothing for long, and the server
 * ends: what has not left is dropped, and the client with it.
 */
void answers_give_up (struct session *session);
/* The session's thread: all is sent, and the server ends the connection; wait
 * until it has arrived, bounded.
 */
void answers_part (struct session *session);
/* A worker: queue it and send what is there; blocks on the socket, up to
 * DIRECT_SEND_MS and one send more, unless another thread is at it or has found
 * the client slow.  Op and session may be gone when this returns.
 */
void answer_send (struct op *op, int rc, size_t body_size);
/* The worker that answers several clients at once: the same without blocking,
 * or each client that does not read would keep the others waiting.
 */
void answer_send_shared (struct op *op, int rc);
void spare_free_locked (struct session *session); /* their buffers */
void ops_free (struct session *session); /* the spare ones, at the end */

#endif /* NBDM_DIRECT_ANSWER_H */
