/* SPDX-License-Identifier: BSD-3-Clause */

/* Resync: copy dirty regions to a remote while clients read and write.
 *
 * A region becomes clean in these steps (rule 3):
 *
 *   range lock, late -> read local -> send -> answered -> `copied`, not late,
 *   unlock
 *   ... -> flush begun after that answer, succeeded -> dirty bit cleared
 *
 * The lock is held only from the read to the answer.  Between the answer and
 * the flush the region's dirty bit stays set, because a crash may lose the
 * copy.  Clients' writes go to both legs from the answer on; otherwise the copy
 * would be stale before its bit is cleared.
 *
 * Copies continue while a flush is under way.  Otherwise a link with a long
 * round trip, or with a slow disk behind it, would be idle from the last copy
 * to the answer of the flush.  `flushing` lists the regions that were answered
 * before the flush began, and its success clears only these.  A call walks the
 * regions once, in ascending order, and ends with a flush of all it copied.  So
 * no region is copied again during a flush that would then seem to cover its
 * second copy.
 *
 * This call never waits for a range while it holds another: a client's write
 * may wait for the held range, and be ahead of this call in the queue for the
 * other one.  So if a range is not free at once, this call first ends every
 * copy under way, and the flush too, so that their regions soon become clean.
 * No command is under way during a rest, for the same reason.
 */

#include <errno.h>
#include <stdlib.h>

#include "api.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/fault.h"
#include "base/lock.h"
#include "logs/activity.h"
#include "logs/dirty_map.h"
#include "resync/resync_call.h"
#include "resync/resync_copy.h"
#include "volume/backlog.h"
#include "volume/flush.h"
#include "volume/local_state.h"
#include "volume/state.h"
#include "volume/volume.h"
#include "wire/conn.h"

static struct batch *
batch_of (struct resync_call *c)
{
  return (struct batch *)c; /* its first member */
}

static int
end_copy (struct batch *b, struct copy *copy)
{
  int rc = resync_end_copy (b, copy);

  TAILQ_REMOVE (&b->busy, copy, link);
  b->nr_busy--;
  TAILQ_INSERT_HEAD (&b->idle, copy, link);
  return rc;
}

static uint64_t
regions_of (const struct runs *runs)
{
  uint64_t count = 0;

  for (size_t i = 0; i < runs->nr; i++)
    count += runs->list[i].count;
  return count;
}

static int
end_all (struct batch *b)
{
  int rc = 0;

  while (!TAILQ_EMPTY (&b->busy)) {
    int one = end_copy (b, TAILQ_FIRST (&b->busy));
    if (rc == 0)
      rc = one;
  }
  return rc;
}

/* End the copies whose answers have arrived, so that no client waits for their
 * ranges.
 */
static int
end_answered (struct batch *b)
{
  struct copy *copy = TAILQ_FIRST (&b->busy), *next;
  int rc = 0;

  for (; copy && rc == 0; copy = next) {
    next = TAILQ_NEXT (copy, link);
    if (conn_answered_all (b->conn, &copy->waiter))
      rc = end_copy (b, copy);
  }
  return rc;
}

/* --- flushes --------------------------------------------------------- */

static void
begin_flush (struct batch *b)
{
  struct remote *r = b->remote;
  struct runs empty = b->flushing;

  fault_point ("resync_before_flush");
  b->flushing = b->copied;
  b->copied = empty;
  b->flush_begun = true;
  remote_flush_begin (r, &b->flush);
  fault_point ("resync_flush_begun");
}

/* Flush local before the remote's last dirty bits are cleared.  Copies from
 * local count only if local held all written data, and only a flush of local
 * shows that.  No copy is under way now, so the flush also covers the copies of
 * earlier calls.  Without an active extent nothing was written since the last
 * flush.
 */
static int
prove_copies_relock (struct batch *b)
{
  struct remote *r = b->remote;
  struct nbdm *v = r->disk.volume;
  int rc = 0;

  if (!r->unproven || r->conn != b->conn
      || regions_of (&b->flushing) < r->disk.dm.map[MAP_DIRTY].nr_set)
    return 0;
  if (v->local.state != NBDM_LOCAL_FAILED
      && activity_count (&v->activity) > 0) {
    pthread_mutex_unlock (&v->lock);
    rc = flush_local_group (v);
    pthread_mutex_lock (&v->lock);
  }
  /* If another remote takes local's place, the doubtful copies are dirty again.
   */
  if (rc < 0)
    rc = local_flush_failed_relock (v);
  if (rc == 0)
    r->unproven = false;
  return rc;
}

/* All regions in `flushing` were answered before the flush began: clear them.
 */
