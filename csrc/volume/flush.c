/* SPDX-License-Identifier: BSD-3-Clause */

/* Flushes, shared by the threads that ask at the same time (group commit).
 *
 * A remote answers writes from memory.  What it answered since its last flush
 * is its *unflushed* set, and becomes dirty if the connection is lost (rule 4).
 * The set consists of two maps.  Answers go into the map that is `filling`.  A
 * flush switches the maps before it is sent, so that its success clears exactly
 * what was answered before it began.
 *
 * The thread that sent a flush may first wait for something else: the local
 * disk, a takeover, a remote that is on hold.  Each of these may itself wait
 * for that flush.  So any thread that waits for a flush may receive its answer,
 * and no thread waits for the thread that sent it.
 *
 * A flush covers every write answered on any client connection, so clients may
 * be told that several connections see one disk (multi-conn).
 */

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "api.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/fault.h"
#include "base/lock.h"
#include "logs/bitmap.h"
#include "logs/dirty_map.h"
#include "logs/layout.h"
#include "volume/backlog.h"
#include "volume/flush.h"
#include "volume/flusher.h"
#include "volume/local.h"
#include "volume/local_state.h"
#include "volume/state.h"
#include "volume/volume.h"
#include "wire/conn.h"
#include "wire/transport.h"

static void
turn_over_locked (struct remote *r)
{
  r->flush_sent = (struct flush_sent){
    .conn = conn_get (r->conn),
    .command = { .kind = COMMAND_FLUSH },
    .waiter = WAITER_INIT,
    .covers = r->disk.flush.asked,
    .owned = true,
    .sleep = r->flush_sent.sleep,
  };
  r->disk.flush.running = true;
  r->filling ^= 1;
  backlog_flush_begun_locked (r);
}

static void
send_flush (struct remote *r)
{
  struct flush_sent *sent = &r->flush_sent;

  /* A server without flush claims to have no cache: its answers to writes are
   * all that it can promise, and no flush is sent.
   */
  if (!conn_info (sent->conn)->can_flush)
    return;
  if (conn_issue (sent->conn, &sent->command, &sent->waiter) < 0)
    sent->command.error = ENOTCONN;
}

/* From now on any thread that waits for the flush may receive its answer. */
static void
disown_locked (struct remote *r)
{
  r->flush_sent.owned = false;
  if (r->flush_sent.sleep > 0)
    pthread_cond_broadcast (&r->disk.volume->changed);
}

/* The flush under way was answered, or its connection died: apply the result to
 * the remote's state.
 */
static void
apply_answer_locked (struct remote *r)
{
  struct conn *conn = r->flush_sent.conn;
  int error = r->flush_sent.command.error;
  char why[NBDM_REASON_LEN];

  r->flush_sent.conn = NULL;
  r->flush_sent.owned = false;
  r->disk.flush.running = false;
  if (error == ENOTCONN || error == ESHUTDOWN) {
    conn_kill (conn, "the server is shutting down");
    remote_lost_locked (r, conn);
  }
  else if (error != 0) {
    snprintf (why, sizeof why, "it answered a flush with: %s",
              strerror (error));
    remote_broken_locked (r, conn, why);
  }
  else if (r->conn == conn && !r->disk.volume->failed) {
    dirty_map_empty (&r->disk.dm, MAP_UNFLUSHED0 + (r->filling ^ 1));
    r->disk.flush.done = r->flush_sent.covers;
    backlog_flushed_locked (r, r->flush_sent.command.answered_ns);
    flusher_wake_locked (r);
  }
  pthread_cond_broadcast (&r->disk.volume->changed);
  conn_put (conn);
}

/* Wait for the answer of the flush under way, which no thread owns, and apply
 * it.  Releases the lock while it waits; bounded by the remote's deadline.
 */
static void
take_answer_relock (struct remote *r)
{
  struct nbdm *v = r->disk.volume;

  r->flush_sent.owned = true;
  pthread_mutex_unlock (&v->lock);
  conn_wait (r->flush_sent.conn, &r->flush_sent.waiter);
  fault_point ("flush_answered");
  pthread_mutex_lock (&v->lock);
  apply_answer_locked (r);
  fault_point ("flush_landed");
}

static bool
can_take_locked (const struct remote *r)
{
  return r->disk.flush.running && !r->flush_sent.owned;
}

