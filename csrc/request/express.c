/* SPDX-License-Identifier: BSD-3-Clause */

/* The write path without a thread for each request: for small writes while all
 * disks are well, which is nearly always.
 *
 * A request that waits for a remote in a thread of its own costs two wake-ups,
 * the remote's answer and the next request's turn at the socket, and they cost
 * more than everything else together (docs/performance.md).  Here the thread
 * that reads a client's socket admits the write, issues its commands, writes
 * locally, goes on to the next, and sends the answer when it has taken in the
 * remote's.
 *
 * That thread may wait only for the client, the remotes and a quick local disk:
 * other requests wait behind it, and it might wait for one of its own.  So each
 * step is that of engine.c, if it needs no wait; else nothing is done, and a
 * worker runs the whole request in the blocking way.  A worker also completes a
 * request that began here and then failed (a lost remote, an error of a disk).
 * Rules and order are the same, and the same code keeps them: admit.c, and the
 * two steps of a request's end in engine.c.
 */

#include <errno.h>
#include <stddef.h>

#include "api.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/latency.h"
#include "logs/inflight.h"
#include "request/admit.h"
#include "request/engine.h"
#include "request/express.h"
#include "volume/local.h"
#include "volume/local_state.h"
#include "volume/policy.h"
#include "volume/volume.h"
#include "wire/conn.h"
#include "wire/watch.h"

#define EXPRESS_BYTES (64u << 10) /* a longer copy would delay others */

/* The answer may come at once, on another thread. */
static void
issue (const struct nbdm *v, struct express *x, struct watch *watch)
{
  struct request *req = &x->request;
  uint32_t nr = v->nr_remotes;

  x->legs_left = 0;
  for (uint32_t i = 0; i < nr; i++)
    if (req->legs[i].active && req->legs[i].nr > 0)
      x->legs_left++;
  for (uint32_t i = 0; i < nr; i++) {
    struct leg *leg = &req->legs[i];

    if (!leg->active || leg->nr == 0)
      continue;
    leg->waiter.box = watch->box;
    leg->waiter.owner = x;
    if (conn_issue (leg->conn, &leg->commands[0], &leg->waiter) == 0) {
      watch_expect (watch, leg->conn);
      continue;
    }
    leg->commands[0].error = ENOTCONN;
    leg->waiter.box = NULL; /* no answer will come */
    x->legs_left--;
  }
}

bool
express_begin (struct nbdm *v, struct express *x, const void *buf,
               uint32_t count, uint64_t offset, uint32_t flags,
               struct watch *watch)
{
  struct request *req = &x->request;

  if (!watch_has_room (watch) || count == 0 || count > EXPRESS_BYTES
      || (flags & NBDM_FUA) || !local_is_quick (v, true)
      || check_range (v, count, offset) < 0 || !in_sectors (v, count, offset))
    return false;
  req->start_ns = now_ns ();
  req->kind = SLOT_WRITE;
  req->flags = 0;
  req->offset = offset;
  req->length = count;
  req->buf = buf;
  req->sector = NULL;
  req->long_zero = NULL;
  if (!request_try_admit (v, req))
    return false;
  fault_point ("after_log");
  issue (v, x, watch);
  fault_point ("after_issue");
  return true;
}

struct express *
express_answered (struct watch *watch, struct waiter *waiter)
{
  const struct leg *leg
      = (struct leg *)((char *)waiter - offsetof (struct leg, waiter));
  struct express *x = waiter->owner;

  watch_answered (watch, leg->conn);
  return --x->legs_left == 0 ? x : NULL;
}

void
express_local (struct nbdm *v, struct express *x)
{
  x->local_rc = request_write_local (v, &x->request);
  inflight_done (&v->inflight, x->request.slot, 1);
  fault_point ("after_local");
}

static bool
all_succeeded (const struct nbdm *v, const struct express *x)
{
  bool well = x->local_rc == 0;

  for (uint32_t i = 0; i < v->nr_remotes && well; i++) {
    const struct leg *leg = &x->request.legs[i];

    if (leg->active && leg->nr > 0)
      well = leg->commands[0].error == 0;
  }
  return well;
}

bool
express_end (struct nbdm *v, struct express *x, int *rc)
{
  struct request *req = &x->request;

  if (!all_succeeded (v, x))
    return false;
  fault_point ("leg_answered");
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    if (req->legs[i].active)
      inflight_done (&v->inflight, req->slot, 2u << i);
  fault_point ("after_remote");
  return request_try_complete (v, req, rc);
}

int
express_complete (struct nbdm *v, struct express *x)
{
  struct request *req = &x->request;

  /* From here on this thread may block. */
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    if (req->legs[i].active)
      req->legs[i].waiter.box = NULL;
  return request_complete (v, req, x->local_rc);
}

bool
express_readable (const struct nbdm *v, uint32_t count)
{
  return count <= EXPRESS_BYTES && local_is_quick (v, false)
         && local_believed (v);
}

bool
express_read (struct nbdm *v, void *buf, uint32_t count, uint64_t offset)
{
  uint64_t start = now_ns ();

  if (check_range (v, count, offset) < 0 || fenced_read_check (v) < 0
      || !local_pread_believed (v, buf, count, offset))
    return false;
  latency_add (&v->latency, LATENCY_READ, start, now_ns ());
  atomic_fetch_add (&v->reads, 1);
  return true;
}
