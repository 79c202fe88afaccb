/* SPDX-License-Identifier: BSD-3-Clause */

/* How a write is admitted and retired: the order of rules 1 and 5.
 *
 *   range lock            no other thread touches these bytes, on any leg
 *   activity extents      durable: a power cut finds the range in the set
 *   slot                  in the mapping: a killed process finds it open
 *   classification        per remote: send, leave to resync, or mark dirty
 *
 * The regions of a remote that gets nothing are marked dirty here, before any
 * byte is written, and not when the write ends: the remote may be admitted
 * again during the write, and must not look clean then.
 */

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "api.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/fault.h"
#include "base/lock.h"
#include "logs/activity.h"
#include "logs/classify.h"
#include "logs/dirty_map.h"
#include "logs/inflight.h"
#include "logs/layout.h"
#include "logs/rangelock.h"
#include "request/admit.h"
#include "request/cool.h"
#include "request/long_zero.h"
#include "volume/backlog.h"
#include "volume/local_state.h"
#include "volume/node.h"
#include "volume/state.h"
#include "volume/volume.h"
#include "wire/conn.h"

/* benchmarks/no_activity.py measures the cost of the log with this.  A mirror
 * built this way loses track of writes after lost power: no other build has it.
 */
#ifdef NBDM_NO_ACTIVITY_LOG
#define activity_hold(act, first, last)                                        \
  ((void)(act), (void)(first), (void)(last), 0)
#define activity_release(act, first, last, now)                                \
  ((void)(act), (void)(first), (void)(last))
#endif

/* Zeroes to send to a server without WRITE_ZEROES. */
#define ZEROES_SIZE (1u << 20)
static const uint8_t zeroes[ZEROES_SIZE];

static int
gate_locked (const struct nbdm *v)
{
  if (v->stopping)
    return set_message (-ESHUTDOWN, "the volume is stopping");
  if (v->failed)
    return set_message (-EIO, "the volume has failed: %s", v->reason);
  if (v->fenced)
    return set_message (-EIO, "policy stop: a remote is out of sync");
  return 0;
}

/* Is there a disk to write to?  The writes of a primary fill what a secondary's
 * disk misses.
 */
static bool
has_place_locked (const struct nbdm *v, const struct request *req)
{
  if (v->secondary)
    return v->local.state != NBDM_LOCAL_FAILED;
  return range_has_source_locked (v, req->offset, req->length);
}

/* May the request continue after a wait?  Waits for the end of a takeover,
 * which may leave the range with local.
 */
static int
go_on_relock (struct nbdm *v, const struct request *req)
{
  int rc;

  while (v->local.taking_over && !has_place_locked (v, req))
    pthread_cond_wait (&v->changed, &v->lock);
  rc = gate_locked (v);
  if (rc < 0 || has_place_locked (v, req))
    return rc;
  return set_message (-EIO, "the local disk has failed, and no remote in sync "
                            "is connected");
}

static void
make_room_relock (struct nbdm *v)
{
  int dropped;

  if (v->cooling) {
    pthread_cond_wait (&v->changed, &v->lock);
    return;
  }
  v->cooling = true;
  dropped = cool_relock (v, v->activity.nr_entries / 4, UINT64_MAX);
  v->cooling = false;
  pthread_cond_broadcast (&v->changed);
  if (dropped == -EAGAIN) {
    /* Every extent is in use: wait for a request to end. */
    v->nr_waiting++;
    pthread_cond_wait (&v->changed, &v->lock);
    v->nr_waiting--;
  }
}

static int
hold_extents_relock (struct nbdm *v, struct request *req)
{
  uint64_t first = req->first_extent, last = req->last_extent;
  int rc;

  while ((rc = activity_hold (&v->activity, first, last)) == -EAGAIN) {
    make_room_relock (v);
    /* Without a source no flush can succeed, so no extent can go cold. */
    rc = go_on_relock (v, req);
    if (rc < 0)
      return rc;
  }
  if (rc == 0)
    return 0;
  if (rc != -EINPROGRESS)
    return rc;
  while (!activity_durable (&v->activity, first, last) && !v->failed)
    if (v->activity_writing)
      pthread_cond_wait (&v->changed, &v->lock);
    else
      write_activity_relock (v);
  if (!v->failed)
    return 0;
  activity_release (&v->activity, first, last, now_ns ());
  return gate_locked (v);
}

static int
reserve_slot_relock (struct nbdm *v, struct request *req)
{
  while ((req->slot = inflight_reserve (&v->inflight, req->offset, req->length,
                                        req->kind, (uint8_t)req->flags))
         == -EAGAIN) {
    v->nr_waiting++;
    pthread_cond_wait (&v->changed, &v->lock);
    v->nr_waiting--;
  }
  return req->slot < 0 ? req->slot : 0;
}

enum backlog_kind
leg_kind (const struct request *req, const struct leg *leg)
{
  return req->buf == NULL && leg->conn && conn_info (leg->conn)->can_zero
             ? BACKLOG_ZEROES
             : BACKLOG_DATA;
}

