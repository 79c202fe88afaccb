/* SPDX-License-Identifier: BSD-3-Clause */

/* The direct door: our own NBD server, in seven files and the list of exports
 * (export.c).
 *
 *   direct_server.c     listens, accepts, ends
 *   direct_clients.c    which clients are connected, and which may be
 *   direct_memory.c     what their requests may take together
 *   direct_handshake.c  what a client and we agree on
 *   direct_session.c    a client's requests and answers
 *   direct_io.c         between a client's request and the executor's
 *   direct_answer.c     an answer's bytes, and their way into the socket
 *
 * A session is one thread, and has a lane of the executor (executor/lane.c):
 * what carries requests out is no part of the door.  An answer of a worker goes
 * straight to the socket.
 */

#ifndef NBDM_DIRECT_H
#define NBDM_DIRECT_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "api.h"
#include "base/atomics.h"
#include "executor/lane.h"
#include "wire/protocol.h"

struct direct_server;
struct exported;

/* What a connection may have under way, so that a client cannot have all of
 * our memory: the kernel's nbd sends 128 at most.
 */
#define DIRECT_MAX_OPS 128u
#define DIRECT_MAX_BYTES (64u << 20)
#define DIRECT_SEND_MS 50            /* a worker waits for a slow client */
#define DIRECT_INBOX (128u << 10)    /* bytes taken in with one recv */
#define DIRECT_KEEP_BYTES (8u << 20) /* of buffers kept for the next */
#define DIRECT_FREE_BYTES                                                      \
  (256u << 10) /* of them, not counted in the budget                           \
                */

/* Unless told otherwise. */
#define DIRECT_DEFAULT_CLIENTS 1024u
#define DIRECT_DEFAULT_MEMORY (UINT64_C (1) << 30) /* or a quarter of RAM */

/* Memory that all clients share; see direct_memory.c. */
struct budget {
  uint64_t limit, stall_ns;
  atomic_u64 used;
  atomic_uint nr_waiting;
  pthread_mutex_t lock;         /* protects the queue; none is taken under it */
  struct session *first, *last; /* that wait */
  uint64_t pressed_ns;          /* under the clients' lock */
};

/* All connections; see direct_clients.c. */
struct clients {
  uint32_t max_admitted;
  struct budget budget;

  pthread_mutex_t lock; /* protects all below; before a session's */
  pthread_cond_t gone;  /* a session's thread has ended */
  struct session *first;
  uint32_t nr, nr_shaking, nr_admitted;
  bool disconnecting; /* all are told to end */
};

enum stage { SHAKING_HANDS, ADMITTED, PUT_OUT };

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
  struct io io; /* the executor's */
  /* The answer. */
  uint8_t head[sizeof (struct nbd_chunk) + sizeof (uint64_t)];
  size_t head_size;
  size_t body_size; /* of buf */
  bool refused;     /* the volume is stopping: there is none */
};

struct session {
  struct direct_server *server;
  struct clients *clients;
  struct exported *exported; /* agreed on in the handshake */
  int fd;
  uint64_t number; /* of the connection, for the log */
  struct agreed agreed;
  struct lane lane;   /* its thread's; others ring its box */
  atomic_bool ending; /* server or volume are: take in no more */
  atomic_bool shaking_hands;
  atomic_bool asked;       /* for anything, ever */
  atomic_bool receiving;   /* a payload */
  atomic_bool stalled_out; /* it kept memory, and moved nothing */
  atomic_u64 moved;        /* bytes, to and from it */

  /* Under the clients' lock. */
  struct session *next;
  enum stage stage;
  uint64_t admitted_ns;
  uint64_t judged_ns, judged_moved; /* see budget_press */

  /* Under the budget's. */
  struct session *next_waiting;
  uint64_t wants;
  atomic_u64 granted; /* to be taken by its thread */

  /* Its thread's own. */
  uint8_t *inbox;
  size_t start, end;  /* of what is in it */
  struct op *filling; /* a write whose payload is not all there */
  size_t filled;      /* bytes of it */
  uint64_t skip;      /* bytes of a payload to be thrown away */
  bool stalled;       /* the inbox has a request, and there was no room */
  bool waiting;       /* for memory */
  bool no_more;       /* the end of the stream, or of the server */
  bool ended;         /* it took its leave, or sent nonsense: no requests */
  bool closed;        /* by the client: poll says so for ever */

  pthread_mutex_t lock;    /* protects all below; before the budget's */
  struct op *first, *last; /* to be sent */
  size_t first_sent;       /* bytes of the first that are */
  bool sending;            /* a thread is in sendmsg */
  bool slow;               /* the socket was full, and not all is sent yet */
  bool dead;               /* nothing can be sent any more */
  bool wants_room;         /* its thread waits for ops to end */
  uint32_t nr_ops;
  size_t bytes, kept; /* of the buffers of ops under way, and of spare ones */
  size_t promised;    /* to the next op_get */
  uint64_t charged;   /* of the budget, for all of them */
  struct op *spare;
};

#endif /* NBDM_DIRECT_H */
