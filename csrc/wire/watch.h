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

/* Only its thread uses it. */
struct watch {
  struct mailbox *box; /* a reference: where its waiters are posted */
  bool rung;           /* as the latest watch_poll saw it */
  unsigned top; /* all above are free: mostly one entry a remote is used */
  struct watched conns[WATCH_CONNS];
};

/* -ENOMEM: no memory or no descriptor for a mailbox. */
int watch_init (struct watch *watch);
/* Stop watching the connections that no waiter is pending on. */
void watch_leave_idle (struct watch *watch);
/* End it; the thread has taken all waiters. */
void watch_end (struct watch *watch);

/* Is there room for the connections of one more request? */
bool watch_has_room (const struct watch *watch);
/* A waiter of the connection will be posted to the box. */
void watch_expect (struct watch *watch, struct conn *conn);
/* That waiter was posted and the thread has taken it. */
void watch_answered (struct watch *watch, const struct conn *conn);
/* Send what was issued on all of them. */
void watch_push (const struct watch *watch);
/* Wait for the caller's own descriptor, an answer or the mailbox, and receive
 * the answers.  Sets `own->revents`.  0: nothing came within `timeout_ms`.
 */
int watch_poll (struct watch *watch, struct pollfd *own, int timeout_ms);
/* The waiters posted since the last call, as mailbox_take. */
struct waiter *watch_take (struct watch *watch);

#endif /* NBDM_WATCH_H */
