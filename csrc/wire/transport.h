/* SPDX-License-Identifier: BSD-3-Clause */

/* The interface between conn.c and the two transports.
 *
 * conn.c records which thread waits for which command, and which thread
 * receives the answers; a transport moves the bytes.  The plain one takes over
 * a connection after its handshake, with TLS or without (transport_plain.c says
 * why).  libnbd's transport carries the rest: structured replies, and what
 * tests ask for.
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
#include "wire/stream.h"

struct nbd_handle;
struct plain;
struct tls_secrets;

struct transport {
  /* Send the command now or with the next `push`; conn->lock is not held.
   * -ENOTCONN: the command is not outstanding.
   */
  int (*issue) (struct conn *conn, struct command *cmd, struct waiter *waiter);
  /* Send what `issue` left.  With a waiter, sleep in poll until all is sent,
   * the waiter has all its answers, or the connection is killed.  With NULL,
   * send only what the socket has room for.
   */
  void (*push) (struct conn *conn, const struct waiter *waiter);
  /* Receive the answers that have come; with `wait` block until some come or
   * the connection is killed.  False: there were none.  Only the poller calls
   * it.
   */
  bool (*step) (struct conn *conn, bool wait);
  /* The connection is dead: make a poller that waits in `step` return. */
  void (*interrupt) (struct conn *conn);
  /* Send a disconnect; no command is outstanding. */
  void (*goodbye) (struct conn *conn);
  /* An upper bound of the oldest command's bytes that have not left; conn->lock
   * is held.
   */
  uint64_t (*unsent_of_oldest) (const struct conn *conn);
  /* Is there something to push, and does no thread push it?  conn->lock is
   * held.
   */
  bool (*has_unsent) (const struct conn *conn);
  void (*close) (struct conn *conn);
};

extern const struct transport libnbd_transport, plain_transport;

struct traffic {
  uint64_t in, out; /* bytes received, and bytes that the other side took */
};

struct silence {
  uint64_t heard_ns;  /* the connection is silent since */
  uint64_t judged_ns; /* issue time of the command that `owed` belongs to */
  uint64_t owed; /* upper bound of its bytes, and earlier ones, on the way */
  struct traffic seen;
  uint64_t queue;     /* bytes in the socket when last seen */
  struct command ask; /* the ticker's own command, and what it needs */
  struct waiter waiter;
  uint8_t *buf; /* or NULL: the ticker does not ask this server */
};

struct conn {
  const struct transport *transport;
  int fd; /* the socket, or a dup of libnbd's; shut down by conn_kill */
  struct conn_info info;
  atomic_uint users;

  struct nbd_handle *nbd; /* of libnbd's transport, and of every handshake */
  int kick;               /* its eventfd: makes the poller look again; or -1 */
  struct plain *plain;    /* the plain transport's */
  struct stream stream;   /* the plain transport's, over fd */
  struct tls_secrets *secrets; /* of the stream; NULL: without TLS */

  pthread_mutex_t lock; /* protects all below */
  bool dead;
  bool overdue;                  /* it died because a deadline passed */
  bool polling;                  /* a thread is the poller */
  struct watcher *absent_poller; /* the poller, if it is absent; or NULL */
  TAILQ_HEAD (, watcher)
  watchers; /* that may become the poller, the oldest first */
  char why[NBDM_REASON_LEN];
  TAILQ_HEAD (, command) commands; /* outstanding, in order of issue */
  uint64_t nr_outstanding;
  uint64_t bytes_outstanding; /* of requests and answers */
  uint64_t nr_answered;
  uint64_t answered_ns; /* when the last answer came, or it was opened */
  struct waiter *asleep;

  bool kernel_counts; /* what the other side sent and took; else these: */
  atomic_u64 came;    /* bytes received; written by the poller */
  atomic_u64 went;    /* bytes sent; written by the sending thread */

  /* The ticker's own. */
  struct silence silence;
};

/* The command becomes outstanding; -ENOTCONN: the connection is dead. */
int conn_begin_locked (struct conn *conn, struct command *cmd,
                       struct waiter *waiter);
/* Undo conn_begin_locked, for an `issue` that failed after it. */
void conn_withdraw_locked (struct conn *conn, struct command *cmd);
/* The command is answered, or never will be (ENOTCONN).  Its waiter may be
 * freed when this returns; conn_wake_deferred wakes one that sleeps.
 */
void conn_answer_locked (struct conn *conn, struct command *cmd, int error,
                         uint64_t now);
/* Wake the waiters that this thread has answered.  The caller holds no lock. */
void conn_wake_deferred (void);
/* From here on no thread sends, and no answer is believed; conn_kill must
 * follow.
 */
void conn_die_locked (struct conn *conn, const char *why);

#endif /* NBDM_TRANSPORT_H */
