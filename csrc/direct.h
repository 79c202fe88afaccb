/* SPDX-License-Identifier: BSD-3-Clause */

/* The direct door: our own NBD server, in four files.
 *
 *   direct_server.c     listens, accepts, ends; the threads that may block
 *   direct_handshake.c  what a client and we agree on
 *   direct_session.c    a client's requests and answers
 *   direct_answer.c     an answer's bytes, and their way into the socket
 *
 * A session is one thread.  It does small writes and reads itself
 * (express.c), and hands what may block to a worker, whose answer goes
 * straight to the socket.
 */

#ifndef NBDM_DIRECT_H
#define NBDM_DIRECT_H

#include <pthread.h>

#include "express.h"
#include "protocol.h"

/* What a connection may have under way, so that a client cannot have all of
 * our memory: the kernel's nbd sends 128 at most.
 */
#define DIRECT_MAX_OPS 128u
#define DIRECT_MAX_BYTES (2u * NBDM_MAX_REQUEST)
#define DIRECT_SEND_MS 50            /* a worker waits for a slow client */
#define DIRECT_INBOX (128u << 10)    /* bytes taken in with one recv */
#define DIRECT_KEEP_BYTES (8u << 20) /* of buffers kept for the next */

struct direct_server;
struct session;

/* What the handshake came to. */
struct agreed {
  bool structured;   /* replies */
  bool block_status; /* base:allocation, as DIRECT_CONTEXT */
};

#define DIRECT_CONTEXT 1u

/* A request of a client's. */
struct op {
  struct session *session;
  struct op *next; /* of the one list it is in */
  uint16_t type;   /* enum nbd_command */
  uint16_t flags;  /* NBD_CMD_FLAG_* */
  uint32_t length;
  uint64_t cookie, offset;
  uint8_t *buf; /* `room` bytes: the payload, or the answer's */
  size_t room;
  struct express express;
  bool begun; /* by express_begin: what is left is express_complete */
  /* The answer. */
  uint8_t head[sizeof (struct nbd_chunk) + sizeof (uint64_t)];
  size_t head_size;
  size_t body_size; /* of buf */
};

/* A remote's connection on which a session waits for answers. */
struct far {
  struct conn *conn; /* a reference; NULL: free */
  unsigned pending;  /* legs not told of */
  struct watcher watcher;
};

#define DIRECT_FARS (2 * NBDM_MAX_REMOTES) /* a lost one, and its successor */

struct session {
  struct direct_server *server;
  struct nbdm *volume;
  struct session *next;
  int fd;
  uint64_t number; /* of the connection, for the log */
  struct agreed agreed;
  struct mailbox *box;
  atomic_bool ending; /* the server is: take in no more */
  atomic_bool shaking_hands;

  /* Its thread's own. */
  uint8_t *inbox;
  size_t start, end;  /* of what is in it */
  struct op *filling; /* a write whose payload is not all there */
  size_t filled;      /* bytes of it */
  uint64_t skip;      /* bytes of a payload nobody wants */
  bool stalled;       /* the inbox has a request, and there was no room */
  bool no_more;       /* the end of the stream, or of the server */
  bool ended;         /* it took its leave, or sent nonsense: no requests */
  bool closed;        /* by the client: poll says so for ever */
  struct far fars[DIRECT_FARS];

  pthread_mutex_t lock;    /* protects all below; none is taken under it */
  struct op *first, *last; /* to be sent */
  size_t first_sent;       /* bytes of the first that are */
  bool sending;            /* somebody is in sendmsg */
  bool slow;               /* the socket was full, and not all is sent yet */
  bool dead;               /* nothing can be sent any more */
  bool wants_room;         /* its thread waits for ops to end */
  uint32_t nr_ops;
  size_t bytes, kept; /* of the buffers of ops under way, and of spare ones */
  struct op *spare;
};

/* --- direct_handshake.c ------------------------------------------------- */

/* Negotiate; blocks, for up to half a minute of a client's silence.  0, or
 * -errno: the client left, wants nothing, or speaks no NBD.
 */
int direct_handshake (int fd, const struct nbdm *v, struct agreed *agreed);

/* --- direct_session.c --------------------------------------------------- */

/* Serve a client, from the handshake until it or the server ends. */
void session_run (struct session *session);
/* A worker's part: the op to its end, answer included; blocks. */
void session_work (struct op *op);
/* The same of flushes, a list by `next`: one flush for all of them. */
void session_flush (struct op *ops);

/* --- direct_answer.c ---------------------------------------------------- */

/* An op with `room` bytes of buffer, counted as under way.  NULL: no memory. */
struct op *op_get (struct session *session, size_t room);
void op_drop (struct op *op); /* without an answer */
/* The session's thread: its answer is `rc`, with `body_size` bytes of its
 * buffer; to be sent with the next answers_push.  The op is not ours any more.
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
/* A worker: queue it and send what is there; blocks on the socket, up to
 * DIRECT_SEND_MS and one send more, unless another thread is at it or has found
 * the client slow.  Op and session may be gone when this returns.
 */
void answer_send (struct op *op, int rc, size_t body_size);
void ops_free (struct session *session); /* the spare ones, at the end */

/* --- direct_server.c ---------------------------------------------------- */

/* Have a worker run the op.  One that has begun holds what others wait for: it
 * does not wait for a worker to be free, and is run at once, by the caller,
 * where none can be made.
 */
void direct_submit (struct direct_server *server, struct op *op);
/* A line of the log, of one client; printf.  So many a second, no more. */
void direct_log (const struct session *session, const char *fmt, ...)
    __attribute__ ((format (printf, 2, 3)));

#endif /* NBDM_DIRECT_H */
