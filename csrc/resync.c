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
 * Never wait for a range while holding another: a client's write may wait for
 * the one we hold and stand before us at the one we want.  So a range that is
 * not free at once is taken only after every copy under way has ended.
 */

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"
#include "volume.h"

#define MAX_DEPTH 64
#define COPY_BYTES (1u << 20)  /* of data in one copy, or one region if more */
#define HOLE_BYTES (32u << 20) /* of a hole in one copy */
#define SEGMENT (64u << 10)    /* zeroes are looked for in pieces of this */
#define COPY_COMMANDS 32       /* under way for one copy */

struct copy {
  struct range range;
  pthread_cond_t granted;
  bool busy;
  bool hole;
  int error; /* -errno of commands already answered */
  uint8_t *buf;
  unsigned nr;
  struct command commands[COPY_COMMANDS];
  struct waiter waiter;
};

struct run {
  uint64_t first, count; /* regions */
};

struct batch {
  struct remote *remote;
  struct conn *conn;
  uint64_t cursor; /* region */
  uint64_t issued_bytes, zero_bytes;
  size_t buf_size;
  struct copy *copies;
  uint32_t depth;
  uint32_t turn;    /* which busy one to wait for next */
  struct run *runs; /* copied, not yet flushed */
  size_t nr_runs, max_runs;
};

/* The next run of regions to copy, at most HOLE_BYTES long. */
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
  end = first + HOLE_BYTES / v->region_size;
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
  else if (end - offset > b->buf_size)
    end = offset + b->buf_size;
  run->count = (end - offset + v->region_size - 1) / v->region_size;
  copy->range = (struct range){ .offset = offset,
                                .length = end - offset,
                                .granted = &copy->granted };
}

static bool
any_busy (const struct batch *b)
{
  for (uint32_t i = 0; i < b->depth; i++)
    if (b->copies[i].busy)
      return true;
  return false;
}

