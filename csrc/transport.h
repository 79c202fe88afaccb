/* SPDX-License-Identifier: BSD-3-Clause */

/* What conn.c and the two transports know of each other.
 *
 * conn.c keeps who waits for which command, and who of them takes in the
 * answers; a transport moves bytes.  libnbd's carries everything, TLS
 * included; the plain one takes over a socket that libnbd has negotiated and
 * on which nothing but bytes is left to move (transport_plain.c says why).
 */

#ifndef NBDM_TRANSPORT_H
#define NBDM_TRANSPORT_H

#include <sys/socket.h>

#include "conn.h"
#include "internal.h"
#include "nbdm.h"

struct transport {
  /* Take the command and send it, now or with the next `push`; conn->lock is
   * not held.  -ENOTCONN: it is not outstanding.
   */
  int (*issue) (struct conn *conn, struct command *cmd, struct waiter *waiter);
  /* Send what `issue` left; with `wait` block until it is sent or the
   * connection killed, else leave what the socket has no room for.
   */
  void (*push) (struct conn *conn, bool wait);
  /* The poller's: take in the answers that are there; with `wait` block until
   * there are some, or the connection is killed.  False: there were none.
   */
  bool (*step) (struct conn *conn, bool wait);
  /* Make a poller that waits in `step` return: the connection is dead. */
  void (*interrupt) (struct conn *conn);
  /* Tell the server that we go; no command is outstanding. */
  void (*goodbye) (struct conn *conn);
  /* Is there something to push, and nobody at it?  conn->lock is held. */
  bool (*has_unsent) (const struct conn *conn);
  void (*close) (struct conn *conn);
};

extern const struct transport libnbd_transport, plain_transport;

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
  bool overdue;             /* it died of a deadline */
  bool polling;             /* somebody is the poller */
  struct watcher *lender;   /* it is, but is away; or NULL */
  struct watcher *watchers; /* who want to be, first come first */
  char why[NBDM_REASON_LEN];
  struct command *oldest, *newest; /* outstanding, in order of issue */
  uint64_t nr_outstanding;
  uint64_t nr_answered;
  uint64_t answered_ns; /* when the last answer came */
  struct waiter *asleep;
};

/* The command becomes outstanding; -ENOTCONN: the connection is dead. */
int conn_begin_locked (struct conn *conn, struct command *cmd,
                       struct waiter *waiter);
/* It never was: for an `issue` that failed behind that. */
void conn_withdraw_locked (struct conn *conn, struct command *cmd);
/* It is answered, or never will be (ENOTCONN).  Its waiter may be gone when
 * this returns; who sleeps is roused, and woken by conn_wake_roused.
 */
void conn_answer_locked (struct conn *conn, struct command *cmd, int error,
                         uint64_t now);
/* Wake whom this thread roused or told; with no lock held. */
void conn_wake_roused (void);

/* sendmsg, of commands that may be answered, and their payloads gone, before
 * it returns.  The kernel has read them by then, but the sanitizers' own
 * sendmsg looks at them once more after the call: so they are passed by.  Not
 * a part of transport_plain.c, for tests to take the place of it.
 */
ssize_t conn_sendmsg (int fd, const struct msghdr *msg, int flags);

/* --- transport_libnbd.c: the handshake --------------------------------- */

/* Connect and negotiate by `until_ns`; conn->nbd and conn->info are set.
 * -errno with a message.
 */
int libnbd_connect (struct conn *conn, const char *uri, uint64_t until_ns,
                    uint32_t timeout_ms);

/* --- transport_plain.c -------------------------------------------------- */

/* Take over the socket of conn->nbd, which is closed: 0.  1: it is none that
 * this transport can carry.  -errno with a message.
 */
int plain_take_over (struct conn *conn);

#endif /* NBDM_TRANSPORT_H */
