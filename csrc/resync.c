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
 * copy does not outlive it, as nobody would take its answer and free its
 * range.
 *
 * Never wait for a range while holding another: a client's write may wait for
 * the one we hold and stand before us at the one we want.  Nor while a flush is
 * ours to land: who has the range may wait for that flush, over a FUA write to
 * a server without FUA, or to make room in the activity log.  So a range that
 * is not free at once is taken only after every copy and flush under way has
 * ended.  For the same reason nothing is under way while we rest.
 */

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"
#include "volume.h"

#define MAX_DEPTH 64
#define COPY_BYTES (1u << 20) /* of data in one copy, or one region if more */
#define SEGMENT (64u << 10)   /* zeroes are looked for in pieces of this */
#define COPY_COMMANDS 32      /* under way for one copy */

/* Of a hole in one copy.  The range is held until the remote has zeroed it, so
 * it is as long as the remote is seen to be quick at that: a sparse image of
 * 100 GiB in hundreds of commands, a disk that writes its zeroes in 32 MiB.
 */
#define MIN_HOLE (32u << 20)
#define MAX_HOLE (1u << 30)
#define QUICK_NS 5000000 /* over what the link takes: 5 ms */

/* What was copied is flushed when it is this old, so that progress shows, or
 * this much (flush_bytes), so that little is copied again after an outage.
 */
#define FLUSH_NS 500000000

struct copy {
  struct range range;
  pthread_cond_t granted;
  bool hole;
  int error; /* -errno of commands already answered */
  uint8_t *buf;
  unsigned nr;
  struct command commands[COPY_COMMANDS];
  struct waiter waiter;
  uint64_t sent_ns;
  struct copy *next; /* in the queue of those under way, or free */
};

struct run {
  uint64_t first, count; /* regions */
};

struct runs {
  struct run *list;
  size_t nr, max;
};

struct batch {
  struct remote *remote;
  struct conn *conn;
  uint64_t cursor; /* region */
  uint64_t max_bytes, until_ns;
  uint64_t issued_bytes, zero_bytes, cleaned_bytes;
  struct resync_pace pace; /* as it was when the last copy began */
  uint64_t burst_ns;       /* when the burst under way began */
  uint64_t hole_bytes;
  size_t buf_size;
  struct copy *copies;
  struct copy *idle; /* the one used last first: its buffer is in the cache */
  struct copy *oldest, *newest; /* under way, in the order they were sent */
  uint32_t nr_busy;
  struct runs copied;   /* answered, no flush begun since */
  struct runs flushing; /* answered before `flush` began */
  struct remote_flush flush;
  bool flush_begun;
  uint64_t flush_ended_ns; /* the last one, or the call's begin */
};

/* The next run of regions to copy, at most as long as a hole may be. */
static bool
find_run_locked (struct batch *b, struct run *run)
{
  const struct remote *r = b->remote;
  const struct nbdm *v = r->volume;
  const struct bitmap *dirty = &r->dm.map[MAP_DIRTY];
  const struct bitmap *late = &r->dm.map[MAP_LATE];
  uint64_t nr = v->nr_regions, first = b->cursor, end;

  for (;;) {
    uint64_t next;

    first = bitmap_next_set (dirty, first, nr);
    if (first == nr)
      return false;
    next = bitmap_next_clear (late, first, nr);
    if (next == first)
      next = bitmap_next_clear (&r->dm.copied, first, nr);
    if (next == first)
      break;
    first = next;
  }
  end = first + b->hole_bytes / v->region_size;
  end = bitmap_next_clear (dirty, first, end < nr ? end : nr);
  end = bitmap_next_set (late, first, end);
  end = bitmap_next_set (&r->dm.copied, first, end);
  *run = (struct run){ first, end - first };
  return true;
}

/* Cut the run to one copy: a hole in whole regions, or data. */
static void
size_copy (struct batch *b, struct copy *copy, struct run *run)
{
  struct nbdm *v = b->remote->volume;
  uint64_t offset = run->first * v->region_size;
  uint64_t end = offset + run->count * v->region_size;
  uint64_t hole_end;

  if (end > v->size)
    end = v->size;
  /* The holes of a disk that misses something say nothing. */
  hole_end = atomic_load (&v->local.state) == NBDM_LOCAL_OK
                 ? local_hole_end (v, offset, end)
                 : offset;
  if (hole_end < end)
    hole_end -= hole_end % v->region_size;
  copy->hole = hole_end > offset && conn_info (b->conn)->can_zero;
  if (copy->hole)
    end = hole_end;
  else if (end - offset > b->pace.copy_bytes)
    end = offset + b->pace.copy_bytes;
  run->count = (end - offset + v->region_size - 1) / v->region_size;
  copy->range = (struct range){ .offset = offset,
                                .length = end - offset,
                                .granted = &copy->granted };
}