bool
remote_flush_take_relock (struct remote *r)
{
  bool can = can_take_locked (r);

  if (can)
    take_answer_relock (r);
  return can;
}

static bool
done_locked (const struct remote_flush *flush)
{
  return flush->remote->disk.flush.done >= flush->ticket;
}

/* Is there nothing left to wait for?  `*rc`: the result of remote_flush_end. */
static bool
over_locked (const struct remote_flush *flush, int *rc)
{
  const struct remote *r = flush->remote;
  const struct nbdm *v = r->disk.volume;

  *rc = done_locked (flush) ? 0 : -ENOTCONN;
  return *rc == 0 || !remote_used_locked (r) || v->failed
         || (flush->conn && flush->conn != r->conn)
         || ((v->drained || (flush->upkeep && v->waking)) && !r->admitted);
}

/* Send a flush if none is under way.  Releases the lock to send it. */
static bool
start_relock (struct remote *r)
{
  struct nbdm *v = r->disk.volume;

  if (!r->admitted || r->disk.flush.running)
    return false;
  turn_over_locked (r);
  pthread_mutex_unlock (&v->lock);
  fault_point ("flush_turned");
  send_flush (r);
  pthread_mutex_lock (&v->lock);
  disown_locked (r);
  return true;
}

void
remote_flush_begin (struct remote *r, struct remote_flush *flush)
{
  struct nbdm *v = r->disk.volume;

  flush->remote = r;
  flush->conn = NULL;
  flush->upkeep = false;
  pthread_mutex_lock (&v->lock);
  flush->ticket = ++r->disk.flush.asked;
  start_relock (r);
  pthread_mutex_unlock (&v->lock);
  fault_point ("flush_sent");
}

int
remote_flush_end (struct remote_flush *flush)
{
  struct remote *r = flush->remote;
  struct nbdm *v = r->disk.volume;
  int rc;

  LOCK_FOR_SCOPE (&v->lock);
  while (!done_locked (flush)) {
    /* Do this first: the flush may be the one that this thread sent. */
    if (remote_flush_take_relock (r))
      continue;
    if (over_locked (flush, &rc))
      break;
    if (!start_relock (r)) {
      r->flush_sent.sleep++;
      pthread_cond_wait (&v->changed, &v->lock);
      r->flush_sent.sleep--;
    }
  }
  over_locked (flush, &rc);
  return rc;
}

bool
remote_flush_poll (struct remote_flush *flush, int *rc)
{
  struct remote *r = flush->remote;
  struct nbdm *v = r->disk.volume;
  bool over;

  LOCK_FOR_SCOPE (&v->lock);
  if (can_take_locked (r)
      && conn_answered_all (r->flush_sent.conn, &r->flush_sent.waiter))
    take_answer_relock (r);
  over = over_locked (flush, rc);
  /* It may be the flush that this thread sent, on a dead connection. */
  if (over && *rc < 0 && can_take_locked (r))
    over = false;
  if (!over)
    start_relock (r);
  return over;
}

bool
remote_flush_alone (struct remote *r)
{
  struct nbdm *v = r->disk.volume;
  bool started;

  pthread_mutex_lock (&v->lock);
  started = r->admitted && !r->disk.flush.running;
  if (started) {
    turn_over_locked (r);
    pthread_mutex_unlock (&v->lock);
    send_flush (r);
    pthread_mutex_lock (&v->lock);
    take_answer_relock (r);
  }
  pthread_mutex_unlock (&v->lock);
  return started;
}

static void
flush_local_once_relock (struct nbdm *v)
{
  struct flush_group *group = &v->local.disk.flush;
  uint64_t covers = group->asked;
  unsigned failures = v->local.failures;
  int rc;

  /* The disk has failed since the caller looked, and another disk may be about
   * to replace it: start nothing on it.
   */
  if (v->local.state == NBDM_LOCAL_FAILED) {
    group->done = covers;
    pthread_cond_broadcast (&v->changed);
    return;
  }
  group->running = true;
  local_use (v); /* no replacement before the answer is applied */
  pthread_mutex_unlock (&v->lock);
  rc = local_flush (v);
  pthread_mutex_lock (&v->lock);
  local_leave ();
  group->running = false;
  group->done = covers;
  /* Ignore the result of a disk that has failed and been replaced during the
   * flush.
   */
  if (rc < 0 && rc != LOCAL_GIVEN_UP && v->local.flush_error == 0
      && v->local.failures == failures && !v->closed) {
    /* The kernel has dropped the pages that it could not write.  Another fsync
     * would succeed and prove nothing (rule 10).
     */
    volume_distrust_locked (v); /* until a takeover is durable */
    v->local.flush_error = rc;
    local_note_error_locked (v, rc);
    atomic_store (&v->local.doubted, true);
    local_doubt_copies_locked (v);
  }
  pthread_cond_broadcast (&v->changed);
}

