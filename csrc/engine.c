/* SPDX-License-Identifier: BSD-3-Clause */

/* The write path: log, send to every leg, wait, decide, answer.
 *
 *   admit.c    range lock, activity extents, slot, classification
 *   here       issue remote, then local, in parallel; wait; outcome
 *   state.c    what an outcome does to a remote's state
 *
 * Outcomes (design, section 5):
 *
 *   local  remote            answer  and
 *   ok     ok                ok      retire
 *   ok     lost              -       hold; sent again, or as the next row
 *   ok     error, deadline   ok      degrade: dirty, out_of_sync durable
 *                            EIO     stop: the same, and writes are fenced
 *   error  ok, in sync       ok      local is failed, and misses the range
 *   error  anything else     error   the range is dirty on every remote, and
 *                                    is copied from local again
 *   -      as above          ok      local is failed: a remote has it, durably
 *
 * "The same bytes to every leg" needs no copy of ours: the door's buffer is
 * already private (nbdkit read the payload off the socket into memory that no
 * client reaches), and it outlives every command on it, as a request never
 * returns before each is answered or its connection dead (conn.c).
 */

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "internal.h"
#include "volume.h"

/* Trims and zeroes are cut into requests of this size, so that one never
 * needs more extents than the activity log has.  NBD promises no atomicity
 * that would be lost.
 */
#define CHUNK NBDM_MAX_REQUEST

static void
leg_issue (struct leg *leg)
{
  for (unsigned i = 0; i < leg->nr; i++) {
    struct command *cmd = &leg->commands[i];
    if (conn_issue (leg->conn, cmd, &leg->waiter) < 0)
      cmd->error = ENOTCONN;
  }
}

/* Wait for this round; 0, LEG_LOST or what the server said. */
static int
leg_round (struct leg *leg)
{
  int rc = 0;

  if (leg->conn == NULL)
    return LEG_LOST;
  conn_wait (leg->conn, &leg->waiter);
  fault_point ("leg_answered");
  for (unsigned i = 0; i < leg->nr; i++) {
    int error = leg->commands[i].error;
    if (error == ESHUTDOWN) {
      conn_kill (leg->conn, "the server is shutting down");
      error = ENOTCONN;
    }
    if (error != 0)
      rc = -error;
  }
  return rc;
}

/* The connection is gone: hold while there is hope.  Returns 0 if there is a
 * new one to send everything again on, else LEG_LOST.
 */
static int
leg_hold (struct request *req, struct leg *leg)
{
  struct remote *r = leg->remote;
  struct nbdm *v = r->volume;
  int rc = LEG_LOST;

  pthread_mutex_lock (&v->lock);
  remote_lost_locked (r, leg->conn);
  conn_put (leg->conn);
  leg->conn = NULL;
  fault_point ("hold_lost");
  while (r->state == NBDM_HOLDING && !v->failed)
    pthread_cond_wait (&v->changed, &v->lock);
  if (r->admitted && !v->failed) {
    leg->conn = conn_get (r->conn);
    leg->cursor = req->offset;
    leg_plan_locked (req, leg);
    fault_point ("hold_resend");
    rc = 0;
  }
  pthread_mutex_unlock (&v->lock);
  return rc;
}

/* Make durable what the leg's remote answered. */
static void
leg_flush (struct leg *leg)
{
  struct nbdm *v = leg->remote->volume;
  struct remote_flush flush;

  remote_flush_begin (leg->remote, &flush);
  leg->result = remote_flush_end (&flush);
  /* Lost on the way and back: the flush was of another connection. */
  pthread_mutex_lock (&v->lock);
  if (leg->remote->conn != leg->conn)
    leg->result = LEG_LOST;
  pthread_mutex_unlock (&v->lock);
}