/* 1: held; 0: others, or a flush, are under way, end them first; -errno. */
static int
lock_copy (struct batch *b, struct copy *copy)
{
  struct nbdm *v = b->remote->volume;
  int rc = 1;

  pthread_mutex_lock (&v->lock);
  if (!rangelock_try (&v->ranges, &copy->range)) {
    if (b->nr_busy > 0 || b->flush_begun)
      rc = 0;
    else {
      rangelock_add (&v->ranges, &copy->range);
      while (copy->range.blockers > 0)
        pthread_cond_wait (&copy->granted, &v->lock);
    }
  }
  if (rc == 1 && (b->remote->conn != b->conn || v->failed || v->stopping)) {
    rangelock_remove (&v->ranges, &copy->range);
    rc = set_message (-ENOTCONN, "resync was interrupted");
  }
  /* A copy that is sent and never answered may arrive late, over a newer
   * one (rule 12), also if it is we who die: so it is late until answered.
   */
  if (rc == 1)
    mark_dirty_locked (b->remote, copy->range.offset, copy->range.length, true);
  pthread_mutex_unlock (&v->lock);
  fault_point ("resync_locked");
  return rc;
}

static void
collect_answers (struct batch *b, struct copy *copy)
{
  conn_wait (b->conn, &copy->waiter);
  for (unsigned i = 0; i < copy->nr; i++)
    if (copy->commands[i].error)
      copy->error = -copy->commands[i].error;
  copy->nr = 0;
}

/* Send [offset, offset + length) as data from the buffer, or as zeroes. */
static void
send_segment (struct batch *b, struct copy *copy, uint64_t offset,
              uint64_t length, bool zero)
{
  const struct conn_info *info = conn_info (b->conn);

  zero = zero && info->can_zero;
  while (length > 0) {
    struct command *cmd;

    if (copy->nr == COPY_COMMANDS)
      collect_answers (b, copy);
    cmd = &copy->commands[copy->nr++];
    *cmd = (struct command){
      .kind = zero ? COMMAND_ZERO : COMMAND_WRITE,
      .offset = offset,
      .length = length < info->max_payload ? length : info->max_payload,
      .buf = zero ? NULL : copy->buf + (offset - copy->range.offset),
      .may_trim = true,
    };
    if (conn_issue (b->conn, cmd, &copy->waiter) < 0)
      cmd->error = ENOTCONN;
    if (zero)
      b->zero_bytes += cmd->length;
    offset += cmd->length;
    length -= cmd->length;
  }
}

/* Adjacent segments of one kind travel as one. */
static void
send_data (struct batch *b, struct copy *copy)
{
  uint64_t length = copy->range.length, start = 0;
  bool zero = false;

  for (uint64_t at = 0; at < length; at += SEGMENT) {
    uint64_t n = length - at < SEGMENT ? length - at : SEGMENT;
    bool now_zero = all_zero (copy->buf + at, n);

    if (at > start && now_zero != zero) {
      send_segment (b, copy, copy->range.offset + start, at - start, zero);
      start = at;
    }
    zero = now_zero;
  }
  send_segment (b, copy, copy->range.offset + start, length - start, zero);
}

static void
clear_late_locked (struct remote *r, const struct range *range)
{
  uint64_t first, count;

  region_span (r->volume, range->offset, range->length, &first, &count);
  bitmap_clear (&r->dm.map[MAP_LATE], first, count);
}

/* Give a range back of which nothing was sent. */
static void
unlock_copy (struct batch *b, struct copy *copy)
{
  struct nbdm *v = b->remote->volume;

  pthread_mutex_lock (&v->lock);
  if (b->remote->conn == b->conn)
    clear_late_locked (b->remote, &copy->range);
  rangelock_remove (&v->ranges, &copy->range);
  pthread_mutex_unlock (&v->lock);
}