static int
flush_error (int rc)
{
  return set_error (rc, "the local disk failed to flush");
}

int
flush_local_group (struct nbdm *v)
{
  struct flush_group *group = &v->local.disk.flush;
  uint64_t ticket;
  int rc;

  pthread_mutex_lock (&v->lock);
  ticket = ++group->asked;
  while (group->done < ticket)
    if (group->running)
      pthread_cond_wait (&v->changed, &v->lock);
    else
      flush_local_once_relock (v);
  rc = v->local.flush_error;
  pthread_mutex_unlock (&v->lock);
  /* Another thread may have led the flush, or an earlier flush failed. */
  return rc < 0 ? flush_error (rc) : 0;
}

/* Unless another disk has replaced the one that failed.  A remote on hold may
 * still come back and take its place.
 */
static void
take_place_of_local (struct nbdm *v, unsigned failures)
{
  LOCK_FOR_SCOPE (&v->lock);
  if (v->local.failures == failures && local_may_be_replaced_locked (v))
    local_takeover_relock (v);
}

int
flush_local_or_replace (struct nbdm *v)
{
  unsigned failures = v->local.failures;
  int rc = flush_local_group (v);

  if (rc < 0)
    take_place_of_local (v, failures);
  return rc < 0 ? flush_error (rc) : 0;
}

int
volume_flush (struct nbdm *v, bool upkeep)
{
  struct remote_flush flushes[NBDM_MAX_REMOTES];
  bool begun[NBDM_MAX_REMOTES] = { false };
  bool flushed = false;
  unsigned failures = v->local.failures;
  bool replaced;
  int rc;

  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    pthread_mutex_lock (&v->lock);
    /* Once the volume is drained, no request waits for a remote on hold, and
     * all that such a remote misses is dirty already.
     */
    begun[i] = remote_used_locked (&v->remotes[i])
               && (v->remotes[i].admitted || !v->drained);
    pthread_mutex_unlock (&v->lock);
    if (begun[i]) {
      remote_flush_begin (&v->remotes[i], &flushes[i]);
      flushes[i].upkeep = upkeep;
    }
  }
  rc = atomic_load (&v->local.state) == NBDM_LOCAL_FAILED
           ? 0
           : flush_local_or_replace (v);
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    if (begun[i] && remote_flush_end (&flushes[i]) == 0)
      flushed = true; /* a lost remote is a state, no error while local is ok */

  pthread_mutex_lock (&v->lock);
  /* Local was replaced: the result is not of the disk that got the writes. */
  replaced = v->local.failures != failures;
  if (rc < 0 && !replaced)
    rc = local_flush_lost_relock (v);
  else if ((replaced || v->local.state == NBDM_LOCAL_FAILED) && flushed)
    rc = 0;
  else if (replaced || v->local.state == NBDM_LOCAL_FAILED)
    rc = set_message (-EIO, "the local disk has failed, and no remote that is "
                            "in sync is connected");
  pthread_mutex_unlock (&v->lock);
  return rc;
}

/* A remote that alone has some region, and may have it in its server's cache
 * alone: the loss of its connection has not made the region dirty
 * (unflushed_lost_locked).  NULL: there is none.
 */
static struct remote *
unflushed_source_locked (struct nbdm *v)
{
  const struct bitmap *missing = &v->local.disk.dm.map[MAP_DIRTY];
  uint64_t nr = v->nr_regions, region, end;

  for (uint32_t i = 0; i < v->nr_remotes && missing->nr_set > 0; i++)
    for (int m = MAP_UNFLUSHED0; m <= MAP_UNFLUSHED1; m++) {
      const struct bitmap *map = &v->remotes[i].disk.dm.map[m];

      for (region = 0; (region = bitmap_next_set (map, region, nr)) < nr;
           region = end) {
        end = bitmap_next_clear (map, region, nr);
        if (bitmap_next_set (missing, region, end) < end)
          return &v->remotes[i];
      }
    }
  return NULL;
}

