/* SPDX-License-Identifier: BSD-3-Clause */

/* Resync: copy dirty regions to a remote while clients read and write.
 *
 * One region's way to clean (rule 3):
 *
 *   range lock, late -> read local -> send -> answered -> `copied`, not late,
 *   unlock
 *   ... -> flush begun after that answer, succeeded -> dirty bit cleared
 *
 * The lock is held from read to answer only.  Between the answer and the
 * flush the region's dirty bit stays, for a crash; but writes already go to
 * both legs, or the copy would be stale before its bit is cleared.
 *
 * Copies go on while a flush is under way, or a link with a long way, or a
 * slow disk behind it, would idle from the last copy to the flush's answer.
 * What was answered before the flush began is in `flushing`, and nothing else
 * is cleared by its success.  A call walks the regions once, upwards, and ends
 * with a flush of all it copied: so no region is copied again while a flush is
 * under way that would then be taken to cover its second copy.
 *
 * One call goes on for as long as its caller likes, because each end of it
 * leaves the link idle for two round trips.  What may change meanwhile, how
 * much is under way and how long it rests, is read anew for each copy
 * (nbdm_resync_pace); a pause, a stop or a lost connection ends the call.  A
 * copy does not outlive it, as no thread would take its answer and free its
 * range.
 *
 * Never wait for a range while holding another: a client's write may wait for
 * the range we hold and stand before us at the range we want.  So a range that
 * is not free at once is taken only after every copy under way has ended, and
 * the flush with them, so that its regions are soon clean.  For the same reason
 * nothing is under way while we rest.
 */

#include <errno.h>
#include <stdlib.h>

#include "api.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/fault.h"
#include "base/latency.h"
#include "base/lock.h"
#include "logs/dirty_map.h"
#include "resync/resync.h"
#include "resync/resync_copy.h"
#include "volume/backlog.h"
#include "volume/flush.h"
#include "volume/state.h"
#include "volume/volume.h"
#include "wire/conn.h"

#define MAX_DEPTH 64
#define LEAST_COMMAND (64u << 10) /* a region may be less */

/* What was copied is flushed when it is this old, so that progress shows, or
 * this much (flush_bytes), so that little is copied again after an outage.
 */