/* 1: held; 0: others are under way, end them first; -errno. */
static int
lock_copy (struct batch *b, struct copy *copy)
{
  struct nbdm *v = b->remote->volume;
  int rc = 1;

  pthread_mutex_lock (&v->lock);
  if (!rangelock_try (&v->ranges, &copy->range)) {
    if (any_busy (b))
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
  copy->busy = true;
  b->issued_bytes += length;
  return 0;
}

static int
remember_run (struct batch *b, const struct range *range)
{
  uint64_t first, count;

  if (b->nr_runs == b->max_runs) {
    size_t max = b->max_runs ? 2 * b->max_runs : 64;
    struct run *runs = realloc (b->runs, max * sizeof *runs);

    if (runs == NULL)
      return set_error (-ENOMEM, "resync");
    b->runs = runs;
    b->max_runs = max;
  }
  region_span (b->remote->volume, range->offset, range->length, &first, &count);
  b->runs[b->nr_runs++] = (struct run){ first, count };
  return 0;
}

/* Wait for a copy's answers; its regions are `copied`, its range free. */
static int
end_copy (struct batch *b, struct copy *copy)
{
  struct remote *r = b->remote;
  struct nbdm *v = r->volume;
  char why[NBDM_REASON_LEN];
  int rc;

  collect_answers (b, copy);
  fault_point ("resync_answered");
  copy->busy = false;
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
    rc = remember_run (b, &copy->range);
    if (rc == 0)
      bitmap_set (&r->dm.copied, b->runs[b->nr_runs - 1].first,
                  b->runs[b->nr_runs - 1].count);
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

  for (uint32_t i = 0; i < b->depth; i++)
    if (b->copies[i].busy) {
      int one = end_copy (b, &b->copies[i]);
      if (rc == 0)
        rc = one;
    }
  return rc;
}

/* Free those whose answers are in, so that no client waits for our turn. */
static int
end_answered (struct batch *b)
{
  int rc = 0;

  for (uint32_t i = 0; i < b->depth && rc == 0; i++)
    if (b->copies[i].busy && conn_answered_all (b->conn, &b->copies[i].waiter))
      rc = end_copy (b, &b->copies[i]);
  return rc;
}

static struct copy *
free_copy (struct batch *b, int *rc)
{
  for (uint32_t i = 0; i < b->depth; i++)
    if (!b->copies[i].busy)
      return &b->copies[i];
  *rc = end_copy (b, &b->copies[b->turn++ % b->depth]);
  return *rc == 0 ? free_copy (b, rc) : NULL;
}

/* Start one copy: 1 started, 0 nothing left to copy, -errno. */
static int
start_copy (struct batch *b)
{
  struct remote *r = b->remote;
  struct nbdm *v = r->volume;
  struct copy *copy;
  struct run run;
  bool found;
  int rc = end_answered (b);

  copy = rc == 0 ? free_copy (b, &rc) : NULL;
  if (copy == NULL)
    return rc;
  pthread_mutex_lock (&v->lock);
  found = r->conn == b->conn && find_run_locked (b, &run);
  pthread_mutex_unlock (&v->lock);
  if (!found)
    return 0;
  size_copy (b, copy, &run);
  rc = lock_copy (b, copy);
  if (rc == 0) {
    rc = end_all (b);
    if (rc == 0)
      rc = lock_copy (b, copy);
  }
  if (rc < 0)
    return rc;
  rc = send_copy (b, copy);
  if (rc == -EAGAIN)
    return 1; /* look again: the cursor has not moved */
  b->cursor = run.first + run.count;
  return rc < 0 ? rc : 1;
}

/* Everything in `runs` was answered: flush, and only then clear. */
static int
flush_and_clean (struct batch *b, struct nbdm_resync *io)
{
  struct remote *r = b->remote;
  struct nbdm *v = r->volume;
  struct remote_flush flush;
  uint64_t cleaned = 0;
  int rc;

  fault_point ("resync_before_flush");
  remote_flush_begin (r, &flush);
  rc = remote_flush_end (&flush);
  if (rc < 0)
    return set_message (-ENOTCONN, "the connection was lost");
  fault_point ("resync_before_clean");
  pthread_mutex_lock (&v->lock);
  if (!v->failed && r->conn == b->conn)
    for (size_t i = 0; i < b->nr_runs; i++)
      cleaned += dirty_map_clean (&r->dm, b->runs[i].first, b->runs[i].count);
  /* It may be the only one to have what is written next: see mark_first_locked
   * in admit.c.
   */
  if (cleaned > 0 && v->local.state != NBDM_LOCAL_OK)
    volume_persist_locked (v);
  fault_point ("resync_after_clean");
  io->copied_bytes = cleaned * v->region_size;
  r->copied_bytes += io->copied_bytes;
  pthread_mutex_unlock (&v->lock);
  return 0;
}

static int
run_batch (struct batch *b, struct nbdm_resync *io)
{
  struct nbdm *v = b->remote->volume;
  int rc = 1, end_rc;

  while (rc == 1 && b->issued_bytes < io->max_bytes)
    rc = start_copy (b);
  end_rc = end_all (b);
  io->next_region = rc == 1 || rc < 0 ? b->cursor : 0;
  io->zero_bytes = b->zero_bytes;
  if (rc >= 0)
    rc = end_rc;
  /* A local read error must not keep the others from becoming clean. */
  if (end_rc == 0 && b->nr_runs > 0) {
    end_rc = flush_and_clean (b, io);
    if (rc >= 0)
      rc = end_rc;
  }
  pthread_mutex_lock (&v->lock);
  if (b->remote->state == NBDM_RESYNCING)
    remote_settle_locked (b->remote);
  pthread_mutex_unlock (&v->lock);
  return rc;
}

static int
allocate (struct batch *b, uint32_t depth)
{
  const struct nbdm *v = b->remote->volume;

  b->depth = depth < 1 ? 1 : depth > MAX_DEPTH ? MAX_DEPTH : depth;
  b->buf_size = v->region_size > COPY_BYTES ? v->region_size : COPY_BYTES;
  b->copies = calloc (b->depth, sizeof *b->copies);
  if (b->copies == NULL)
    return set_error (-ENOMEM, "resync");
  for (uint32_t i = 0; i < b->depth; i++) {
    pthread_cond_init (&b->copies[i].granted, NULL);
    b->copies[i].buf = malloc (b->buf_size);
    if (b->copies[i].buf == NULL)
      return set_error (-ENOMEM, "resync");
  }
  return 0;
}

static void
release (struct batch *b)
{
  for (uint32_t i = 0; b->copies && i < b->depth; i++)
    free (b->copies[i].buf);
  free (b->copies);
  free (b->runs);
  conn_put (b->conn);
}

int
nbdm_resync (struct nbdm *v, uint32_t index, struct nbdm_resync *io)
{
  struct batch b = { .cursor = io->first_region };
  int rc = 0;

  if (index >= v->nr_remotes)
    return set_message (-EINVAL, "there is no remote %u", index);
  io->next_region = io->copied_bytes = io->zero_bytes = 0;
  b.remote = &v->remotes[index];
  pthread_mutex_lock (&v->lock);
  if (v->failed || v->stopping || !b.remote->admitted)
    rc = set_message (-ENOTCONN, "the remote is not connected");
  else
    b.conn = conn_get (b.remote->conn);
  b.remote->copying = b.conn != NULL;
  pthread_mutex_unlock (&v->lock);
  if (rc == 0)
    rc = allocate (&b, io->depth);
  if (rc == 0)
    rc = run_batch (&b, io);
  pthread_mutex_lock (&v->lock);
  b.remote->copying = false;
  pthread_mutex_unlock (&v->lock);
  release (&b);
  return rc;
}
