/* SPDX-License-Identifier: BSD-3-Clause */

/* Limit the bytes that a remote has unflushed, so that its next flush ends
 * within the deadline.
 *
 * A server with a write cache answers writes as fast as the link delivers them,
 * and does the slow work in the flush.  No byte moves during a flush.  If the
 * cache held too much, the flush would pass the deadline, the connection would
 * be lost, all the data would be copied again, and the next flush would end the
 * same way.  So each remote has a bound in bytes.  A flush begins when half of
 * the bound is unflushed.  A write or a copy that finds no room waits for a
 * flush.
 *
 * The bound is measured.  It starts with what a disk of 1 MB/s flushes in a
 * quarter of the deadline.  It doubles when a flush of at least half of it took
 * a sixth of the deadline or less: twice as many bytes then take at most a
 * third.  It grows fourfold when the flush took a quarter of that time: on a
 * link with a long round trip many small steps would waste time.  When a flush
 * took more than a third of the deadline, the bound shrinks to what takes a
 * sixth at that rate.  When a deadline passed, it shrinks much more, because
 * then only an upper limit of the rate is known.  A new connection keeps the
 * bound.
 *
 * Bytes count from the moment they are sent, because the server may have them.
 * The bound counts bytes, not regions, because the bytes written determine the
 * cost of a flush.  A server may punch a hole for zeroes or write every byte,
 * so zeroes have a bound of their own.  Each kind also uses up its share of the
 * other kind's bound.
 *
 * Waiters form a queue, and the first of them flushes if no other thread does.
 * So no waiter depends on another thread being started or woken.  A waiter may
 * hold ranges, because a flush waits for no range; but it leads no flush.
 */

#include <stdio.h>
#include <string.h>

#include "base/clock.h"
#include "volume/backlog.h"
#include "volume/flush.h"
#include "volume/volume.h"
#include "wire/conn.h"
#include "wire/transport.h"

#define START_BYTES_PER_MS                                                     \
  1000               /* taken for the rate before any was measured             \
                      */
#define START_PART 4 /* of the deadline */
#define QUICK_PART 6
#define SLOW_PART 3
#define LOST_FACTOR 16
#define LEAST (64u << 10)
#define MOST_DATA (UINT64_C (1) << 30)
#define MOST_ZEROES (UINT64_C (8) << 30)
#define STEP LEAST /* commands are cut, and bounds are, at multiples of it */

/* --- the bound --------------------------------------------------------- */

static uint64_t
start_bytes (const struct flush_bound *bound)
{
  uint64_t bytes
      = bound->deadline_ns / NS_PER_MS * START_BYTES_PER_MS / START_PART;

  bytes -= bytes % STEP;
  return bytes > LEAST ? bytes : LEAST;
}

void
flush_bound_init (struct flush_bound *bound, uint32_t deadline_ms)
{
  *bound = (struct flush_bound){ .deadline_ns = deadline_ms * NS_PER_MS };
  for (int k = 0; k < BACKLOG_KINDS; k++)
    bound->bytes[k] = start_bytes (bound);
}

static void
lower (struct flush_bound *bound, int kind, uint64_t to, uint64_t least)
{
  to -= to % STEP;
  if (to < least)
    to = least;
  if (to < bound->bytes[kind])
    bound->bytes[kind] = to;
}

/* Is this enough of the bound for the flush time to be meaningful? */
static bool
weighs (const struct flush_bound *bound, int kind, uint64_t bytes)
{
  return bytes >= bound->bytes[kind] / 4;
}

/* If little data took a long time, the disk may be busy with other work.  Then
 * lower the bound by half, but not below its start value.
 */
static void
slow (struct flush_bound *bound, int kind, uint64_t bytes, uint64_t took_ns)
{
  if (weighs (bound, kind, bytes))
    lower (bound, kind,
           (uint64_t)((double)bytes * (double)bound->deadline_ns / QUICK_PART
                      / (double)took_ns),
           LEAST);
  else if (bytes > 0)
    lower (bound, kind, bound->bytes[kind] / 2, start_bytes (bound));
}