static void
leg_finish (struct request *req, struct leg *leg)
{
  struct nbdm *v = leg->remote->volume;
  uint64_t end = req->offset + req->length;

  for (;;) {
    int rc = leg_round (leg);
    if (rc == LEG_LOST)
      rc = leg_hold (req, leg);
    else if (rc == 0) {
      if (leg->cursor == end)
        break;
      pthread_mutex_lock (&v->lock);
      leg_plan_locked (req, leg);
      pthread_mutex_unlock (&v->lock);
    }
    if (rc < 0) {
      leg->result = rc;
      return;
    }
    leg_issue (leg);
  }
  if (req->remote_fua && !conn_info (leg->conn)->can_fua)
    leg_flush (leg);
}

static const char *
kind_name (enum slot_kind kind)
{
  static const char *const names[] = { "?", "write", "trim", "zero" };
  return names[kind];
}

/* What a leg's end does to its remote.  Returns whether the remote has the
 * bytes, or will get them without losing the client's trust (degrade).
 */
static bool
leg_settle_locked (struct request *req, struct leg *leg, int alike)
{
  struct remote *r = leg->remote;
  char why[NBDM_REASON_LEN];

  if (leg->result == 0) {
    if (!req->remote_fua && r->conn == leg->conn)
      unflushed_add_locked (r, req->offset, req->length);
    return true;
  }
  /* Both refused alike: nothing is known of either, but neither is worse;
   * the range is copied from local again (local_error_locked).
   */
  if (leg->result != LEG_LOST && leg->result != alike) {
    snprintf (why, sizeof why, "it answered a %s at %llu with: %s",
              kind_name (req->kind), (unsigned long long)req->offset,
              strerror (-leg->result));
    remote_broken_locked (r, leg->conn, why);
  }
  /* The change of state has marked it; once more costs nothing and does not
   * depend on which thread made that change.
   */
  mark_dirty_locked (r, req->offset, req->length, leg->sent);
  return false;
}

/* The local disk refused: every remote is made to read as local does.  Where
 * local misses the region it is the other way round, and what was copied back
 * of it is overtaken.
 */
static void
local_error_locked (struct nbdm *v, struct request *req, int rc)
{
  uint64_t first, count;

  region_span (v, req->offset, req->length, &first, &count);
  bitmap_clear (&v->local.dm.copied, first, count);
  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    struct remote *r = &v->remotes[i];

    mark_dirty_locked (r, req->offset, req->length, false);
    if (r->state == NBDM_IN_SYNC)
      remote_set_locked (r, NBDM_RESYNCING,
                         "a local %s at %llu failed (%s): the range is "
                         "copied from local again",
                         kind_name (req->kind), (unsigned long long)req->offset,
                         strerror (-rc));
  }
  volume_persist_locked (v);
}

/* Has a leg that succeeded every region that local misses? */
static bool
covered_locked (const struct nbdm *v, const struct request *req, bool on_local)
{
  uint64_t first, count;

  region_span (v, req->offset, req->length, &first, &count);
  for (uint64_t region = first; region < first + count; region++) {
    bool covered = on_local && local_has_locked (v, region);

    for (uint32_t i = 0; i < v->nr_remotes && !covered; i++) {
      const struct leg *leg = &req->legs[i];
      covered = leg->active && leg->result == 0
                && !bitmap_test (&leg->remote->dm.map[MAP_DIRTY], region);
    }
    if (!covered)
      return false;
  }
  return true;
}

/* Local misses some or all of it: who has it must have it durably, also if it
 * was sent before anybody knew.  Drops the lock to flush.
 */
static int
secure_locked (struct nbdm *v, struct request *req, bool on_local)
{
  for (uint32_t i = 0; i < v->nr_remotes && !req->remote_fua; i++) {
    struct leg *leg = &req->legs[i];

    if (!leg->active || leg->result < 0)
      continue;
    pthread_mutex_unlock (&v->lock);
    leg_flush (leg);
    pthread_mutex_lock (&v->lock);
  }
  if (covered_locked (v, req, on_local))
    return 0;
  return set_message (-EIO, "the local disk has failed, and no remote in sync "
                            "has answered the write");
}

