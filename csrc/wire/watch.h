/* SPDX-License-Identifier: BSD-3-Clause */

/* The connections that a thread waits on in poll; see watch.c. */

#ifndef NBDM_WATCH_H
#define NBDM_WATCH_H

#include <stdbool.h>

#include "api.h"
#include "wire/conn.h"

struct mailbox;
struct pollfd;

#define WATCH_CONNS (2 * NBDM_MAX_REMOTES) /* a lost one, and its successor */

struct watched {
  struct conn *conn; /* a reference; NULL: free */
  unsigned pending;  /* waiters not answered */
  struct watcher watcher;
};

/* All of it is its thread's own. */
struct watch {
  struct mailbox *box; /* a reference: where its waiters are posted */
  bool rung;           /* by the latest watch_poll's account */
  unsigned top;        /* all above are free: mostly there is one a remote */
  struct watched conns[WATCH_CONNS];
};

/* -ENOMEM: no memory or no descriptor for a mailbox. */
int watch_init (struct watch *watch);
/* Stop watching the connections that no waiter is pending on. */
void watch_leave_idle (struct watch *watch);
/* All waiters have been taken. */
void watch_end (struct watch *watch);

/* Is there room for the connections of one more request? */
bool watch_has_room (const struct watch *watch);
/* A waiter of the connection's is going to be posted to the box. */
void watch_expect (struct watch *watch, struct conn *conn);
/* It was, and taken. */
void watch_answered (struct watch *watch, const struct conn *conn);
/* Send what was issued on all of them. */
void watch_push (const struct watch *watch);
/* Wait for the caller's own descriptor, an answer, or the mailbox, and take in
 * what came.  `own->revents` is set.  0: none of them within `timeout_ms`.
 */
int watch_poll (struct watch *watch, struct pollfd *own, int timeout_ms);
/* The waiters that were posted since the last time, as mailbox_take's. */
struct waiter *watch_take (struct watch *watch);

#endif /* NBDM_WATCH_H */
