/* SPDX-License-Identifier: BSD-3-Clause */

/* One NBD connection to a remote; see conn.c. */

#ifndef NBDM_CONN_H
#define NBDM_CONN_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/queue.h>

#include "api.h"

struct conn;
struct mailbox;

/* Counts the unanswered commands that one thread waits for on one connection.
 * The thread sleeps in conn_wait, or has a mailbox to which the waiter is
 * posted.
 */
struct waiter {
  unsigned pending;        /* commands not answered yet; under conn->lock */
  bool asleep;             /* under conn->lock */
  struct waiter *next;     /* of those asleep, or posted */
  atomic_uint wake_reason; /* futex: enum wake_reason in conn.c */
  struct mailbox *box;     /* or NULL */
  void *owner;             /* for the thread that reads the box */
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

/* How much of the command the plain transport has sent. */
enum command_sent { COMMAND_QUEUED, COMMAND_LEAVING, COMMAND_SENT };

/* One command of ours; lives as long as its waiter.  What `buf` points to must
 * stay until the command is answered.
 */
struct command {
  enum command_kind kind;
  uint64_t offset, length; /* bytes */
  void *buf;               /* only read from when writing */
  bool fua;
  bool may_trim;

  struct waiter *waiter;
  struct conn *conn;
  int error; /* of the answer: 0 or an errno; ENOTCONN: there was none */
  uint64_t issued_ns, answered_ns;
  uint64_t bytes; /* to move for it and for the commands before it: silence.c */
  TAILQ_ENTRY (command) link; /* of those outstanding */
  uint64_t cookie;            /* this and below: the plain transport's */
  enum command_sent sent;
  bool replied;  /* the header of its answer has come */
  bool complete; /* all of the answer came before the request had wholly left */
};

/* What the server said in the handshake. */
#define CONN_DESCRIPTION 512 /* bytes, with the NUL */

struct conn_info {
  uint64_t size; /* bytes */
  uint32_t min_block;
  uint32_t max_payload; /* bytes of a read or write */
  bool read_only;
  bool can_flush;
  bool can_fua;
  bool can_zero;
  bool can_fast_zero;
  char description[CONN_DESCRIPTION]; /* the server's words, or empty */
};

/* Connect; blocks up to timeout_ms (name resolution aside).  -errno with a
 * message.  The caller owns one reference.
 */
int conn_open (const char *uri, uint32_t timeout_ms, struct conn **conn);
struct conn *conn_get (struct conn *conn);
/* The last reference closes the connection.  No command is outstanding then:
 * its issuer holds a reference until the answer.
 */
void conn_put (struct conn *conn);
const struct conn_info *conn_info (const struct conn *conn);
/* Forget that the server offered WRITE_ZEROES.  Call it before any other thread
 * uses the connection.
 */
void conn_without_zeroes (struct conn *conn);

/* Send a command now, or at the latest in conn_wait, or in conn_push if the
 * waiter has a mailbox; does not block.  -ENOTCONN: the command is not sent,
 * and the waiter does not count it.
 */
int conn_issue (struct conn *conn, struct command *cmd, struct waiter *waiter);
/* Block until all of the waiter's commands are answered or the connection is
 * dead.  The ticker's deadline bounds the wait.
 */
void conn_wait (struct conn *conn, struct waiter *waiter);

/* Send what conn_issue left, until the socket is full. */
void conn_push (struct conn *conn);

/* A thread that waits in poll for several descriptors, one of them this
 * connection's.  From conn_before_poll to conn_after_poll it may be the poller.
 * After that it is absent: it works and receives no answers, and any waiter may
 * become the poller in its place.  Waiters that already sleep are not woken;
 * the ticker receives their answers at most 50 ms later.
 */
struct watcher {
  struct mailbox *box; /* rung when there is no poller */
  TAILQ_ENTRY (watcher) link;
  bool listed;  /* under conn->lock */
  bool polling; /* its own thread's */
};

/* Can a thread watch it?  Not if libnbd moves the bytes. */
bool conn_watchable (const struct conn *conn);
int conn_fd (const struct conn *conn);
/* Before a poll: the events to wait for on conn_fd. */
short conn_before_poll (struct conn *conn, struct watcher *watcher);
/* After the poll, with its events: send, receive answers, become absent. */
void conn_after_poll (struct conn *conn, struct watcher *watcher, short events);
/* The watcher has no command outstanding there any more. */
void conn_unwatch (struct conn *conn, struct watcher *watcher);

/* Read it all, in commands as long as the server takes; blocks. */
int conn_pread (struct conn *conn, uint8_t *buf, uint64_t count,
                uint64_t offset);
/* Whether conn_wait would return at once. */
bool conn_answered_all (struct conn *conn, const struct waiter *waiter);

/* The ticker's part: receive answers if no other thread does, notice a closed
 * connection, kill it if it was silent for deadline_ms, and send the server a
 * command if it is silent and none is under way (silence.c).  From `hurry_ns`
 * on (0: never) the volume stops, and only answers end the silence.
 */
void conn_tick (struct conn *conn, uint32_t deadline_ms, uint64_t hurry_ns);
/* End all outstanding commands with ENOTCONN.  `why` is kept unless the
 * connection was dead before.
 */
void conn_kill (struct conn *conn, const char *why);
/* Say goodbye to the server; then kill. */
void conn_farewell (struct conn *conn);
bool conn_dead (struct conn *conn);

/* A connection at one moment. */
struct conn_report {
  bool dead;
  bool overdue; /* it died because a deadline passed */
  uint64_t
      outstanding;   /* commands without an answer; the ticker's not counted */
  uint64_t answered; /* answers since it was opened, counted the same way */
  char why[NBDM_REASON_LEN]; /* why it died, or "" */
};

struct conn_report conn_report (struct conn *conn);

#endif /* NBDM_CONN_H */