static bool
on_any_remote (const struct nbdm *v, const struct request *req)
{
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    if (req->legs[i].active && req->legs[i].result == 0)
      return true;
  return false;
}

/* The request's answer, by what became of each leg.  May drop the lock.
 *
 * A remote that refused as local did is in sync until local_error_locked, and
 * must not take local's place meanwhile: neither would have the range then.
 * It is as good as local only while nobody is better.
 */
static int
decide_locked (struct nbdm *v, struct request *req, int local_rc)
{
  bool remote_has = on_any_remote (v, req);
  bool everywhere = true;
  int alike, rc = local_rc;

  while (v->local.taking_over)
    pthread_cond_wait (&v->changed, &v->lock);
  alike = remote_has || v->local.state == NBDM_LOCAL_FAILED ? 0 : local_rc;
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    if (req->legs[i].active)
      everywhere = leg_settle_locked (req, &req->legs[i], alike) && everywhere;
  if (rc < 0 && remote_has && local_takeover_locked (v) == 0)
    rc = 0;
  if (rc < 0 && v->local.flush_error)
    volume_fail_locked (v, v->local.reason);
  if (rc == 0 && v->local.state != NBDM_LOCAL_OK)
    rc = secure_locked (v, req, local_rc == 0 && req->on_local);
  if (local_rc < 0 && v->local.state != NBDM_LOCAL_FAILED)
    local_error_locked (v, req, local_rc);
  /* Fenced: it may have been admitted under policy degrade, when a remote was
   * behind and got nothing or not all of it.
   */
  if (rc == 0 && v->policy == NBDM_STOP && (!everywhere || v->fenced))
    rc = set_message (-EIO, "policy stop: a remote is out of sync");
  if (rc == 0 && v->failed)
    rc = set_message (-EIO, "the volume has failed: %s", v->reason);
  return rc;
}

/* The request leaves the engine: what became of it, slot and ranges given
 * back.  The answer.
 */
static int
settle_locked (struct nbdm *v, struct request *req, int local_rc)
{
  int rc = decide_locked (v, req, local_rc);

  fault_point ("before_retire");
  request_retire_locked (v, req);
  v->writes++;
  return rc;
}

static void
settled (struct nbdm *v, struct request *req)
{
  bool sent = false;
  uint64_t end;

  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    sent = sent || (req->legs[i].active && req->legs[i].sent);
    conn_put (req->legs[i].conn);
  }
  fault_point ("before_answer");
  end = now_ns ();
  atomic_fetch_add (&v->write_ns, end - req->start_ns);
  latency_add (&v->latency, sent ? LATENCY_MIRRORED : LATENCY_LOCAL,
               req->start_ns, end);
}

bool
request_try_settle (struct nbdm *v, struct request *req, int *rc)
{
  bool well;

  pthread_mutex_lock (&v->lock);
  /* Then nothing in decide_locked waits. */
  well = v->local.state == NBDM_LOCAL_OK && !v->local.taking_over;
  if (well)
    *rc = settle_locked (v, req, 0);
  pthread_mutex_unlock (&v->lock);
  if (well)
    settled (v, req);
  return well;
}

int
request_complete (struct nbdm *v, struct request *req, int local_rc)
{
  int rc;

  for (uint32_t i = 0; i < v->nr_remotes; i++)
    if (req->legs[i].active) {
      leg_finish (req, &req->legs[i]);
      inflight_done (&v->inflight, req->slot, 2u << i);
    }
  fault_point ("after_remote");
  pthread_mutex_lock (&v->lock);
  rc = settle_locked (v, req, local_rc);
  pthread_mutex_unlock (&v->lock);
  settled (v, req);
  return rc;
}

int
request_write_local (struct nbdm *v, const struct request *req)
{
  int rc;

  if (!req->on_local)
    return 0;
  rc = req->buf ? local_pwrite (v, req->buf, req->length, req->offset)
                : local_zero (v, req->length, req->offset,
                              req->flags & NBDM_MAY_TRIM);
  if (rc < 0)
    local_note_error (v);
  /* Not RWF_DSYNC: that reports, once, write-back errors of any page of the
   * file, and a flush after it would succeed and mean nothing (rule 10).
   */
  if (rc == 0 && (req->flags & NBDM_FUA))
    rc = flush_local_group (v);
  return rc;
}