/* Plan as much as the bound on unflushed bytes allows: see backlog.c. */
void
leg_plan_locked (struct request *req, struct leg *leg)
{
  struct nbdm *v = leg->remote->disk.volume;
  const struct conn_info *info;
  uint64_t end = req->offset + req->length;
  uint64_t max, room;
  struct piece piece;
  enum backlog_kind kind = leg_kind (req, leg);
  bool as_zeroes = req->buf == NULL && kind == BACKLOG_DATA;

  leg->nr = 0;
  if (leg->conn == NULL)
    return;
  info = conn_info (leg->conn);
  max = as_zeroes && info->max_payload > ZEROES_SIZE ? ZEROES_SIZE
                                                     : info->max_payload;
  while (leg->nr < LEG_WINDOW && leg->cursor < end) {
    struct command *cmd = &leg->commands[leg->nr];

    if (!classify_next (&leg->remote->disk.dm, v->region_size, leg->cursor, end,
                        max, v->policy == NBDM_STOP, &piece)) {
      leg->cursor = end;
      break;
    }
    room = backlog_room_locked (leg->remote, kind, piece.length, leg->first);
    if (room == 0)
      break;
    *cmd = (struct command){
      .kind = req->buf || as_zeroes ? COMMAND_WRITE : COMMAND_ZERO,
      .offset = piece.offset,
      .length = room,
      .buf = req->buf ? (uint8_t *)req->buf + (piece.offset - req->offset)
                      : (uint8_t *)zeroes,
      .fua = req->remote_fua && info->can_fua,
      .may_trim = req->flags & NBDM_MAY_TRIM,
    };
    leg->remote->backlog.sent[kind] += room;
    leg->cursor = piece.offset + room;
    leg->nr++;
  }
  if (leg->nr > 0)
    leg->sent = true;
}

void
leg_count_locked (const struct request *req, struct leg *leg, bool succeeded)
{
  const struct command *first = &leg->commands[0];
  struct backlog *log = &leg->remote->backlog;
  enum backlog_kind kind
      = first->kind == COMMAND_ZERO ? BACKLOG_ZEROES : BACKLOG_DATA;
  uint64_t bytes = 0;

  if (leg->nr == 0)
    return;
  for (unsigned i = 0; i < leg->nr; i++)
    bytes += leg->commands[i].length;
  leg->nr = 0;
  if (succeeded && kind == BACKLOG_ZEROES)
    flush_bound_zeroed (&log->bound, log->sent[kind],
                        first->answered_ns - first->issued_ns);
  backlog_answer_locked (
      leg->remote, leg->conn, kind, bytes,
      succeeded && !(req->remote_fua && conn_info (leg->conn)->can_fua));
}

/* The local part: mark the range missed on local before any byte is written, if
 * local will not get it.  Then only remotes have it, so they must make it
 * durable.
 */
static void
classify_local_locked (struct nbdm *v, struct request *req)
{
  uint64_t first, count;

  req->on_local = v->local.state != NBDM_LOCAL_FAILED;
  req->remote_fua = (req->flags & NBDM_FUA) || v->local.state != NBDM_LOCAL_OK;
  if (!req->on_local) {
    region_span (v, req->offset, req->length, &first, &count);
    dirty_map_mark (&v->local.disk.dm, first, count, false);
  }
}

/* A remote that gets nothing misses the range from now on.  While local is ok
 * the activity log shows that after lost power, as local is the source of every
 * active extent.  Else another remote may be the source, and only the maps say
 * which one: so the maps are made durable first.
 */
void
remote_miss_locked (struct remote *r, const struct request *req)
{
  struct nbdm *v = r->disk.volume;
  uint64_t before = r->disk.dm.map[MAP_DIRTY].nr_set;

  generation_advance_locked (v, r);
  mark_dirty_locked (r, req->offset, req->length, false);
  if (v->local.state != NBDM_LOCAL_OK
      && r->disk.dm.map[MAP_DIRTY].nr_set > before)
    volume_persist_locked (v);
}

static void
classify_locked (struct nbdm *v, struct request *req)
{
  classify_local_locked (v, req);
  if (v->secondary)
    node_forget_plain_locked (v);
  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    struct remote *r = &v->remotes[i];
    struct leg *leg = &req->legs[i];

    leg->remote = r;
    leg->result = 0;
    leg->sent = false;
    leg->nr = 0;
    leg->first = false;
    leg->conn = NULL;
    if (r->disk.dm.map[MAP_DIRTY].nr_set > 0 && remote_unaware_locked (r))
      remote_lacks_locked (r, "it lacks a region that it was not told of");
    leg->active = !v->secondary && remote_used_locked (r);
    if (v->secondary)
      continue;
    if (!leg->active)
      remote_miss_locked (r, req);
    else if (long_zero_leave_locked (req, r, 0))
      leg->active = false;
    if (!leg->active)
      continue;
    leg->waiter = (struct waiter)WAITER_INIT;
    leg->cursor = req->offset;
    if (r->admitted)
      leg->conn = conn_get (r->conn);
    leg_plan_locked (req, leg);
    inflight_issued (&v->inflight, req->slot, 2u << i);
  }
}