/* What only a remote has is durable once that remote has flushed it, whatever
 * the other disks have flushed.  A remote on hold may still come back; after
 * that nothing that this thread could wait for makes the region durable.
 */
static int
flush_sources_relock (struct nbdm *v)
{
  struct remote_flush flush;
  struct remote *r;

  for (;;) {
    while (v->local.taking_over) /* which disk is the source is not decided */
      pthread_cond_wait (&v->changed, &v->lock);
    r = unflushed_source_locked (v);
    if (r == NULL || v->failed)
      return 0;
    if (!remote_used_locked (r))
      return v->stopping
                 ? set_message (-ESHUTDOWN, "the volume is stopping")
                 : set_message (-EIO,
                                "%s alone has some of the data, has not "
                                "flushed it, and is not connected",
                                r->disk.name);
    pthread_mutex_unlock (&v->lock);
    remote_flush_begin (r, &flush);
    remote_flush_end (&flush);
    pthread_mutex_lock (&v->lock);
  }
}

/* Does a remote miss bytes that were answered?  A region that is late but not
 * lost is no such case: its bytes were sent again, and resync only copies it
 * once more.
 */
static bool
any_behind_locked (const struct nbdm *v)
{
  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    const struct remote *r = &v->remotes[i];
    if (r->disk.copying || r->disk.dm.lost.nr_set > 0
        || r->disk.dm.map[MAP_DIRTY].nr_set > r->disk.dm.map[MAP_LATE].nr_set)
      return true;
  }
  return false;
}

/* Policy stop: a server that was lost and came back within the hold may have
 * lost writes, which are dirty now.  Answer the flush only after resync has
 * copied them.  The wait is bounded, and the ticker wakes this thread.
 */
static int
wait_for_both_relock (struct nbdm *v)
{
  uint64_t until = now_ns () + v->hold_ms * NS_PER_MS;

  for (uint32_t i = 0; i < v->nr_remotes; i++)
    until += 2 * v->remotes[i].deadline_ms * NS_PER_MS;
  while (v->policy == NBDM_STOP && !v->failed && !v->fenced && !v->stopping
         && any_behind_locked (v)) {
    if (now_ns () > until)
      return set_message (-EIO, "policy stop: a remote is not caught up yet");
    v->nr_waiting++;
    pthread_cond_wait (&v->changed, &v->lock);
    v->nr_waiting--;
  }
  if (v->policy == NBDM_STOP && v->stopping && any_behind_locked (v))
    return set_message (-ESHUTDOWN, "the volume is stopping");
  return 0;
}

/* `client`: it asks for what the policy promises, not for what the disks in use
 * have.
 */
static int
flush_for (struct nbdm *v, bool client)
{
  int rc = 0;

  pthread_mutex_lock (&v->lock);
  if (v->stopping)
    rc = set_message (-ESHUTDOWN, "the volume is stopping");
  else
    v->nr_requests++;
  pthread_mutex_unlock (&v->lock);
  if (rc < 0)
    return rc;

  rc = volume_flush (v, false);

  fault_point ("flush_before_answer");
  pthread_mutex_lock (&v->lock);
  if (rc == 0)
    rc = flush_sources_relock (v);
  if (rc == 0 && client && v->policy == NBDM_STOP)
    rc = wait_for_both_relock (v);
  v->nr_requests--;
  v->flushes++;
  if (v->stopping)
    pthread_cond_broadcast (&v->changed);
  /* Policy stop: what the remote did not flush is not safe on both disks. */
  if (rc == 0 && (v->failed || (client && v->fenced)))
    rc = set_message (-EIO, "the flush did not reach every disk: %s",
                      v->failed ? v->reason : "a remote is out of sync");
  pthread_mutex_unlock (&v->lock);
  return rc;
}

int
nbdm_flush (struct nbdm *v)
{
  return flush_for (v, true);
}

int
nbdm_node_flush (struct nbdm *v)
{
  return flush_for (v, false);
}
