/* SPDX-License-Identifier: BSD-3-Clause */

/* One NBD connection to a remote; see conn.c. */

#ifndef NBDM_CONN_H
#define NBDM_CONN_H

#include "internal.h"

struct nbd_handle;
struct conn;

/* Somebody who waits for the answers to commands of one connection. */
struct waiter {
  unsigned pending;    /* commands not answered yet; under conn->lock */
  bool asleep;         /* under conn->lock */
  struct waiter *next; /* of those asleep */
  atomic_uint roused;  /* futex: enum rouse in conn.c */
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

/* Send a command, now or at the latest with conn_wait; does not block.
 * -ENOTCONN: not sent, and the waiter does not wait for it.
 */
int conn_issue (struct conn *conn, struct command *cmd, struct waiter *waiter);
/* Block until all of the waiter's commands are answered or the connection is
 * dead.  Bounded by the ticker's deadline.
 */
void conn_wait (struct conn *conn, struct waiter *waiter);

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
