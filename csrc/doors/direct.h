/* SPDX-License-Identifier: BSD-3-Clause */

/* The direct door: our own NBD server, in seven files, the list of exports
 * (export.c), and the files for other nodes.
 *
 *   direct_server.c     listens, accepts, ends
 *   direct_clients.c    which clients are connected, and which may be
 *   direct_memory.c     how much memory their requests may use together
 *   direct_handshake.c  the negotiation with a client
 *   direct_session.c    a client's requests and answers
 *   direct_io.c         translates a client's request for the executor
 *   direct_answer.c     makes an answer's bytes and sends them
 *
 *   node_handshake.c    what other nodes find at the door, and closed doors
 *   node_calls.c        the questions that Python answers
 *   node_session.c      the exports NAME.meta and NAME.dirty
 *   claims.c            the connections that may write, and their end
 *   node_silence.c      notices that their other side is gone
 *
 * A session is one thread with a lane of the executor (executor/lane.c), which
 * carries out its requests.  A worker sends its answer straight to the socket.
 */

#ifndef NBDM_DIRECT_H
#define NBDM_DIRECT_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/queue.h>

#include "api.h"
#include "base/atomics.h"
#include "executor/lane.h"
#include "wire/protocol.h"
#include "wire/stream.h"

struct claim;
struct direct_server;
struct exported;
struct tls_secrets;

/* Requests that a connection may have under way, so that a client cannot use
 * all of our memory: the kernel's nbd sends at most 128.
 */
#define DIRECT_MAX_OPS 128u
#define DIRECT_MAX_BYTES (64u << 20)
#define DIRECT_SEND_MS 50 /* how long a worker waits for a slow client */
#define DIRECT_INBOX (128u << 10)    /* bytes received with one recv */
#define DIRECT_KEEP_BYTES (8u << 20) /* of buffers kept for reuse */
#define DIRECT_FREE_BYTES                                                      \
  (256u << 10) /* of buffers, not counted in the budget                        \
                */

/* The defaults. */
#define DIRECT_DEFAULT_CLIENTS 1024u
#define DIRECT_DEFAULT_MEMORY (UINT64_C (1) << 30) /* or a quarter of RAM */

/* Memory that all clients share; see direct_memory.c. */
struct budget {
  uint64_t limit, stall_ns;
  atomic_u64 used;
  atomic_u64 fixed; /* what all sessions take without any request */
  atomic_uint nr_waiting;
  pthread_mutex_t lock;         /* protects the queue; none is taken under it */
  struct session *first, *last; /* sessions that wait */
  uint64_t pressed_ns;          /* under the clients' lock */
};

/* A client must move `due` bytes before a time is over, which began then. */
struct pace {
  uint64_t since_ns, moved, due;
};

/* All connections; see direct_clients.c. */
struct clients {
  uint32_t max_admitted;
  uint64_t handshake_ns; /* a handshake's limit */
  struct budget budget;

  pthread_mutex_t lock; /* protects all below; before a session's */
  pthread_cond_t gone;  /* a session's thread has ended */
  struct session *first;
  uint32_t nr, nr_shaking, nr_admitted; /* the rest of `nr` is ending */
  bool disconnecting;                   /* all sessions must end */
};

enum stage { SHAKING_HANDS, ADMITTED, PUT_OUT };

/* What another node reads and writes in place of the disk; node_session.c. */
struct record {
  enum { RECORD_NONE, RECORD_META, RECORD_DIRTY } kind;
  uint8_t *bytes; /* of RECORD_DIRTY */
  uint32_t size;
  uint64_t until_ns; /* and it must have been read */
  bool has_place;    /* among the maps that are served at a time */
};

/* The result of the handshake. */
struct agreed {
  bool structured;   /* replies */
  bool block_status; /* base:allocation, as DIRECT_CONTEXT */
};

#define DIRECT_CONTEXT 1u

/* A client's request. */
struct op {
  struct session *session;
  struct op *next; /* of the one list it is in */
  uint16_t type;   /* enum nbd_command */
  uint16_t flags;  /* NBD_CMD_FLAG_* */
  uint32_t length;
  uint64_t cookie, offset;
  uint8_t *buf; /* `room` bytes: the payload of the request or answer */
  size_t room;
  struct io io; /* the executor's */
  /* The answer. */
  uint8_t head[sizeof (struct nbd_chunk) + sizeof (uint64_t)];
  size_t head_size;
  size_t body_size; /* of buf */
  bool refused;     /* the volume stops: no answer is sent */
};

/* When the other side of a claim was last alive. */
struct quiet {
  uint64_t heard_ns;
  uint64_t moved;  /* as the session's, when last seen */
  uint64_t unread; /* bytes that it had not acknowledged then */
};

struct session {
  struct direct_server *server;
  struct clients *clients;
  struct exported *exported; /* agreed on in the handshake */
  int fd;
  struct stream stream;              /* over fd */
  const struct tls_secrets *secrets; /* NULL: without TLS */
  uint64_t number;                   /* of the connection, for the log */
  uint64_t origin;   /* its host, or its user on this host; see clients_add */
  uint64_t fixed;    /* bytes that it takes without any request */
  uint32_t listener; /* the number of its listening socket */
  struct agreed agreed;
  struct record record; /* or RECORD_NONE: the disk */
  struct lane lane;     /* its thread's; other threads ring its box */
  atomic_bool ending;   /* server or volume end: receive no more requests */
  atomic_bool shaking_hands;
  atomic_bool asked;     /* the client has sent a request */
  atomic_u64 receiving;  /* size of the buffer that a payload fills, or 0 */
  atomic_u64 stalled_ns; /* the client moved too little for so long; or 0 */
  atomic_u64 moved;      /* bytes of answers to it and of payloads from it */

  /* Under the clients' lock. */
  struct session *next;
  enum stage stage;
  uint64_t admitted_ns;
  struct pace least, whole; /* see budget_press */

  /* Under the calls'; see claims.c. */
  struct claim *claim; /* that it is a connection of, or NULL */
  TAILQ_ENTRY (session) of_claim;
  uint64_t call; /* that granted it */
  bool cut;

  /* Under the budget's. */
  struct session *next_waiting;
  uint64_t wants;
  atomic_u64 granted; /* its thread takes them */

  /* Its thread's own. */
  uint8_t *inbox;
  size_t start, end;  /* of the bytes in it */
  struct op *filling; /* a write whose payload has not all come */
  size_t filled;      /* bytes of it */
  uint64_t skip;      /* bytes of a payload to discard */
  bool stalled;       /* the inbox has a request, but there is no room for it */
  bool waiting;       /* for memory */
  bool no_more;       /* the end of the stream, or of the server */
  bool ended;  /* the client disconnected or sent nonsense: no requests */
  bool closed; /* by the client: poll would report it forever */
  bool claims; /* the disk, with a claim: `claim` is not NULL */
  bool parted; /* the client disconnected after its last answer */
  struct quiet quiet; /* of a claim: see node_silence.c */

  pthread_mutex_t lock;    /* protects all below; before the budget's */
  struct op *first, *last; /* answers to send */
  size_t first_sent;       /* bytes of the first that have left */
  bool sending;            /* a thread is in stream_send */
  bool slow;               /* the socket was full, and not all is sent yet */
  bool dead;               /* no answer can be sent any more */
  bool wants_room;         /* its thread waits until ops end */
  uint32_t nr_ops;
  size_t bytes, kept; /* of the buffers of ops under way, and of spare ones */
  size_t promised;    /* to the next op_get */
  uint64_t charged;   /* of the budget, for all of them */
  struct op *spare;
};

#endif /* NBDM_DIRECT_H */
