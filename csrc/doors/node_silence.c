/* SPDX-License-Identifier: BSD-3-Clause */

/* Notices within 10 s that the other side of a claim is gone.
 *
 * A primary sends a request at the latest 4.5 s after the last answer, also on
 * a connection without use (wire/silence.c).  So silence means that it, its
 * host or the network has failed.  Its silence counts only while we owe it no
 * answer and read what it sends: a primary with a request under way waits for
 * us.
 *
 * These end the silence: bytes from it, and bytes that it acknowledges, as a
 * long answer may take a slow link longer than the limit.  A thread that
 * did not run for a while looks at the socket before it judges.
 */

#define _GNU_SOURCE
#include <poll.h>
#include <sys/socket.h>

#include "base/clock.h"
#include "base/lock.h"
#include "doors/direct.h"
#include "doors/direct_answer.h"
#include "doors/direct_server.h"
#include "doors/node_calls.h"
#include "doors/node_silence.h"

void
node_heard (struct session *s)
{
  s->quiet.heard_ns = now_coarse_ns ();
}

/* A request is at the disk, or waits here for room.  Not if answers wait to be
 * sent: then the other side must read.
 */
static bool
is_owed (struct session *s)
{
  LOCK_FOR_SCOPE (&s->lock);
  return s->first == NULL
         && (s->stalled || s->waiting || s->nr_ops > (s->filling ? 1u : 0u));
}

static bool
has_moved (struct session *s)
{
  uint64_t moved = atomic_load_explicit (&s->moved, memory_order_relaxed);
  uint64_t unread = (uint64_t)answers_unread (s->fd);
  bool more = moved != s->quiet.moved || unread < s->quiet.unread;

  s->quiet.moved = moved;
  s->quiet.unread = unread;
  return more;
}

static bool
has_input (const struct session *s)
{
  struct pollfd fd = { .fd = s->fd, .events = POLLIN };

  return poll (&fd, 1, 0) > 0;
}

bool
node_is_gone (struct session *s)
{
  const struct node_calls *calls = direct_calls (s->server);
  uint64_t now = now_coarse_ns ();

  if (has_moved (s) || is_owed (s))
    s->quiet.heard_ns = now;
  if (now < s->quiet.heard_ns + calls->silence_ns || has_input (s))
    return false;
  direct_log (s, "another node: silent for %u ms, its session ends",
              (unsigned)((now - s->quiet.heard_ns) / NS_PER_MS));
  (void)shutdown (s->fd, SHUT_RDWR);
  return true;
}