#define FLUSH_NS 500000000
#define MAX_REST_NS 2000000000 /* that progress shows */

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
bytes_of (const struct batch *b, const struct runs *runs)
{
  uint64_t count = 0;

  for (size_t i = 0; i < runs->nr; i++)
    count += runs->list[i].count;
  return count * b->remote->disk.volume->region_size;
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

/* Free those whose answers are in, so that no client waits for our turn. */
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

/* Everything in `flushing` was answered before the flush began: clear it. */
static void
clean (struct batch *b)
{
  struct remote *r = b->remote;
  struct nbdm *v = r->disk.volume;
  uint64_t cleaned = 0;

  fault_point ("resync_before_clean");
  pthread_mutex_lock (&v->lock);
  if (!v->failed && r->conn == b->conn)
    for (size_t i = 0; i < b->flushing.nr; i++)
      cleaned += dirty_map_clean (&r->disk.dm, b->flushing.list[i].first,
                                  b->flushing.list[i].count);
  /* It may be the only one to have what is written next: see remote_miss_locked
   * in admit.c.
   */
  if (cleaned > 0 && v->local.state != NBDM_LOCAL_OK)
    volume_persist_locked (v);
  fault_point ("resync_after_clean");
  b->cleaned_bytes += cleaned * v->region_size;
  r->disk.copied_bytes += cleaned * v->region_size;
  pthread_mutex_unlock (&v->lock);
  b->flushing.nr = 0;
}

/* Take the answer of the flush under way, if it is there; or wait for it. */
static int
end_flush (struct batch *b, bool wait)
{
  int rc = 0;

  if (wait)
    rc = remote_flush_end (&b->flush);
  else if (!remote_flush_poll (&b->flush, &rc))
    return 0;
  b->flush_begun = false;
  b->flush_ended_ns = now_ns ();
  if (rc < 0)
    return set_message (-ENOTCONN, "the connection was lost");
  clean (b);
  return 0;
}

static bool
is_pressed (const struct batch *b)
{
  struct nbdm *v = b->remote->disk.volume;

  LOCK_FOR_SCOPE (&v->lock);
  return backlog_pressed_locked (b->remote);
}

/* Beside copies that go on: one flush at a time, when it is due. */
static int
drive_flush (struct batch *b)
{
  if (b->flush_begun)
    return end_flush (b, false);
  if (b->copied.nr > 0
      && (now_ns () - b->flush_ended_ns >= FLUSH_NS
          || bytes_of (b, &b->copied) >= b->remote->disk.volume->flush_bytes
          || is_pressed (b)))
    begin_flush (b);
  return 0;
}

/* End all that another thread may wait for: every copy, and the flush. */
static int
end_copies_and_flush (struct batch *b)
{
  int rc = end_all (b);

  return rc == 0 && b->flush_begun ? end_flush (b, true) : rc;
}

/* No copy is under way any more: flush what is not. */
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

/* In line with clients' writes. */
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

/* Before this thread waits in line for room, its own copies are answered and
 * flushed: a waiter in that line may lead no flush.  An error there is a lost
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

/* Before a range is held: wait for what is under way, if that makes room. */
static int
make_room (struct batch *b)
{
  struct nbdm *v = b->remote->disk.volume;
  bool full;

  pthread_mutex_lock (&v->lock);
  full
      = backlog_room_locked (b->remote, BACKLOG_DATA, b->pace.copy_bytes, false)
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

/* Copy the run's beginning: 1 it is under way, 0 look again, -errno. */
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
  b->cursor = run->first + run->count;
  return rc < 0 ? rc : 1;
}

/* Start one copy: 1 go on, 0 nothing left to copy, -errno. */
static int
start_copy (struct batch *b)
{
  struct remote *r = b->remote;
  struct nbdm *v = r->disk.volume;
  struct copy *copy;
  struct run run;
  bool found;
  int rc = end_answered (b);

  while (rc == 0 && b->nr_busy >= b->pace.depth)
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

/* Is the call over, whatever is left?  Else takes the pace to go on at. */
static bool
call_over (struct batch *b)
{
  struct remote *r = b->remote;
  struct nbdm *v = r->disk.volume;

  LOCK_FOR_SCOPE (&v->lock);
  b->pace = r->disk.pace;
  return r->paused || v->waking || b->issued_bytes >= b->max_bytes
         || now_ns () >= b->until_ns;
}

/* Leave the remote to clients for a while; nothing may be under way. */
static void
rest (struct batch *b, uint64_t rest_ns)
{
  struct remote *r = b->remote;
  struct nbdm *v = r->disk.volume;
  uint64_t until_ns = now_ns () + rest_ns;
  bool resting = true;

  LOCK_FOR_SCOPE (&v->lock);
  while (resting && r->conn == b->conn && !r->paused && !v->waking
         && !v->stopping && r->disk.pace.rest_us > 0)
    resting = wait_until (&v->events, &v->lock, until_ns);
}

/* After a burst: no thread may have to wait for us while we rest. */
static int
rest_if_due (struct batch *b)
{
  uint64_t burst_ns = b->pace.burst_us * NS_PER_US;
  uint64_t rest_ns = b->pace.rest_us * NS_PER_US;
  uint64_t took_ns = now_ns () - b->burst_ns;
  int rc;

  if (rest_ns == 0 || took_ns < burst_ns)
    return 0;
  rc = end_copies_and_flush (b);
  took_ns = now_ns () - b->burst_ns;
  /* On a slow link one copy takes many bursts: clients get their share. */
  if (burst_ns > 0 && took_ns > burst_ns) {
    double longer = (double)rest_ns * (double)took_ns / (double)burst_ns;

    if (longer > MAX_REST_NS)
      longer = MAX_REST_NS;
    if (longer > (double)rest_ns)
      rest_ns = (uint64_t)longer;
  }
  if (rc == 0) {
    latency_copying (&b->remote->disk.volume->latency, false);
    rest (b, rest_ns);
    latency_copying (&b->remote->disk.volume->latency, true);
  }
  b->burst_ns = now_ns ();
  return rc;
}

static int
run_batch (struct batch *b, struct nbdm_resync *io)
{
  struct nbdm *v = b->remote->disk.volume;
  int rc = 1, end_rc;

  while (rc == 1 && !call_over (b)) {
    rc = start_copy (b);
    if (rc == 1) {
      int flush_rc = drive_flush (b);

      if (flush_rc == 0)
        flush_rc = rest_if_due (b);
      if (flush_rc < 0)
        rc = flush_rc;
    }
  }
  end_rc = end_all (b);
  io->next_region = rc == 1 || rc < 0 ? b->cursor : 0;
  io->zero_bytes = b->zero_bytes;
  if (rc >= 0)
    rc = end_rc;
  /* A local read error must not keep the others from becoming clean. */
  end_rc = flush_all (b);
  if (rc >= 0)
    rc = end_rc;
  io->copied_bytes = b->cleaned_bytes;
  LOCK_FOR_SCOPE (&v->lock);
  if (b->remote->state == NBDM_RESYNCING)
    remote_update_state_locked (b->remote);
  return rc;
}

static int
allocate (struct batch *b)
{
  const struct nbdm *v = b->remote->disk.volume;

  TAILQ_INIT (&b->idle);
  TAILQ_INIT (&b->busy);
  b->buf_size
      = v->region_size > RESYNC_COPY_BYTES ? v->region_size : RESYNC_COPY_BYTES;
  b->copies = calloc (MAX_DEPTH, sizeof *b->copies);
  if (b->copies == NULL)
    return set_error (-ENOMEM, "resync");
  for (uint32_t i = 0; i < MAX_DEPTH; i++) {
    pthread_cond_init (&b->copies[i].granted, NULL);
    TAILQ_INSERT_HEAD (&b->idle, &b->copies[i], link);
  }
  return 0;
}

static void
release (struct batch *b)
{
  for (uint32_t i = 0; b->copies && i < MAX_DEPTH; i++) {
    free (b->copies[i].buf);
    pthread_cond_destroy (&b->copies[i].granted);
  }
  free (b->copies);
  free (b->copied.list);
  free (b->flushing.list);
  conn_put (b->conn);
}

struct resync_pace
resync_pace (const struct nbdm *v, const struct nbdm_pace *pace)
{
  uint32_t bytes = pace->copy_bytes ? pace->copy_bytes : RESYNC_COPY_BYTES;
  uint32_t region = v->region_size;
  uint32_t depth = pace->depth < 1           ? 1
                   : pace->depth > MAX_DEPTH ? MAX_DEPTH
                                             : pace->depth;
  struct resync_pace found
      = { .burst_us = pace->burst_us, .rest_us = pace->rest_us };

  bytes = bytes < RESYNC_COPY_BYTES ? bytes : RESYNC_COPY_BYTES;
  found.command_bytes = bytes > LEAST_COMMAND ? bytes : LEAST_COMMAND;
  found.window = depth < RESYNC_COPY_COMMANDS ? depth : RESYNC_COPY_COMMANDS;
  found.copy_bytes = bytes > region ? bytes - bytes % region : region;
  /* As much is under way in fewer copies, if a region is longer than one. */
  found.depth = (uint32_t)((uint64_t)depth * bytes / found.copy_bytes);
  if (found.depth < 1)
    found.depth = 1;
  if (found.depth > depth)
    found.depth = depth;
  return found;
}

static void
set_pace_locked (struct disk *d, const struct nbdm_pace *pace)
{
  if (d->pace.rest_us > 0 && pace->rest_us == 0)
    pthread_cond_broadcast (&d->volume->events); /* ends the rest */
  d->pace = resync_pace (d->volume, pace);
}

int
nbdm_disk_resync_pace (struct nbdm *v, uint32_t disk,
                       const struct nbdm_pace *pace)
{
  struct disk *d = volume_disk (v, disk);

  if (d == NULL)
    return no_such_disk (disk);
  LOCK_FOR_SCOPE (&v->lock);
  set_pace_locked (d, pace);
  return 0;
}

static int
resync_remote (struct remote *r, struct nbdm_resync *io)
{
  struct nbdm *v = r->disk.volume;
  uint64_t now = now_ns ();
  struct batch b = {
    .cursor = io->first_region,
    .max_bytes = io->max_bytes,
    .until_ns = io->max_ms ? now + io->max_ms * NS_PER_MS : NEVER,
    .burst_ns = now,
    .flush_ended_ns = now,
    .hole_bytes = RESYNC_MIN_HOLE,
  };
  int rc = 0;

  b.remote = r;
  pthread_mutex_lock (&v->lock);
  if (v->failed || v->stopping || !r->admitted)
    rc = set_message (-ENOTCONN, "the remote is not connected");
  else {
    b.conn = conn_get (r->conn);
    r->disk.copying = true;
    r->disk.pace = resync_pace (v, &io->pace);
    r->answer_ns = UINT64_MAX;
  }
  pthread_mutex_unlock (&v->lock);
  if (rc < 0)
    return rc;
  rc = allocate (&b);
  if (rc == 0) {
    latency_copying (&v->latency, true);
    rc = run_batch (&b, io);
    latency_copying (&v->latency, false);
  }
  pthread_mutex_lock (&v->lock);
  r->disk.copying = false;
  pthread_mutex_unlock (&v->lock);
  release (&b);
  return rc;
}

int
nbdm_disk_resync (struct nbdm *v, uint32_t disk, struct nbdm_resync *io)
{
  if (volume_disk (v, disk) == NULL)
    return no_such_disk (disk);
  io->next_region = io->copied_bytes = io->zero_bytes = 0;
  return disk == NBDM_LOCAL ? resync_local (v, io)
                            : resync_remote (&v->remotes[disk - 1], io);
}