static void
grow (struct flush_bound *bound, int kind, uint64_t took_ns)
{
  static const uint64_t most[] = { MOST_DATA, MOST_ZEROES };
  bool very_quick = took_ns <= bound->deadline_ns / QUICK_PART / 4;

  bound->bytes[kind] *= very_quick ? 4 : 2;
  if (bound->bytes[kind] > most[kind])
    bound->bytes[kind] = most[kind];
}

void
flush_bound_took (struct flush_bound *bound, const uint64_t *covered,
                  uint64_t took_ns)
{
  uint64_t bytes = covered[BACKLOG_DATA] + covered[BACKLOG_ZEROES];
  bool gained = 2 * bytes > bound->slow_bytes
                || took_ns < bound->slow_ns - bound->slow_ns / 4;

  if (took_ns > bound->deadline_ns / SLOW_PART) {
    /* If half the bytes took as long, the bytes are not the cause. */
    for (int k = 0; k < BACKLOG_KINDS && gained; k++)
      slow (bound, k, covered[k], took_ns);
    if (gained) {
      bound->slow_bytes = bytes;
      bound->slow_ns = took_ns;
    }
    return;
  }
  bound->slow_bytes = bound->slow_ns = 0;
  for (int k = 0; k < BACKLOG_KINDS; k++)
    if (took_ns <= bound->deadline_ns / QUICK_PART
        && covered[k] >= bound->bytes[k] / 2)
      grow (bound, k, took_ns);
}

void
flush_bound_lost (struct flush_bound *bound, const uint64_t *covered)
{
  for (int k = 0; k < BACKLOG_KINDS; k++)
    if (covered[k] > 0)
      lower (bound, k, covered[k] / LOST_FACTOR,
             weighs (bound, k, covered[k]) ? LEAST : start_bytes (bound));
}

/* A quick answer does not prove a quick flush: only a flush raises the bound.
 */
void
flush_bound_zeroed (struct flush_bound *bound, uint64_t bytes, uint64_t took_ns)
{
  if (took_ns > bound->deadline_ns / SLOW_PART)
    slow (bound, BACKLOG_ZEROES, bytes, took_ns);
}

uint64_t
flush_bound_room (const struct flush_bound *bound, const uint64_t *used,
                  enum backlog_kind kind, uint64_t wanted)
{
  enum backlog_kind other = BACKLOG_KINDS - 1 - kind;
  uint64_t all = bound->bytes[kind], taken = used[kind], room;

  if (used[other] > 0)
    taken += (uint64_t)((double)used[other] * (double)all
                        / (double)bound->bytes[other]);
  if (wanted <= all && taken <= all - wanted)
    return wanted;
  if (taken == 0)
    return all < wanted ? all : wanted;
  room = taken < all ? all - taken : 0;
  if (room < all / 4 || room < STEP)
    return 0; /* avoid many small pieces */
  return room - room % STEP;
}

bool
flush_bound_half (const struct flush_bound *bound, const uint64_t *used)
{
  return used[BACKLOG_DATA] >= bound->bytes[BACKLOG_DATA] / 2
         || used[BACKLOG_ZEROES] >= bound->bytes[BACKLOG_ZEROES] / 2;
}

/* --- the backlog of a remote ------------------------------------------- */

uint64_t
backlog_room_locked (const struct remote *r, enum backlog_kind kind,
                     uint64_t wanted, bool first)
{
  const struct backlog *log = &r->backlog;
  uint64_t used[BACKLOG_KINDS];

  if (r->disk.volume->failed)
    return wanted;
  if (!first && log->tickets != log->turn)
    return 0;
  for (int k = 0; k < BACKLOG_KINDS; k++)
    used[k] = log->sent[k] + log->answered[k];
  return flush_bound_room (&log->bound, used, kind, wanted);
}

