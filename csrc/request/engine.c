/* SPDX-License-Identifier: BSD-3-Clause */

/* The write path: log, send to every leg, wait, decide, answer.
 *
 *   admit.c    range lock, activity extents, slot, classification
 *   leg.c      what goes to one remote, and its answers
 *   here       issue remote, then local, in parallel; wait; outcome
 *   state.c    what an outcome does to a remote's state
 *
 * Outcomes:
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

#include "api.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/fault.h"
#include "base/latency.h"
#include "base/lock.h"
#include "logs/bitmap.h"
#include "logs/inflight.h"
#include "logs/layout.h"
#include "request/admit.h"
#include "request/engine.h"
#include "request/leg.h"
#include "request/read.h"
#include "request/sector.h"
#include "volume/flush.h"
#include "volume/flusher.h"
#include "volume/local.h"
#include "volume/local_state.h"
#include "volume/node.h"
#include "volume/state.h"
#include "volume/volume.h"
#include "wire/conn.h"

static const char *
kind_name (enum slot_kind kind)
{
  static const char *const names[] = { "?", "write", "trim", "zero" };
  return names[kind];
}

/* Account for a leg's end in its remote's state and maps.  Returns whether the
 * remote has the bytes, or will get them without losing the client's trust
 * (degrade).
 */
static bool
leg_account_locked (struct request *req, struct leg *leg, int alike)
{
  struct remote *r = leg->remote;
  struct nbdm *v = r->disk.volume;
  char why[NBDM_REASON_LEN];

  leg_count_locked (req, leg, leg->result == 0);
  if (leg->result == 0) {
    if (!req->remote_fua && r->conn == leg->conn)
      unflushed_add_locked (r, req->offset, req->length);
    node_left_behind_locked (r, req);
    return true;
  }
  /* Both disks refused with the same error, so neither is the worse one; resync
   * copies the range from local again (local_error_locked).
   */
  if (leg->result != LEG_LOST && leg->result != alike) {
    snprintf (why, sizeof why, "it answered a %s at %llu with: %s",
              kind_name (req->kind), (unsigned long long)req->offset,
              strerror (-leg->result));
    remote_broken_locked (r, leg->conn, why);
  }
  /* The change of state has already marked the range.  Marking it again costs
   * nothing, and does not depend on which thread changed the state.
   */
  mark_dirty_locked (r, req->offset, req->length, leg->sent);
  if (r->disk.is_node && leg->result != alike)
    node_missed_locked (v, r);
  if (leg->result == LEG_LOST && r->state == NBDM_IN_SYNC)
    remote_update_state_locked (r); /* back, but the request gave up */
  /* A remote that refused the request and was lost at once may be on hold, and
   * then no change of state has made the mark durable: see remote_miss_locked.
   */
  if (v->local.state != NBDM_LOCAL_OK && r->disk.dm.changed)
    volume_persist_locked (v);
  return false;
}

/* The local disk refused the write: resync makes every remote equal to local
 * again.  Where local misses the region a remote is the source, and the copy
 * back must be made again.
 */
static void
local_error_locked (struct nbdm *v, struct request *req, int rc)
{
  uint64_t first, count;

  if (v->secondary) /* the primary gets the error, and marks the range */
    return;
  region_span (v, req->offset, req->length, &first, &count);
  bitmap_clear (&v->local.disk.dm.copied, first, count);
  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    struct remote *r = &v->remotes[i];

    mark_dirty_locked (r, req->offset, req->length, false);
    if (r->disk.dm.map[MAP_DIRTY].nr_set > 0
        && (r->state == NBDM_IN_SYNC || remote_unaware_locked (r)))
      remote_lacks_locked (r,
                           "a local %s at %llu failed (%s): the range is "
                           "copied from local again",
                           kind_name (req->kind),
                           (unsigned long long)req->offset, strerror (-rc));
  }
  volume_persist_locked (v);
}

/* Local refused the write.  Where it cannot even read, it is made to miss what
 * a remote has: the remote stays the source of that.
 */
