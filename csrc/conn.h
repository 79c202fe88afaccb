/* SPDX-License-Identifier: BSD-3-Clause */

/* One NBD connection to a remote; see conn.c. */

#ifndef NBDM_CONN_H
#define NBDM_CONN_H

#include "internal.h"

struct nbd_handle;
struct conn;
struct mailbox;

/* Somebody who waits for the answers to commands of one connection: a thread
 * in conn_wait, or who has a mailbox and is told there.
 */
struct waiter {
  unsigned pending;    /* commands not answered yet; under conn->lock */
  bool asleep;         /* under conn->lock */
  struct waiter *next; /* of those asleep, or told */
  atomic_uint roused;  /* futex: enum rouse in conn.c */
  struct mailbox *box; /* or NULL */
  void *owner;         /* of who reads the box */
};

#define WAITER_INIT                                                            \
  {                                                                            \
    .pending = 0                                                               \
  }

enum command_kind {
  COMMAND_READ,
  COMMAND_WRITE,
  COMMAND_ZERO, /* never TRIM: a trim promises nothing about what is read */
  COMMAND_FLUSH
};

/* How far the plain transport is with it. */
enum command_sent { COMMAND_QUEUED, COMMAND_LEAVING, COMMAND_SENT };

/* One command of ours; lives with who waits for it.  What `buf` points to
 * must stay until it is answered.
 */
struct command {
  enum command_kind kind;
  uint64_t offset, length; /* bytes */
  void *buf;               /* only read from when writing */
  bool fua;
  bool may_trim;

  struct waiter *waiter;
  struct conn *conn;
  int error; /* once answered: 0, or an errno; ENOTCONN: it never was */
  uint64_t issued_ns;
  struct command *newer, *older;
  uint64_t cookie; /* this and below: the plain transport's */
  enum command_sent sent;
};

/* What the server told at the handshake. */
struct conn_info {
  uint64_t size; /* bytes */
  uint32_t min_block;
  uint32_t max_payload; /* bytes of a read or write */
  bool read_only;
  bool can_flush;
  bool can_fua;
  bool can_zero;
  bool can_fast_zero;
};

/* Connect; blocks up to timeout_ms (name resolution aside).  -errno with a
 * message.  The caller owns one reference.
 */
int conn_open (const char *uri, uint32_t timeout_ms, struct conn **conn);
struct conn *conn_get (struct conn *conn);
/* The last one closes: no command may be outstanding then, and none is, as
 * whoever issued one holds a reference until it is answered.
 */
void conn_put (struct conn *conn);
const struct conn_info *conn_info (const struct conn *conn);

/* Send a command, now or at the latest with conn_wait, or conn_push if the
 * waiter has a mailbox; does not block.  -ENOTCONN: not sent, and the waiter
 * does not wait for it.
 */
int conn_issue (struct conn *conn, struct command *cmd, struct waiter *waiter);
/* Block until all of the waiter's commands are answered or the connection is
 * dead.  Bounded by the ticker's deadline.
 */
void conn_wait (struct conn *conn, struct waiter *waiter);

/* Send what conn_issue left, as far as the socket has room. */
void conn_push (struct conn *conn);

/* Who waits in poll for several things at once, this connection one of them.
 * Between watching and lending it may be the poller; lent, the part is
 * anybody's who wants it, as a thread that is at work takes in no answers.
 * Who sleeps already is not woken for that: at the latest the ticker, 50 ms
 * later, takes the answers in.
 */
struct watcher {
  struct mailbox *box; /* rung when there is no poller */
  struct watcher *next;
  bool listed;  /* under conn->lock */
  bool polling; /* its own thread's */
};

/* Can it be watched?  Not where libnbd moves the bytes. */
bool conn_watchable (const struct conn *conn);
int conn_fd (const struct conn *conn);
/* Before a poll: the events to wait for on conn_fd. */
short conn_watch (struct conn *conn, struct watcher *watcher);
/* After it, with what came: send, take in answers, lend the part. */
void conn_lend (struct conn *conn, struct watcher *watcher, short events);
/* It has nothing outstanding there any more. */
void conn_leave (struct conn *conn, struct watcher *watcher);

/* Read it all, in commands as long as the server takes; blocks. */
int conn_pread (struct conn *conn, uint8_t *buf, uint64_t count,
                uint64_t offset);
/* Whether conn_wait would return at once. */
bool conn_answered_all (struct conn *conn, const struct waiter *waiter);

/* The ticker's part: take in what lies there if nobody else does, notice a
 * closed connection, kill it if a command is older than deadline_ms.
 */
void conn_tick (struct conn *conn, uint32_t deadline_ms);
/* Whatever is outstanding ends with ENOTCONN; `why` is kept unless it was
 * dead before.
 */
void conn_kill (struct conn *conn, const char *why);
/* Say goodbye to the server; then kill. */
void conn_farewell (struct conn *conn);
bool conn_dead (struct conn *conn);

/* A connection at one moment. */
struct conn_report {
  bool dead;
  bool overdue;         /* it died because a deadline passed */
  uint64_t outstanding; /* commands sent and not answered */
  uint64_t answered;    /* since it was opened */
  char why[160];        /* it died; else "" */
};

struct conn_report conn_report (struct conn *conn);

uint64_t now_ns (void); /* CLOCK_MONOTONIC */

#endif /* NBDM_CONN_H */