static int
run_request (struct nbdm *v, enum slot_kind kind, const void *buf,
             uint64_t length, uint64_t offset, uint32_t flags)
{
  struct request req;
  int rc;

  req.start_ns = now_ns ();
  req.kind = kind;
  req.flags = flags;
  req.offset = offset;
  req.length = length;
  req.buf = buf;
  rc = request_admit (v, &req);
  pthread_cond_destroy (&req.granted);
  if (rc < 0)
    return rc;
  fault_point ("after_log");
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    if (req.legs[i].active)
      leg_issue (&req.legs[i]);
  fault_point ("after_issue");
  rc = request_write_local (v, &req);
  inflight_done (&v->inflight, req.slot, 1);
  fault_point ("after_local");
  return request_complete (v, &req, rc);
}

int
check_range (const struct nbdm *v, uint64_t count, uint64_t offset)
{
  uint32_t block = nbdm_min_block (v);

  if (count > v->size || offset > v->size - count)
    return set_message (-EINVAL, "the range lies outside the volume");
  if (offset % block || count % block)
    return set_message (-EINVAL, "the range is not in blocks of %u bytes",
                        block);
  return 0;
}

int
nbdm_pwrite (struct nbdm *v, const void *buf, uint32_t count, uint64_t offset,
             uint32_t flags)
{
  int rc = check_range (v, count, offset);

  if (rc < 0 || count == 0)
    return rc;
  if (count > NBDM_MAX_REQUEST)
    return set_message (-EINVAL, "longer than %u bytes", NBDM_MAX_REQUEST);
  return run_request (v, SLOT_WRITE, buf, count, offset, flags & NBDM_FUA);
}

static int
run_chunks (struct nbdm *v, enum slot_kind kind, uint64_t count,
            uint64_t offset, uint32_t flags)
{
  int rc = check_range (v, count, offset);

  while (rc == 0 && count > 0) {
    uint64_t length = CHUNK - offset % CHUNK;

    if (length > count)
      length = count;
    rc = run_request (v, kind, NULL, length, offset, flags);
    offset += length;
    count -= length;
  }
  return rc;
}

/* A trim is a zero that may trim, on every leg: NBD's TRIM promises nothing
 * about what is read afterwards, and two disks that both "may" read as
 * anything are not a mirror.
 */
int
nbdm_trim (struct nbdm *v, uint64_t count, uint64_t offset, uint32_t flags)
{
  return run_chunks (v, SLOT_TRIM, count, offset,
                     (flags & NBDM_FUA) | NBDM_MAY_TRIM);
}

/* Fast zero is refused before anything is changed, unless every leg says it
 * is fast; a remote that is slow at it after all costs time, not bytes.
 */
static bool
fast_zero_everywhere (struct nbdm *v, bool may_trim)
{
  bool fast = local_fast_zero (v, may_trim);

  pthread_mutex_lock (&v->lock);
  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    const struct remote *r = &v->remotes[i];
    if (r->admitted && !conn_info (r->conn)->can_fast_zero)
      fast = false;
  }
  pthread_mutex_unlock (&v->lock);
  return fast;
}

int
nbdm_zero (struct nbdm *v, uint64_t count, uint64_t offset, uint32_t flags)
{
  if ((flags & NBDM_FAST_ZERO)
      && !fast_zero_everywhere (v, flags & NBDM_MAY_TRIM))
    return set_message (-EOPNOTSUPP, "zeroing is not fast here");
  return run_chunks (v, SLOT_ZERO, count, offset,
                     flags & (NBDM_FUA | NBDM_MAY_TRIM));
}

uint32_t
nbdm_min_block (const struct nbdm *v)
{
  return v->size % NBDM_SECTOR == 0 ? NBDM_SECTOR : 1;
}