static void
miss_unreadable_relock (struct nbdm *v, const struct request *req, int rc)
{
  if (rc == -ENOSPC || v->failed || v->local.state == NBDM_LOCAL_FAILED)
    return;
  pthread_mutex_unlock (&v->lock);
  miss_unreadable (v, req->length, req->offset);
  pthread_mutex_lock (&v->lock);
  local_await_takeover_relock (v);
}

/* The same error from a remote: the rest of a region that the write changes a
 * part of is there still.
 */
static bool
refused_alike (const struct nbdm *v, const struct request *req, int rc)
{
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    if (req->legs[i].active && req->legs[i].result == rc)
      return true;
  return false;
}

/* Does a successful leg have every region that local misses? */
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
                && !bitmap_test (&leg->remote->disk.dm.map[MAP_DIRTY], region);
    }
    if (!covered)
      return false;
  }
  return true;
}

/* Local misses some or all of the range: the remotes that have it must make it
 * durable, also those that got it before local's failure was known.  Drops the
 * lock to flush.
 */
static int
secure_relock (struct nbdm *v, struct request *req, bool on_local)
{
  bool durable = req->remote_fua;

  req->remote_fua = true; /* also for commands that are sent again */
  for (uint32_t i = 0; i < v->nr_remotes && !durable; i++) {
    struct leg *leg = &req->legs[i];

    if (!leg->active || leg->result < 0)
      continue;
    pthread_mutex_unlock (&v->lock);
    leg_secure (req, leg);
    pthread_mutex_lock (&v->lock);
    leg_account_locked (req, leg, 0);
  }
  /* A takeover that fails leaves the range with local. */
  while (v->local.taking_over)
    pthread_cond_wait (&v->changed, &v->lock);
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

/* The request's answer, from the result of each leg.  May drop the lock.
 *
 * A remote that refused as local did stays in sync until local_error_locked,
 * and must not take local's place before that: neither disk would have the
 * range then.  It is as good as local only while no remote is better.
 */
static int
decide_relock (struct nbdm *v, struct request *req, int local_rc)
{
  bool remote_has = on_any_remote (v, req);
  bool everywhere = true;
  int alike, rc = local_rc;

  while (v->local.taking_over)
    pthread_cond_wait (&v->changed, &v->lock);
  /* A flush of local has failed, and a remote must take over.  That comes
   * first: this request may put out of sync the last remote that could.
   */
  if (rc < 0 && v->local.flush_error && v->local.state != NBDM_LOCAL_FAILED)
    local_flush_lost_relock (v);
  if (rc < 0 && !remote_has && refused_alike (v, req, rc))
    miss_unreadable_relock (v, req, rc); /* before the region becomes dirty */
  alike = remote_has || v->local.state == NBDM_LOCAL_FAILED ? 0 : local_rc;
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    if (req->legs[i].active)
      everywhere = leg_account_locked (req, &req->legs[i], alike) && everywhere;
  if (rc < 0 && remote_has && local_takeover_relock (v) == 0)
    rc = 0;
  if (rc == 0 && v->local.state != NBDM_LOCAL_OK && !v->secondary)
    rc = secure_relock (v, req, local_rc == 0 && req->on_local);
  if (local_rc < 0 && remote_has)
    miss_unreadable_relock (v, req, local_rc);
  if (local_rc < 0 && v->local.state != NBDM_LOCAL_FAILED)
    local_error_locked (v, req, local_rc);
  if (rc < 0 && rc == local_rc)
    set_message (rc, "%s", req->local_words);
  /* Fenced: the request may have been admitted under policy degrade, while a
   * remote was behind and got nothing or only a part.
   */
  if (rc == 0 && v->policy == NBDM_STOP && (!everywhere || v->fenced))
    rc = set_message (-EIO, "policy stop: a remote is out of sync");
  if (rc == 0 && v->failed)
    rc = set_message (-EIO, "the volume has failed: %s", v->reason);
  return rc;
}

/* --- A request's end, in two steps ---------------------------------------- */

/* Step 1: decide the answer; later events on its legs do not change it.  Today
 * every leg has ended by then; a leg that the answer need not wait for would
 * still be under way.
 */
static void
answer_relock (struct nbdm *v, struct request *req, int local_rc)
{
  req->answer = decide_relock (v, req, local_rc);
  v->writes++;
}

/* Step 2: no leg has a command under way; give back slot, extents and range.
 * retired () does the part that needs no volume lock.
 */
static void
retire_locked (struct nbdm *v, struct request *req)
{
  fault_point ("before_retire");
  request_retire_locked (v, req);
}

static void
retired (struct nbdm *v, struct request *req)
{
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    conn_put (req->legs[i].conn);
}

/* Count the time of the request; its client is answered next. */
static int
answered (struct nbdm *v, const struct request *req)
{
  bool sent = false;
  uint64_t end;

  for (uint32_t i = 0; i < v->nr_remotes; i++)
    sent = sent || (req->legs[i].active && req->legs[i].sent);
  fault_point ("before_answer");
  end = now_ns ();
  atomic_fetch_add (&v->write_ns, end - req->start_ns);
  latency_add (&v->latency, sent ? LATENCY_MIRRORED : LATENCY_LOCAL,
               req->start_ns, end);
  return req->answer;
}

bool
request_try_complete (struct nbdm *v, struct request *req, int *rc)
{
  bool well;

  pthread_mutex_lock (&v->lock);
  /* In that case nothing in decide_relock waits. */
  well = v->local.state == NBDM_LOCAL_OK && !v->local.taking_over;
  if (well) {
    answer_relock (v, req, 0);
    retire_locked (v, req);
  }
  pthread_mutex_unlock (&v->lock);
  if (!well)
    return false;
  retired (v, req);
  *rc = answered (v, req);
  return true;
}

int
request_complete (struct nbdm *v, struct request *req, int local_rc)
{
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    if (req->legs[i].active) {
      leg_finish (req, &req->legs[i]);
      if (req->long_zero)
        req->long_zero->waited_ns[i] += now_ns () - req->legs[i].began_ns;
      inflight_done (&v->inflight, req->slot, 2u << i);
    }
  fault_point ("after_remote");
  pthread_mutex_lock (&v->lock);
  answer_relock (v, req, local_rc);
  retire_locked (v, req);
  pthread_mutex_unlock (&v->lock);
  retired (v, req);
  return answered (v, req);
}

/* --- Requests ------------------------------------------------------------- */

int
request_write_local (struct nbdm *v, struct request *req)
{
  int rc;

  if (!req->on_local)
    return 0;
  rc = req->buf ? local_pwrite (v, req->buf, req->length, req->offset)
                : local_zero (v, req->length, req->offset,
                              req->flags & NBDM_MAY_TRIM);
  if (rc < 0)
    local_note_error (v, rc);
  if (rc == LOCAL_GIVEN_UP)
    rc = -EIO;
  /* Not RWF_DSYNC: it reports write-back errors of any page of the file, but
   * only once, so a later flush would succeed and prove nothing (rule 10).
   */
  if (rc == 0 && (req->flags & NBDM_FUA))
    rc = flush_local_or_replace (v);
  if (rc < 0)
    snprintf (req->local_words, sizeof req->local_words, "%s", last_error ());
  return rc;
}

/* Nothing was issued: give back all that the admission took. */
static void
abandon (struct nbdm *v, struct request *req)
{
  LOCK_FOR_SCOPE (&v->lock);
  request_unplan_locked (v, req);
  request_retire_locked (v, req);
}

static int
run_admitted (struct nbdm *v, struct request *req)
{
  int rc;

  fault_point ("after_log");
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    if (req->legs[i].active)
      leg_issue (&req->legs[i]);
  fault_point ("after_issue");
  rc = request_write_local (v, req);
  inflight_done (&v->inflight, req->slot, 1);
  fault_point ("after_local");
  return request_complete (v, req, rc);
}

int
request_run (struct nbdm *v, enum slot_kind kind, const void *buf,
             uint64_t length, uint64_t offset, uint32_t flags,
             const struct sector *sector, struct long_zero *long_zero)
{
  struct request req;
  int rc;

  req.start_ns = now_ns ();
  req.kind = kind;
  req.flags = flags;
  req.offset = offset;
  req.length = length;
  req.buf = buf;
  req.sector = sector;
  req.long_zero = long_zero;
  rc = request_admit (v, &req);
  pthread_cond_destroy (&req.granted);
  if (rc < 0)
    return rc;
  if (sector) {
    rc = request_fill (v, &req);
    if (rc < 0) {
      abandon (v, &req);
      return rc;
    }
  }
  return run_admitted (v, &req);
}

int
check_range (const struct nbdm *v, uint64_t count, uint64_t offset)
{
  if (count > v->size || offset > v->size - count)
    return set_message (-EINVAL, "the range lies outside the volume");
  return 0;
}

bool
in_sectors (const struct nbdm *v, uint64_t count, uint64_t offset)
{
  uint32_t block = nbdm_min_block (v);

  return offset % block == 0 && count % block == 0;
}

/* Cut the request into pieces of MAX_PIECE, so that a piece never needs more
 * extents than the activity log has.  NBD promises no atomicity; after an error
 * the first pieces may be done.
 */
static int
run_parts (struct nbdm *v, enum slot_kind kind, const void *buf, uint64_t count,
           uint64_t offset, uint32_t flags)
{
  struct long_zero waited = { .waited_ns = { 0 } };
  const uint8_t *from = buf;
  int rc = check_range (v, count, offset);

  while (rc == 0 && count > 0) {
    uint64_t max = buf ? MAX_PIECE : MAX_PIECE - offset % MAX_PIECE;
    uint64_t length = next_part (v, count, offset, max);

    rc = in_sectors (v, length, offset)
             ? request_run (v, kind, from, length, offset, flags, NULL,
                            from ? NULL : &waited)
             : sector_write (v, from, length, offset, flags);
    if (from)
      from += length;
    offset += length;
    count -= length;
  }
  return rc;
}

int
nbdm_pwrite (struct nbdm *v, const void *buf, uint32_t count, uint64_t offset,
             uint32_t flags)
{
  if (count > NBDM_MAX_REQUEST)
    return set_message (-EINVAL, "longer than %u bytes", NBDM_MAX_REQUEST);
  return run_parts (v, SLOT_WRITE, buf, count, offset, flags & NBDM_FUA);
}

/* A trim is a zero that may trim, on every leg: NBD's TRIM promises nothing
 * about what is read afterwards, and two disks that both "may" read as
 * anything are not a mirror.
 */
int
nbdm_trim (struct nbdm *v, uint64_t count, uint64_t offset, uint32_t flags)
{
  return run_parts (v, SLOT_TRIM, NULL, count, offset,
                    (flags & NBDM_FUA) | NBDM_MAY_TRIM);
}

/* Fast zero is refused before anything is changed, unless every leg says it is
 * fast; a remote that is slow all the same costs time, but no data.
 */
static bool
fast_zero_everywhere (struct nbdm *v, bool may_trim)
{
  LOCK_FOR_SCOPE (&v->lock);
  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    const struct remote *r = &v->remotes[i];
    if (r->admitted && !conn_info (r->conn)->can_fast_zero)
      return false;
  }
  return v->local.state == NBDM_LOCAL_FAILED || local_fast_zero (v, may_trim);
}

int
nbdm_zero (struct nbdm *v, uint64_t count, uint64_t offset, uint32_t flags)
{
  if ((flags & NBDM_FAST_ZERO)
      && !fast_zero_everywhere (v, flags & NBDM_MAY_TRIM))
    return set_message (-EOPNOTSUPP, "zeroing is not fast here");
  return run_parts (v, SLOT_ZERO, NULL, count, offset,
                    flags & (NBDM_FUA | NBDM_MAY_TRIM));
}

uint32_t
nbdm_min_block (const struct nbdm *v)
{
  return v->size % NBDM_SECTOR == 0 ? NBDM_SECTOR : 1;
}
