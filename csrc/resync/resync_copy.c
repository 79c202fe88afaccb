/* SPDX-License-Identifier: BSD-3-Clause */

/* One copy of a resync: find a run, lock its range, read, send and receive the
 * answers. resync.c gives the order of these steps, and the reasons.
 */

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/fault.h"
#include "base/file.h"
#include "base/lock.h"
#include "logs/bitmap.h"
#include "logs/layout.h"
#include "logs/rangelock.h"
#include "request/read.h"
#include "resync/resync_copy.h"
#include "volume/backlog.h"
#include "volume/local.h"
#include "volume/state.h"
#include "volume/volume.h"
#include "wire/conn.h"

#define SEGMENT (64u << 10) /* search for zeroes in pieces of this size */
#define MAX_HOLE (1u << 30) /* see RESYNC_MIN_HOLE */
#define QUICK_NS 5000000    /* in addition to the time of the link: 5 ms */

bool
resync_find_run_locked (struct batch *b, struct run *run)
{
  const struct remote *r = b->remote;
  const struct nbdm *v = r->disk.volume;
  const struct bitmap *dirty = &r->disk.dm.map[MAP_DIRTY];
  const struct bitmap *late = &r->disk.dm.map[MAP_LATE];
  const struct bitmap *lost = &r->disk.dm.lost;
  uint64_t nr = v->nr_regions, first = b->call.cursor, end;
  bool was_late = false;

  for (;;) {
    uint64_t next;

    first = bitmap_next_set (dirty, first, nr);
    if (first == nr)
      return false;
    /* Copy a late region only if it has lost bytes too: a flush may wait for
     * it.
     */
    was_late = bitmap_test (late, first);
    next = first;
    if (was_late && !bitmap_test (lost, first)) {
      next = bitmap_next_clear (late, first, nr);
      next = bitmap_next_set (lost, first, next);
    }
    if (next == first)
      next = bitmap_next_clear (&r->disk.dm.copied, first, nr);
    if (next == first)
      break;
    first = next;
  }
  end = first + b->hole_bytes / v->region_size;
  end = bitmap_next_clear (dirty, first, end < nr ? end : nr);
  if (was_late) {
    end = bitmap_next_clear (late, first, end);
    end = bitmap_next_clear (lost, first, end);
  }
  else
    end = bitmap_next_set (late, first, end);
  end = bitmap_next_set (&r->disk.dm.copied, first, end);
  *run = (struct run){ first, end - first };
  return true;
}

void
resync_size_copy (struct batch *b, struct copy *copy, struct run *run)
{
  struct nbdm *v = b->remote->disk.volume;
  uint64_t offset = run->first * v->region_size;
  uint64_t end = offset + run->count * v->region_size;
  uint64_t hole_end;

  if (end > v->size)
    end = v->size;
  hole_end = local_hole_end (v, offset, end);
  if (hole_end < end)
    hole_end -= hole_end % v->region_size;
  copy->hole = hole_end > offset && conn_info (b->conn)->can_zero;
  if (copy->hole)
    end = hole_end;
  else if (end - offset > b->call.pace.copy_bytes)
    end = offset + b->call.pace.copy_bytes;
  run->count = (end - offset + v->region_size - 1) / v->region_size;
  copy->range = (struct range){ .offset = offset,
                                .length = end - offset,
                                .granted = &copy->granted };
}

static bool
any_late_locked (const struct remote *r, const struct range *range)
{
  uint64_t first, count;

  region_span (r->disk.volume, range->offset, range->length, &first, &count);
  return bitmap_next_set (&r->disk.dm.map[MAP_LATE], first, first + count)
         < first + count;
}

int
resync_lock_copy (struct batch *b, struct copy *copy)
{
  struct nbdm *v = b->remote->disk.volume;
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
  /* A copy that is sent and never answered may arrive late, over a newer one
   * (rule 12), even if this process dies.  So its regions are late until it is
   * answered.
   */
  if (rc == 1) {
    copy->was_late = any_late_locked (b->remote, &copy->range);
    copy->doubts = v->local.doubts;
    if (v->local.state != NBDM_LOCAL_FAILED)
      b->remote->unproven = true;
    mark_dirty_locked (b->remote, copy->range.offset, copy->range.length, true);
  }
  pthread_mutex_unlock (&v->lock);
  fault_point ("resync_locked");
  return rc;
}

static void
count_locked (struct batch *b, struct copy *copy)
{
  struct backlog *log = &b->remote->backlog;

  if (copy->hole && copy->error == 0)
    flush_bound_zeroed (&log->bound, log->sent[BACKLOG_ZEROES],
                        now_ns () - copy->sent_ns);
  for (int k = 0; k < BACKLOG_KINDS; k++) {
    backlog_answer_locked (b->remote, b->conn, k, copy->uncounted[k],
                           copy->error == 0);
    copy->uncounted[k] = 0;
  }
}

static void
collect_answers (struct batch *b, struct copy *copy)
{
  conn_wait (b->conn, &copy->waiter);
  for (unsigned i = 0; i < copy->nr; i++)
    if (copy->commands[i].error) {
      copy->error = -copy->commands[i].error;
      remote_heed_refusal (b->remote, &copy->commands[i]);
    }
  copy->nr = 0;
}

