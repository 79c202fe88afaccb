/* SPDX-License-Identifier: BSD-3-Clause */

/* A thread waits in poll for its own descriptor, its mailbox, and each
 * connection on which it has commands under way.
 *
 * The thread watches a connection from the first command until it waits again
 * with none under way.  So it may watch a lost connection and its successor
 * together for a while.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <string.h>

#include "wire/mailbox.h"
#include "wire/transport.h"
#include "wire/watch.h"

int
watch_init (struct watch *w)
{
  memset (w, 0, sizeof *w);
  w->box = mailbox_new ();
  return w->box ? 0 : -ENOMEM;
}

static struct watched *
find (struct watch *w, const struct conn *conn)
{
  for (unsigned i = 0; i < w->top; i++)
    if (w->conns[i].conn == conn)
      return &w->conns[i];
  return NULL;
}

/* A request has so few connections that there is always a place for one. */
bool
watch_has_room (const struct watch *w)
{
  unsigned nr = WATCH_CONNS - w->top;

  for (unsigned i = 0; i < w->top; i++)
    if (w->conns[i].conn == NULL)
      nr++;
  return nr >= NBDM_MAX_REMOTES;
}

void
watch_expect (struct watch *w, struct conn *conn)
{
  struct watched *at = find (w, conn);

  if (at == NULL) {
    at = find (w, NULL);
    if (at == NULL)
      at = &w->conns[w->top++];
    at->conn = conn_get (conn);
    at->watcher = (struct watcher){ .box = w->box };
  }
  at->pending++;
}

void
watch_answered (struct watch *w, const struct conn *conn)
{
  find (w, conn)->pending--;
}

void
watch_push (const struct watch *w)
{
  for (unsigned i = 0; i < w->top; i++)
    if (w->conns[i].conn)
      conn_push (w->conns[i].conn);
}

void
watch_leave_idle (struct watch *w)
{
  for (unsigned i = 0; i < w->top; i++) {
    struct watched *at = &w->conns[i];

    if (at->conn == NULL || at->pending > 0)
      continue;
    conn_unwatch (at->conn, &at->watcher);
    conn_put (at->conn);
    at->conn = NULL;
  }
  while (w->top > 0 && w->conns[w->top - 1].conn == NULL)
    w->top--;
}

void
watch_end (struct watch *w)
{
  if (w->box == NULL)
    return;
  watch_leave_idle (w);
  mailbox_put (w->box);
}

int
watch_poll (struct watch *w, struct pollfd *own, int timeout_ms)
{
  struct pollfd fds[2 + WATCH_CONNS];
  struct watched *polled[WATCH_CONNS];
  nfds_t nr = 0;
  bool posted;
  int found;

  watch_leave_idle (w);
  fds[0] = *own;
  fds[1] = (struct pollfd){ .fd = w->box->fd, .events = POLLIN };
  for (unsigned i = 0; i < w->top; i++) {
    struct watched *at = &w->conns[i];
    short events;

    if (at->conn == NULL)
      continue;
    events = conn_before_poll (at->conn, &at->watcher);
    fds[2 + nr] = (struct pollfd){ .fd = events ? conn_fd (at->conn) : -1,
                                   .events = events };
    polled[nr++] = at;
  }
  /* This thread's own posts do not ring. */
  posted = atomic_load (&w->box->posted);
  found = poll (fds, 2 + nr, posted ? 0 : timeout_ms);
  if (found < 0)
    memset (fds, 0, sizeof fds);
  for (nfds_t i = 0; i < nr; i++)
    conn_after_poll (polled[i]->conn, &polled[i]->watcher, fds[2 + i].revents);
  w->rung = fds[1].revents;
  own->revents = fds[0].revents;
  return found == 0 && posted ? 1 : found;
}

struct waiter *
watch_take (struct watch *w)
{
  return mailbox_take (w->box, w->rung);
}