void
backlog_answer_locked (struct remote *r, const struct conn *conn,
                       enum backlog_kind kind, uint64_t bytes, bool unflushed)
{
  struct backlog *log = &r->backlog;

  log->sent[kind] -= bytes;
  if (unflushed && r->conn == conn)
    log->answered[kind] += bytes;
  if (log->tickets != log->turn)
    pthread_cond_broadcast (&r->disk.volume->changed);
}

static bool
can_go_locked (const struct remote *r, const struct conn *conn,
               enum backlog_kind kind)
{
  return r->conn != conn || backlog_room_locked (r, kind, UINT64_MAX, true) > 0;
}

void
backlog_enter_relock (struct remote *r, const struct conn *conn,
                      enum backlog_kind kind)
{
  struct backlog *log = &r->backlog;
  struct nbdm *v = r->disk.volume;
  uint64_t ticket = log->tickets++;

  while (log->turn != ticket || !can_go_locked (r, conn, kind)) {
    if (log->turn == ticket && !r->disk.flush.running
        && log->answered[BACKLOG_DATA] + log->answered[BACKLOG_ZEROES] > 0) {
      pthread_mutex_unlock (&v->lock);
      remote_flush_alone (r);
      pthread_mutex_lock (&v->lock);
      continue;
    }
    if (log->turn == ticket && remote_flush_take_relock (r))
      continue;
    r->flush_sent.sleep++;
    pthread_cond_wait (&v->changed, &v->lock);
    r->flush_sent.sleep--;
  }
}

void
backlog_leave_locked (struct remote *r)
{
  r->backlog.turn++;
  if (r->backlog.tickets != r->backlog.turn)
    pthread_cond_broadcast (&r->disk.volume->changed);
}

bool
backlog_pressed_locked (const struct remote *r)
{
  return !r->disk.flush.running
         && flush_bound_half (&r->backlog.bound, r->backlog.answered);
}

void
backlog_flush_begun_locked (struct remote *r)
{
  struct backlog *log = &r->backlog;

  memcpy (log->covered, log->answered, sizeof log->covered);
  memset (log->answered, 0, sizeof log->answered);
  log->began_ns = now_ns ();
  log->conn = r->conn;
}

void
backlog_flushed_locked (struct remote *r, uint64_t answered_ns)
{
  struct backlog *log = &r->backlog;

  flush_bound_took (&log->bound, log->covered,
                    answered_ns > log->began_ns ? answered_ns - log->began_ns
                                                : 0);
  memset (log->covered, 0, sizeof log->covered);
  log->conn = NULL;
}

/* Bytes that were sent and not answered count too: they may be FUA, or the
 * server's cache is full and the server writes before it answers.
 */
void
backlog_lost_locked (struct remote *r, struct conn_report *report)
{
  struct backlog *log = &r->backlog;
  bool flushing = log->conn && log->conn == r->conn;
  bool least = log->bound.bytes[BACKLOG_DATA] <= start_bytes (&log->bound);
  uint64_t used[BACKLOG_KINDS];

  for (int k = 0; k < BACKLOG_KINDS; k++)
    used[k] = log->sent[k] + (flushing ? log->covered[k] : log->answered[k]);
  if (report->overdue)
    flush_bound_lost (&log->bound, used);
  else if (flushing
           && now_ns () - log->began_ns > log->bound.deadline_ns / SLOW_PART)
    flush_bound_took (&log->bound, log->covered, now_ns () - log->began_ns);
  if (report->overdue && flushing)
    snprintf (report->why, sizeof report->why,
              "a flush was not answered within %g s%s", r->deadline_ms / 1000.0,
              least ? ": its disk is too slow for that, or hangs; a longer "
                      "`deadline` gives it more time"
                    : "; less is left unflushed from now on");
}

void
backlog_forget_locked (struct remote *r)
{
  struct backlog *log = &r->backlog;

  memset (log->answered, 0, sizeof log->answered);
  memset (log->covered, 0, sizeof log->covered);
  log->conn = NULL;
}
