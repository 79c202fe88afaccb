/* SPDX-License-Identifier: BSD-3-Clause */

/* Bytes that were sent to a remote and are not flushed; see backlog.c. */

#ifndef NBDM_BACKLOG_H
#define NBDM_BACKLOG_H

#include <stdbool.h>
#include <stdint.h>

struct conn;
struct conn_report;
struct remote;

/* Zeroes are counted separately: most servers punch a hole for them, and some
 * write every byte.
 */
enum backlog_kind { BACKLOG_DATA, BACKLOG_ZEROES, BACKLOG_KINDS };

/* How many bytes may be unflushed, so that a flush takes only a part of the
 * deadline.  Plain data: it has no lock and reads no clock.
 */
struct flush_bound {
  uint64_t deadline_ns;
  uint64_t bytes[BACKLOG_KINDS];
  uint64_t slow_bytes, slow_ns; /* of the last flush, if it was slow; else 0 */
};

void flush_bound_init (struct flush_bound *bound, uint32_t deadline_ms);
/* A flush of the `covered` bytes took `took_ns`. */
void flush_bound_took (struct flush_bound *bound, const uint64_t *covered,
                       uint64_t took_ns);
/* The connection passed its deadline with these bytes unflushed. */
void flush_bound_lost (struct flush_bound *bound, const uint64_t *covered);
/* The remote took `took_ns` to answer these zeroes. */
void flush_bound_zeroed (struct flush_bound *bound, uint64_t bytes,
                         uint64_t took_ns);
/* How much of `wanted` may be sent while `used` is unflushed; 0: none.  The
 * result is never 0 if nothing is unflushed.
 */
uint64_t flush_bound_room (const struct flush_bound *bound,
                           const uint64_t *used, enum backlog_kind kind,
                           uint64_t wanted);
/* Is half of the bound used? */
bool flush_bound_half (const struct flush_bound *bound, const uint64_t *used);

/* The backlog of one remote.  Protected by volume->lock. */
struct backlog {
  struct flush_bound bound;         /* kept when the connection is lost */
  uint64_t sent[BACKLOG_KINDS];     /* not answered yet */
  uint64_t answered[BACKLOG_KINDS]; /* since the last flush began */
  uint64_t covered[BACKLOG_KINDS];  /* by the flush under way */
  uint64_t began_ns;                /* when that flush began */
  const struct conn *conn; /* connection of these bytes; NULL: no bytes */
  uint64_t tickets, turn;  /* of the queue that waits for room */
};

/* How much of `wanted` may be sent to the remote now; 0: none, wait for room.
 * `first`: the caller is between enter and leave.  Other callers get no room
 * while a thread waits.  The caller adds the bytes that it sends to
 * backlog.sent.
 */
uint64_t backlog_room_locked (const struct remote *r, enum backlog_kind kind,
                              uint64_t wanted, bool first);
/* The bytes are answered, or never will be.  `unflushed`: the command
 * succeeded, and its bytes need a flush.
 */
void backlog_answer_locked (struct remote *r, const struct conn *conn,
                            enum backlog_kind kind, uint64_t bytes,
                            bool unflushed);
/* Wait in the queue until there is room, or until the connection is lost.
 * Releases the lock while it waits.  The caller may hold ranges, and must lead
 * no flush.  It must take its room and leave the queue without releasing the
 * lock.
 */
void backlog_enter_relock (struct remote *r, const struct conn *conn,
                           enum backlog_kind kind);
void backlog_leave_locked (struct remote *r);
/* Is half of the bound unflushed, while no flush is under way? */
bool backlog_pressed_locked (const struct remote *r);
/* A flush begins, a flush succeeded, the connection is lost.  The last may
 * replace report->why with a better message.
 */
void backlog_flush_begun_locked (struct remote *r);
void backlog_flushed_locked (struct remote *r, uint64_t answered_ns);
void backlog_lost_locked (struct remote *r, struct conn_report *report);
void backlog_forget_locked (struct remote *r);

#endif /* NBDM_BACKLOG_H */