/* With the range held: read and send.  -errno: nobody has it to read. */
static int
send_copy (struct batch *b, struct copy *copy)
{
  struct nbdm *v = b->remote->volume;
  uint64_t offset = copy->range.offset, length = copy->range.length;
  int rc;

  copy->nr = 0;
  copy->error = 0;
  copy->waiter = (struct waiter)WAITER_INIT;
  copy->sent_ns = now_ns ();
  if (copy->hole) {
    /* It was a hole before we had the lock; a write may have filled it. */
    if (atomic_load (&v->local.state) != NBDM_LOCAL_OK
        || local_hole_end (v, offset, offset + length) < offset + length) {
      unlock_copy (b, copy);
      return -EAGAIN;
    }
    send_segment (b, copy, offset, length, true);
  }
  else {
    rc = source_pread (v, b->remote, copy->buf, length, offset);
    if (rc < 0) {
      unlock_copy (b, copy);
      return rc;
    }
    fault_point ("resync_after_read");
    send_data (b, copy);
  }
  fault_point ("resync_after_send");
  b->issued_bytes += length;
  return 0;
}

/* Put it at the end of the queue of those under way. */
static void
link_copy (struct batch *b, struct copy *copy)
{
  copy->next = NULL;
  if (b->newest)
    b->newest->next = copy;
  else
    b->oldest = copy;
  b->newest = copy;
  b->nr_busy++;
}

/* Take it out of the queue of those under way. */
static void
unlink_copy (struct batch *b, struct copy *copy)
{
  struct copy *before = NULL, *at = b->oldest;

  for (; at != copy; at = at->next)
    before = at;
  if (before)
    before->next = copy->next;
  else
    b->oldest = copy->next;
  if (b->newest == copy)
    b->newest = before;
  copy->next = b->idle;
  b->idle = copy;
  b->nr_busy--;
}

static int
remember_run (struct runs *runs, const struct run *run)
{
  struct run *last = runs->nr > 0 ? &runs->list[runs->nr - 1] : NULL;

  if (last && last->first + last->count == run->first) {
    last->count += run->count;
    return 0;
  }
  if (runs->nr == runs->max) {
    size_t max = runs->max ? 2 * runs->max : 64;
    struct run *list = realloc (runs->list, max * sizeof *list);

    if (list == NULL)
      return set_error (-ENOMEM, "resync");
    runs->list = list;
    runs->max = max;
  }
  runs->list[runs->nr++] = *run;
  return 0;
}

static uint64_t
bytes_of (const struct batch *b, const struct runs *runs)
{
  uint64_t count = 0;

  for (size_t i = 0; i < runs->nr; i++)
    count += runs->list[i].count;
  return count * b->remote->volume->region_size;
}

/* What the answer's time tells: how far the remote is, and how quickly it
 * zeroes.
 */
static void
measure_locked (struct batch *b, const struct copy *copy)
{
  struct remote *r = b->remote;
  uint64_t took_ns = now_ns () - copy->sent_ns;

  r->answered_bytes += copy->range.length;
  if (took_ns < r->answer_ns)
    r->answer_ns = took_ns;
  if (!copy->hole)
    return;
  if (took_ns > r->answer_ns + 2 * QUICK_NS && b->hole_bytes > MIN_HOLE)
    b->hole_bytes /= 2;
  else if (took_ns < r->answer_ns + QUICK_NS && b->hole_bytes < MAX_HOLE
           && copy->range.length > b->hole_bytes / 2)
    b->hole_bytes *= 2;
}

/* Wait for a copy's answers; its regions are `copied`, its range free. */
static int
end_copy (struct batch *b, struct copy *copy)
{
  struct remote *r = b->remote;
  struct nbdm *v = r->volume;
  char why[NBDM_REASON_LEN];
  struct run run;
  int rc;

  collect_answers (b, copy);
  fault_point ("resync_answered");
  unlink_copy (b, copy);
  rc = copy->error;
  pthread_mutex_lock (&v->lock);
  if (rc == -ENOTCONN || rc == -ESHUTDOWN) {
    conn_kill (b->conn, "the server is shutting down");
    remote_lost_locked (r, b->conn);
    rc = set_message (-ENOTCONN, "the connection was lost");
  }
  else if (rc < 0) {
    snprintf (why, sizeof why, "it answered a resync write at %llu with: %s",
              (unsigned long long)copy->range.offset, strerror (-rc));
    remote_broken_locked (r, b->conn, why);
    rc = set_message (-ENOTCONN, "%s", why);
  }
  else if (r->conn == b->conn) {
    clear_late_locked (r, &copy->range);
    region_span (v, copy->range.offset, copy->range.length, &run.first,
                 &run.count);
    rc = remember_run (&b->copied, &run);
    if (rc == 0)
      bitmap_set (&r->dm.copied, run.first, run.count);
    measure_locked (b, copy);
    fault_point ("resync_copied");
  }
  rangelock_remove (&v->ranges, &copy->range);
  pthread_mutex_unlock (&v->lock);
  return rc;
}

