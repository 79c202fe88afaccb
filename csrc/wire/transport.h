/* SPDX-License-Identifier: BSD-3-Clause */

/* What conn.c and the two transports know of each other.
 *
 * conn.c keeps which thread waits for which command, and which of them takes in
 * the answers; a transport moves bytes.  libnbd's carries everything, TLS
 * included; the plain one takes over a socket that libnbd has negotiated and on
 * which nothing but bytes is left to move (transport_plain.c says why).
 */

#ifndef NBDM_TRANSPORT_H
#define NBDM_TRANSPORT_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/socket.h>

#include "api.h"
#include "base/atomics.h"
#include "wire/conn.h"

struct nbd_handle;
struct plain;

struct transport {
  /* Take the command and send it, now or with the next `push`; conn->lock is
   * not held.  -ENOTCONN: it is not outstanding.
   */
  int (*issue) (struct conn *conn, struct command *cmd, struct waiter *waiter);
  /* Send what `issue` left.  With a waiter sleep in poll until it is sent, the
   * waiter has all its answers, or the connection is killed; with NULL leave
   * what the socket has no room for.
   */
  void (*push) (struct conn *conn, const struct waiter *waiter);
  /* The poller's: take in the answers that are there; with `wait` block until
   * there are some, or the connection is killed.  False: there were none.
   */
  bool (*step) (struct conn *conn, bool wait);
  /* Make a poller that waits in `step` return: the connection is dead. */
  void (*interrupt) (struct conn *conn);
  /* Tell the server that we go; no command is outstanding. */
  void (*goodbye) (struct conn *conn);
  /* Bytes of the oldest command that have not left, at most; conn->lock is
   * held.
   */
  uint64_t (*unsent_of_oldest) (const struct conn *conn);
  /* Is there something to push, and no thread at it?  conn->lock is held. */
  bool (*has_unsent) (const struct conn *conn);
  void (*close) (struct conn *conn);
};

extern const struct transport libnbd_transport, plain_transport;

struct traffic {
  uint64_t in, out; /* bytes that have come, and that the other side took */
};

struct silence {
  uint64_t heard_ns;  /* the connection is silent since */
  uint64_t judged_ns; /* when the command was issued that `owed` is of */
  uint64_t owed;      /* bytes up to its end that are on the way, at most */
  struct traffic seen;
  uint64_t queue;     /* bytes in the socket when last seen */
  struct command ask; /* ours, and what it needs */
  struct waiter waiter;
  uint8_t *buf; /* or NULL: this server is not asked */
};

struct conn {
  const struct transport *transport;
  int fd; /* the socket, or a dup of libnbd's; shut down by conn_kill */
  struct conn_info info;
  atomic_uint users;

  struct nbd_handle *nbd; /* libnbd's transport, and the handshake of both */
  int kick;               /* its eventfd: makes the poller look again; or -1 */
  struct plain *plain;    /* the plain transport's */

  pthread_mutex_t lock; /* protects all below */
  bool dead;
  bool overdue;                    /* it died of a deadline */
  bool polling;                    /* a thread is the poller */
  struct watcher *absent_poller;   /* it is, but is away; or NULL */
  TAILQ_HEAD (, watcher) watchers; /* that want to be, first come first */
  char why[NBDM_REASON_LEN];
  TAILQ_HEAD (, command) commands; /* outstanding, in order of issue */
  uint64_t nr_outstanding;
  uint64_t bytes_outstanding; /* of requests and answers */
  uint64_t nr_answered;
  uint64_t answered_ns; /* when the last answer came, or it was opened */
  struct waiter *asleep;

  bool kernel_counts; /* what the other side has sent and taken, else we: */
  atomic_u64 came;    /* bytes that were received; written by the poller */
  atomic_u64 went;    /* that were sent; written by the sending thread */

  /* The ticker's own. */
  struct silence silence;
};

/* The command becomes outstanding; -ENOTCONN: the connection is dead. */
int conn_begin_locked (struct conn *conn, struct command *cmd,
                       struct waiter *waiter);
/* It never was: for an `issue` that failed behind that. */
void conn_withdraw_locked (struct conn *conn, struct command *cmd);
/* It is answered, or never will be (ENOTCONN).  Its waiter may be gone when
 * this returns; conn_wake_deferred wakes one that sleeps.
 */
void conn_answer_locked (struct conn *conn, struct command *cmd, int error,
                         uint64_t now);
/* Wake the waiters that this thread has answered; with no lock held. */
void conn_wake_deferred (void);
/* Nothing is sent and no answer believed from here on; conn_kill follows. */
void conn_die_locked (struct conn *conn, const char *why);

#endif /* NBDM_TRANSPORT_H */