/* Nothing of it was sent. */
void
request_unplan_locked (struct nbdm *v, struct request *req)
{
  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    leg_count_locked (req, &req->legs[i], false);
    conn_put (req->legs[i].conn);
  }
}

static int
admit_relock (struct nbdm *v, struct request *req)
{
  int rc;

  rangelock_add (&v->ranges, &req->range);
  while (req->range.blockers > 0)
    pthread_cond_wait (&req->granted, &v->lock);
  fault_point ("range_granted");
  rc = hold_extents_relock (v, req);
  if (rc < 0)
    goto out_range;
  fault_point ("after_mark");
  rc = reserve_slot_relock (v, req);
  if (rc < 0)
    goto out_extents;
  rc = go_on_relock (v, req);
  if (rc < 0)
    goto out_slot;
  inflight_issued (&v->inflight, req->slot, 1);
  fault_point ("slot_reserved");
  classify_locked (v, req);
  if (!v->failed) {
    LIST_INSERT_HEAD (&v->requests, req, link);
    return 0;
  }
  rc = gate_locked (v);
  request_unplan_locked (v, req);

out_slot:
  inflight_retire (&v->inflight, req->slot);
out_extents:
  activity_release (&v->activity, req->first_extent, req->last_extent,
                    now_ns ());
out_range:
  rangelock_remove (&v->ranges, &req->range);
  return rc;
}

static void
set_ranges (struct request *req, pthread_cond_t *granted)
{
  req->range = (struct range){ .offset = req->offset,
                               .length = req->length,
                               .granted = granted };
  req->first_extent = req->offset / EXTENT_SIZE;
  req->last_extent = (req->offset + req->length - 1) / EXTENT_SIZE;
}

/* Does every leg need only the answers of its commands? */
static bool
plain_legs_locked (const struct nbdm *v)
{
  if (v->local.state != NBDM_LOCAL_OK || v->local.taking_over)
    return false;
  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    const struct remote *r = &v->remotes[i];

    if (remote_used_locked (r) && (!r->admitted || !conn_watchable (r->conn)))
      return false;
  }
  return true;
}

/* Each leg has at most one command, so its waiter is posted once. */
static bool
single_commands (const struct nbdm *v, const struct request *req)
{
  uint64_t end = req->offset + req->length;

  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    const struct leg *leg = &req->legs[i];

    if (leg->active && (leg->nr > 1 || leg->cursor < end))
      return false;
  }
  return true;
}

/* The same steps as admit_relock, each only if it needs no wait. */
static bool
try_admit_locked (struct nbdm *v, struct request *req)
{
  int rc;

  if (!rangelock_try (&v->ranges, &req->range))
    return false;
  fault_point ("range_granted");
  rc = activity_hold (&v->activity, req->first_extent, req->last_extent);
  if (rc < 0 && rc != -EINPROGRESS)
    goto out_range;
  fault_point ("after_mark");
  if (rc < 0)
    goto out_extents;
  req->slot = inflight_reserve (&v->inflight, req->offset, req->length,
                                req->kind, (uint8_t)req->flags);
  if (req->slot < 0)
    goto out_extents;
  inflight_issued (&v->inflight, req->slot, 1);
  fault_point ("slot_reserved");
  classify_locked (v, req);
  if (!v->failed && single_commands (v, req)) {
    LIST_INSERT_HEAD (&v->requests, req, link);
    return true;
  }
  request_unplan_locked (v, req);
  inflight_retire (&v->inflight, req->slot);

out_extents:
  activity_release (&v->activity, req->first_extent, req->last_extent,
                    now_ns ());
out_range:
  rangelock_remove (&v->ranges, &req->range);
  return false;
}

bool
request_try_admit (struct nbdm *v, struct request *req)
{
  bool admitted;

  set_ranges (req, NULL);
  LOCK_FOR_SCOPE (&v->lock);
  admitted = gate_locked (v) == 0 && plain_legs_locked (v)
             && try_admit_locked (v, req);
  if (admitted)
    v->nr_requests++;
  return admitted;
}

int
request_admit (struct nbdm *v, struct request *req)
{
  int rc;

  pthread_cond_init (&req->granted, NULL);
  set_ranges (req, &req->granted);

  LOCK_FOR_SCOPE (&v->lock);
  rc = gate_locked (v);
  if (rc == 0) {
    v->nr_requests++;
    rc = admit_relock (v, req);
    if (rc < 0) {
      v->nr_requests--;
      pthread_cond_broadcast (&v->changed);
    }
  }
  return rc;
}

void
request_retire_locked (struct nbdm *v, struct request *req)
{
  LIST_REMOVE (req, link);
  inflight_retire (&v->inflight, req->slot);
  fault_point ("after_retire");
  rangelock_remove (&v->ranges, &req->range);
  activity_release (&v->activity, req->first_extent, req->last_extent,
                    now_ns ());
  v->nr_requests--;
  if (v->nr_waiting > 0 || v->stopping)
    pthread_cond_broadcast (&v->changed);
}