static int
end_all (struct batch *b)
{
  int rc = 0;

  while (b->oldest) {
    int one = end_copy (b, b->oldest);
    if (rc == 0)
      rc = one;
  }
  return rc;
}

/* Free those whose answers are in, so that no client waits for our turn. */
static int
end_answered (struct batch *b)
{
  struct copy *copy = b->oldest, *next;
  int rc = 0;

  for (; copy && rc == 0; copy = next) {
    next = copy->next;
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
  struct nbdm *v = r->volume;
  uint64_t cleaned = 0;

  fault_point ("resync_before_clean");
  pthread_mutex_lock (&v->lock);
  if (!v->failed && r->conn == b->conn)
    for (size_t i = 0; i < b->flushing.nr; i++)
      cleaned += dirty_map_clean (&r->dm, b->flushing.list[i].first,
                                  b->flushing.list[i].count);
  /* It may be the only one to have what is written next: see mark_first_locked
   * in admit.c.
   */
  if (cleaned > 0 && v->local.state != NBDM_LOCAL_OK)
    volume_persist_locked (v);
  fault_point ("resync_after_clean");
  b->cleaned_bytes += cleaned * v->region_size;
  r->copied_bytes += cleaned * v->region_size;
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

/* Beside copies that go on: one flush at a time, when it is due. */
static int
drive_flush (struct batch *b)
{
  if (b->flush_begun)
    return end_flush (b, false);
  if (b->copied.nr > 0
      && (now_ns () - b->flush_ended_ns >= FLUSH_NS
          || bytes_of (b, &b->copied) >= b->remote->volume->flush_bytes))
    begin_flush (b);
  return 0;
}

/* End all that somebody may wait for: every copy, and the flush. */
static int
let_go (struct batch *b)
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

  size_copy (b, copy, run);
  if (!copy->hole)
    rc = find_buffer (b, copy);
  if (rc < 0)
    return rc;
  rc = lock_copy (b, copy);
  if (rc == 0) {
    rc = let_go (b);
    if (rc == 0)
      rc = lock_copy (b, copy);
  }
  if (rc < 0)
    return rc;
  rc = send_copy (b, copy);
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
  struct nbdm *v = r->volume;
  struct copy *copy;
  struct run run;
  bool found;
  int rc = end_answered (b);

  while (rc == 0 && b->nr_busy >= b->pace.depth)
    rc = end_copy (b, b->oldest);
  if (rc < 0)
    return rc;
  pthread_mutex_lock (&v->lock);
  found = r->conn == b->conn && find_run_locked (b, &run);
  pthread_mutex_unlock (&v->lock);
  if (!found)
    return 0;
  copy = b->idle;
  b->idle = copy->next;
  rc = copy_run (b, copy, &run);
  if (rc == 1) {
    link_copy (b, copy);
    return 1;
  }
  copy->next = b->idle;
  b->idle = copy;
  return rc < 0 ? rc : 1;
}

/* Is the call over, whatever is left?  Else takes the pace to go on at. */
static bool
call_over (struct batch *b)
{
  struct remote *r = b->remote;
  struct nbdm *v = r->volume;
  bool over;

  pthread_mutex_lock (&v->lock);
  over = r->paused || v->waking;
  b->pace = r->pace;
  pthread_mutex_unlock (&v->lock);
  return over || b->issued_bytes >= b->max_bytes || now_ns () >= b->until_ns;
}

/* Leave the remote to clients for a while; nothing may be under way. */
static void
rest (struct batch *b)
{
  struct remote *r = b->remote;
  struct nbdm *v = r->volume;
  uint64_t until_ns = now_ns () + b->pace.rest_us * UINT64_C (1000);
  struct timespec until = { .tv_sec = (time_t)(until_ns / 1000000000),
                            .tv_nsec = (long)(until_ns % 1000000000) };
  int rc = 0;

  pthread_mutex_lock (&v->lock);
  while (rc == 0 && r->conn == b->conn && !r->paused && !v->waking
         && !v->stopping && r->pace.rest_us > 0)
    rc = pthread_cond_timedwait (&v->events, &v->lock, &until);
  pthread_mutex_unlock (&v->lock);
}

/* After a burst: nobody may wait for us while we rest. */
static int
rest_if_due (struct batch *b)
{
  int rc;

  if (b->pace.rest_us == 0
      || now_ns () - b->burst_ns < b->pace.burst_us * UINT64_C (1000))
    return 0;
  rc = let_go (b);
  if (rc == 0) {
    latency_copying (&b->remote->volume->latency, false);
    rest (b);
    latency_copying (&b->remote->volume->latency, true);
  }
  b->burst_ns = now_ns ();
  return rc;
}

static int
run_batch (struct batch *b, struct nbdm_resync *io)
{
  struct nbdm *v = b->remote->volume;
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
  pthread_mutex_lock (&v->lock);
  if (b->remote->state == NBDM_RESYNCING)
    remote_settle_locked (b->remote);
  pthread_mutex_unlock (&v->lock);
  return rc;
}

static int
allocate (struct batch *b)
{
  const struct nbdm *v = b->remote->volume;

  b->buf_size = v->region_size > COPY_BYTES ? v->region_size : COPY_BYTES;
  b->copies = calloc (MAX_DEPTH, sizeof *b->copies);
  if (b->copies == NULL)
    return set_error (-ENOMEM, "resync");
  for (uint32_t i = 0; i < MAX_DEPTH; i++) {
    pthread_cond_init (&b->copies[i].granted, NULL);
    b->copies[i].next = b->idle;
    b->idle = &b->copies[i];
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
  uint32_t bytes = pace->copy_bytes ? pace->copy_bytes : COPY_BYTES;
  uint32_t region = v->region_size;

  bytes = bytes < COPY_BYTES ? bytes : COPY_BYTES;
  bytes = bytes > region ? bytes - bytes % region : region;
  return (struct resync_pace){
    .depth = pace->depth < 1           ? 1
             : pace->depth > MAX_DEPTH ? MAX_DEPTH
                                       : pace->depth,
    .copy_bytes = bytes,
    .burst_us = pace->burst_us,
    .rest_us = pace->rest_us,
  };
}

int
nbdm_resync_pace (struct nbdm *v, uint32_t index, const struct nbdm_pace *pace)
{
  struct remote *r;

  if (index >= v->nr_remotes)
    return set_message (-EINVAL, "there is no remote %u", index);
  r = &v->remotes[index];
  pthread_mutex_lock (&v->lock);
  if (r->pace.rest_us > 0 && pace->rest_us == 0)
    pthread_cond_broadcast (&v->events); /* ends the rest */
  r->pace = resync_pace (v, pace);
  pthread_mutex_unlock (&v->lock);
  return 0;
}

int
nbdm_resync (struct nbdm *v, uint32_t index, struct nbdm_resync *io)
{
  uint64_t now = now_ns ();
  struct batch b = {
    .cursor = io->first_region,
    .max_bytes = io->max_bytes,
    .until_ns = io->max_ms ? now + io->max_ms * UINT64_C (1000000) : UINT64_MAX,
    .burst_ns = now,
    .flush_ended_ns = now,
    .hole_bytes = MIN_HOLE,
  };
  struct remote *r;
  int rc = 0;

  if (index >= v->nr_remotes)
    return set_message (-EINVAL, "there is no remote %u", index);
  r = &v->remotes[index];
  io->next_region = io->copied_bytes = io->zero_bytes = 0;
  b.remote = r;
  pthread_mutex_lock (&v->lock);
  if (v->failed || v->stopping || !r->admitted)
    rc = set_message (-ENOTCONN, "the remote is not connected");
  else {
    b.conn = conn_get (r->conn);
    r->copying = true;
    r->pace = resync_pace (v, &io->pace);
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
  r->copying = false;
  pthread_mutex_unlock (&v->lock);
  release (&b);
  return rc;
}