static int
clean (struct batch *b)
{
  struct remote *r = b->remote;
  struct nbdm *v = r->disk.volume;
  uint64_t cleaned = 0;
  int rc;

  fault_point ("resync_before_clean");
  pthread_mutex_lock (&v->lock);
  rc = prove_copies_relock (b);
  if (rc == 0 && !v->failed && r->conn == b->conn)
    for (size_t i = 0; i < b->flushing.nr; i++)
      cleaned += dirty_map_clean (&r->disk.dm, b->flushing.list[i].first,
                                  b->flushing.list[i].count);
  /* The remote may hold the only copy of the next write: see remote_miss_locked
   * in admit.c.
   */
  if (cleaned > 0 && v->local.state != NBDM_LOCAL_OK)
    volume_persist_locked (v);
  fault_point ("resync_after_clean");
  resync_cleaned_locked (&b->call, cleaned);
  pthread_mutex_unlock (&v->lock);
  b->flushing.nr = 0;
  return rc < 0 ? set_message (rc, "the local disk failed to flush") : 0;
}

/* Receive the answer of the flush under way if it is there, or wait for it. */
static int
end_flush (struct batch *b, bool wait)
{
  int rc = 0;

  if (wait)
    rc = remote_flush_end (&b->flush);
  else if (!remote_flush_poll (&b->flush, &rc))
    return 0;
  b->flush_begun = false;
  b->call.flush_ended_ns = now_ns ();
  if (rc < 0)
    return set_message (-ENOTCONN, "the connection was lost");
  return clean (b);
}

static bool
is_pressed (const struct batch *b)
{
  struct nbdm *v = b->remote->disk.volume;

  LOCK_FOR_SCOPE (&v->lock);
  return backlog_pressed_locked (b->remote);
}

/* Flush beside the copies: one flush at a time, when it is due. */
static int
drive_flush (struct resync_call *c)
{
  struct batch *b = batch_of (c);

  if (b->flush_begun)
    return end_flush (b, false);
  if (b->copied.nr > 0
      && (resync_flush_due (c, regions_of (&b->copied)
                                   * c->target->volume->region_size)
          || is_pressed (b)))
    begin_flush (b);
  return 0;
}

/* End everything that another thread may wait for: every copy, and the flush.
 */
static int
end_copies_and_flush (struct batch *b)
{
  int rc = end_all (b);

  return rc == 0 && b->flush_begun ? end_flush (b, true) : rc;
}

static int
settle (struct resync_call *c)
{
  return end_copies_and_flush (batch_of (c));
}

/* Flush all copies that are not flushed.  Called when no copy is under way. */
static int
flush_all (struct batch *b)
{
  int rc = 0;

  if (b->flush_begun)
    rc = end_flush (b, true);
  if (rc == 0 && b->copied.nr > 0) {
    begin_flush (b);
    rc = end_flush (b, true);
  }
  return rc;
}

/* --- room in the backlog --------------------------------------------- */

uint64_t
resync_try_room (struct batch *b, enum backlog_kind kind, uint64_t wanted)
{
  struct remote *r = b->remote;
  uint64_t room = wanted;

  LOCK_FOR_SCOPE (&r->disk.volume->lock);
  if (r->conn == b->conn)
    room = backlog_room_locked (r, kind, wanted, false);
  r->backlog.sent[kind] += room;
  return room;
}

/* Wait in the queue with clients' writes. */
static uint64_t
wait_for_room (struct batch *b, enum backlog_kind kind, uint64_t wanted)
{
  struct remote *r = b->remote;
  uint64_t room = wanted;

  LOCK_FOR_SCOPE (&r->disk.volume->lock);
  backlog_enter_relock (r, b->conn, kind);
  if (r->conn == b->conn)
    room = backlog_room_locked (r, kind, wanted, true);
  r->backlog.sent[kind] += room;
  backlog_leave_locked (r);
  return room;
}

/* Before this thread queues for room, it ends and flushes its own copies,
 * because a waiter in the queue may lead no flush.  An error means a lost
 * connection, which ends the copy as well.
 */
uint64_t
resync_take_room (struct batch *b, enum backlog_kind kind, uint64_t wanted)
{
  uint64_t room = resync_try_room (b, kind, wanted);

  if (room == 0 && b->flush_begun && end_flush (b, true) == 0)
    room = resync_try_room (b, kind, wanted);
  if (room == 0 && end_all (b) == 0 && flush_all (b) == 0)
    room = resync_try_room (b, kind, wanted);
  return room ? room : wait_for_room (b, kind, wanted);
}

/* Called before a range is locked.  If the backlog has no room for a copy, wait
 * for the flush under way, or for the copies, which makes room.
 */
static int
make_room (struct batch *b)
{
  struct nbdm *v = b->remote->disk.volume;
  bool full;

  pthread_mutex_lock (&v->lock);
  full = backlog_room_locked (b->remote, BACKLOG_DATA, b->call.pace.copy_bytes,
                              false)
         == 0;
  pthread_mutex_unlock (&v->lock);
  if (!full)
    return 0;
  return b->flush_begun ? end_flush (b, true) : end_all (b);
}

/* --- the call -------------------------------------------------------- */

static int
find_buffer (struct batch *b, struct copy *copy)
{
  if (copy->buf == NULL)
    copy->buf = malloc (b->buf_size);
  return copy->buf ? 0 : set_error (-ENOMEM, "resync");
}