/* The number of bytes that the copy's next command may send. */
static uint64_t
next_length (struct batch *b, struct copy *copy, bool zero, uint64_t wanted)
{
  enum backlog_kind kind = zero ? BACKLOG_ZEROES : BACKLOG_DATA;
  unsigned max = copy->range.length > b->call.pace.command_bytes && !copy->hole
                     ? b->call.pace.window
                     : RESYNC_COPY_COMMANDS;
  struct nbdm *v = b->remote->disk.volume;
  uint64_t room = 0;

  if (copy->nr < max)
    room = resync_try_room (b, kind, wanted);
  if (room == 0) {
    collect_answers (b, copy);
    pthread_mutex_lock (&v->lock);
    count_locked (b, copy);
    pthread_mutex_unlock (&v->lock);
    room = resync_take_room (b, kind, wanted);
    copy->sent_ns = now_ns ();
  }
  copy->uncounted[kind] += room;
  return room;
}

/* Send [offset, offset + length) as data from the buffer, or as zeroes. */
static void
send_segment (struct batch *b, struct copy *copy, uint64_t offset,
              uint64_t length, bool zero)
{
  const struct conn_info *info = conn_info (b->conn);
  uint64_t max = info->max_payload;

  zero = zero && info->can_zero;
  if (!zero && max > b->call.pace.command_bytes)
    max = b->call.pace.command_bytes;
  while (length > 0) {
    uint64_t room = next_length (b, copy, zero, length < max ? length : max);
    struct command *cmd = &copy->commands[copy->nr++];

    *cmd = (struct command){
      .kind = zero ? COMMAND_ZERO : COMMAND_WRITE,
      .offset = offset,
      .length = room,
      .buf = zero ? NULL : copy->buf + (offset - copy->range.offset),
      .may_trim = true,
    };
    if (conn_issue (b->conn, cmd, &copy->waiter) < 0)
      cmd->error = ENOTCONN;
    if (zero) {
      b->call.zero_bytes += cmd->length;
      copy->zero_bytes += cmd->length;
    }
    offset += cmd->length;
    length -= cmd->length;
  }
}

/* Send adjacent segments of the same kind together. */
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

/* No command of this copy can arrive late any more. */
static void
clear_late_locked (struct remote *r, const struct copy *copy)
{
  uint64_t first, count;

  if (copy->was_late)
    return;
  region_span (r->disk.volume, copy->range.offset, copy->range.length, &first,
               &count);
  bitmap_clear (&r->disk.dm.map[MAP_LATE], first, count);
}

/* Release a range of which nothing was sent. */
static void
unlock_copy (struct batch *b, struct copy *copy)
{
  struct nbdm *v = b->remote->disk.volume;

  LOCK_FOR_SCOPE (&v->lock);
  if (b->remote->conn == b->conn)
    clear_late_locked (b->remote, copy);
  rangelock_remove (&v->ranges, &copy->range);
}

int
resync_send_copy (struct batch *b, struct copy *copy)
{
  struct nbdm *v = b->remote->disk.volume;
  uint64_t offset = copy->range.offset, length = copy->range.length;
  int rc;

  copy->nr = 0;
  copy->error = 0;
  copy->zero_bytes = 0;
  copy->waiter = (struct waiter)WAITER_INIT;
  copy->sent_ns = now_ns ();
  if (copy->hole) {
    /* A write may have filled the hole before the range was locked. */
    if (local_hole_end (v, offset, offset + length) < offset + length) {
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
  b->call.issued_bytes += length;
  return 0;
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

/* The time of the answer shows the latency of the remote and how quickly it
 * writes zeroes.  Zeroes use no bandwidth, so they are counted separately: the
 * pace measures the link by data alone.
 */
static void
measure_locked (struct batch *b, const struct copy *copy)
{
  struct remote *r = b->remote;
  uint64_t took_ns = now_ns () - copy->sent_ns;

  r->answered_bytes += copy->range.length;
  r->answered_zero_bytes += copy->zero_bytes;
  if (copy->zero_bytes < copy->range.length && took_ns < r->answer_ns)
    r->answer_ns = took_ns;
  if (took_ns < b->answer_ns)
    b->answer_ns = took_ns;
  if (!copy->hole)
    return;
  if (took_ns > b->answer_ns + 2 * QUICK_NS && b->hole_bytes > RESYNC_MIN_HOLE)
    b->hole_bytes /= 2;
  else if (took_ns < b->answer_ns + QUICK_NS && b->hole_bytes < MAX_HOLE
           && copy->range.length > b->hole_bytes / 2)
    b->hole_bytes *= 2;
}

int
resync_end_copy (struct batch *b, struct copy *copy)
{
  struct remote *r = b->remote;
  struct nbdm *v = r->disk.volume;
  char why[NBDM_REASON_LEN];
  struct run run;
  int rc;

  collect_answers (b, copy);
  fault_point ("resync_answered");
  rc = copy->error;
  LOCK_FOR_SCOPE (&v->lock);
  count_locked (b, copy);
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
    clear_late_locked (r, copy);
    region_span (v, copy->range.offset, copy->range.length, &run.first,
                 &run.count);
    rc = remember_run (&b->copied, &run);
    if (rc == 0 && copy->doubts == v->local.doubts)
      bitmap_set (&r->disk.dm.copied, run.first, run.count);
    measure_locked (b, copy);
    fault_point ("resync_copied");
  }
  rangelock_remove (&v->ranges, &copy->range);
  return rc;
}