/* Copy the beginning of the run.  1: the copy is under way; 0: find the run
 * again; -errno.
 */
static int
copy_run (struct batch *b, struct copy *copy, struct run *run)
{
  int rc = 0;

  resync_size_copy (b, copy, run);
  if (!copy->hole)
    rc = find_buffer (b, copy);
  if (rc < 0)
    return rc;
  rc = resync_lock_copy (b, copy);
  if (rc == 0) {
    rc = end_copies_and_flush (b);
    if (rc == 0)
      rc = resync_lock_copy (b, copy);
  }
  if (rc < 0)
    return rc;
  rc = resync_send_copy (b, copy);
  if (rc == -EAGAIN)
    return 0; /* the cursor has not moved */
  b->call.cursor = run->first + run->count;
  return rc < 0 ? rc : 1;
}

/* Start one copy.  1: continue; 0: nothing left to copy; -errno. */
static int
start_copy (struct resync_call *c)
{
  struct batch *b = batch_of (c);
  struct remote *r = b->remote;
  struct nbdm *v = r->disk.volume;
  struct copy *copy;
  struct run run;
  bool found;
  int rc = end_answered (b);

  while (rc == 0 && b->nr_busy >= b->call.pace.depth)
    rc = end_copy (b, TAILQ_FIRST (&b->busy));
  if (rc == 0)
    rc = make_room (b);
  if (rc < 0)
    return rc;
  pthread_mutex_lock (&v->lock);
  found = r->conn == b->conn && resync_find_run_locked (b, &run);
  pthread_mutex_unlock (&v->lock);
  if (!found)
    return 0;
  copy = TAILQ_FIRST (&b->idle);
  TAILQ_REMOVE (&b->idle, copy, link);
  rc = copy_run (b, copy, &run);
  if (rc == 1) {
    TAILQ_INSERT_TAIL (&b->busy, copy, link);
    b->nr_busy++;
    return 1;
  }
  TAILQ_INSERT_HEAD (&b->idle, copy, link);
  return rc < 0 ? rc : 1;
}

static int
finish (struct resync_call *c, int rc)
{
  struct batch *b = batch_of (c);
  int end_rc = end_all (b);

  if (rc >= 0)
    rc = end_rc;
  /* Flush also after a local read error: the copied regions can become clean.
   */
  end_rc = flush_all (b);
  if (rc >= 0)
    rc = end_rc;
  LOCK_FOR_SCOPE (&c->target->volume->lock);
  if (b->remote->state == NBDM_RESYNCING)
    remote_update_state_locked (b->remote);
  return rc;
}

static int
begin_locked (struct resync_call *c)
{
  struct batch *b = batch_of (c);
  struct remote *r = b->remote;
  const struct nbdm *v = r->disk.volume;

  if (v->failed || v->stopping || !r->admitted)
    return set_message (-ENOTCONN, "the remote is not connected");
  b->conn = conn_get (r->conn);
  r->answer_ns = UINT64_MAX;
  return 1;
}

static bool
usable_locked (const struct resync_call *c)
{
  const struct batch *b = (const struct batch *)c;

  return b->remote->conn == b->conn;
}

static int
prepare (struct resync_call *c)
{
  const struct nbdm *v = c->target->volume;
  struct batch *b = batch_of (c);

  TAILQ_INIT (&b->idle);
  TAILQ_INIT (&b->busy);
  b->buf_size
      = v->region_size > RESYNC_COPY_BYTES ? v->region_size : RESYNC_COPY_BYTES;
  b->copies = calloc (RESYNC_MAX_DEPTH, sizeof *b->copies);
  if (b->copies == NULL)
    return set_error (-ENOMEM, "resync");
  for (uint32_t i = 0; i < RESYNC_MAX_DEPTH; i++) {
    pthread_cond_init (&b->copies[i].granted, NULL);
    TAILQ_INSERT_HEAD (&b->idle, &b->copies[i], link);
  }
  return 0;
}

static void
release (struct resync_call *c)
{
  struct batch *b = batch_of (c);

  for (uint32_t i = 0; b->copies && i < RESYNC_MAX_DEPTH; i++) {
    free (b->copies[i].buf);
    pthread_cond_destroy (&b->copies[i].granted);
  }
  free (b->copies);
  free (b->copied.list);
  free (b->flushing.list);
  conn_put (b->conn);
}

static const struct copy_strategy to_remote = {
  .begin_locked = begin_locked,
  .prepare = prepare,
  .release = release,
  .copy = start_copy,
  .flush = drive_flush,
  .settle = settle,
  .usable_locked = usable_locked,
  .finish = finish,
  .stretches_rests = true,
};

int
resync_to_remote (struct remote *r, struct nbdm_resync *io)
{
  struct batch b = {
    .call = { .target = &r->disk, .how = &to_remote },
    .remote = r,
    .hole_bytes = RESYNC_MIN_HOLE,
    .answer_ns = UINT64_MAX,
  };

  return resync_run (&b.call, io);
}
