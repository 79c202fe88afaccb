/* SPDX-License-Identifier: BSD-3-Clause */

/* The direct door's memory: one budget for the buffers of all clients.
 *
 * A session reserves the next request's buffer before it takes the request from
 * the socket, and stops reading if there is no memory.  So the memory of all
 * clients together is bounded, however many they are and whatever they leave
 * unread.  A session's first DIRECT_FREE_BYTES are not counted, so small
 * requests never wait for those of other clients.
 *
 * It cannot deadlock: a request has its whole buffer before its payload is
 * received or its data is read.  So requests need no more memory to end, and
 * give it back when they end.  Only a client can keep memory for ever: it does
 * not read its answers, or does not send a payload.  Sessions that wait look
 * for such clients (budget_press), and disconnect one that moves too little:
 *
 *   in `stall_ns`                less than MOVED_BYTES;
 *   in KEEP_STALLS times that    less than it kept when this time began.
 *
 * So each buffer that a client keeps is given back after twice the longer time
 * at the latest, however the client spreads its bytes.  While others wait it
 * gets no other buffer in its place: it queues behind them.  No session
 * starves: sessions are served in the order they came, and the largest request
 * fits the smallest budget.
 *
 * A session's own buffers, which it has without any request, lower what is left
 * for requests, down to the largest one: their number has its own limit.  A
 * session may come while more is used; then the others get less from then on.
 *
 * A session reserves in whole chunks, so small buffers that come and go cost
 * only a comparison.
 */

#include <string.h>
#include <sys/socket.h>

#include "base/clock.h"
#include "base/lock.h"
#include "doors/direct.h"
#include "doors/direct_answer.h"
#include "doors/direct_memory.h"
#include "wire/mailbox.h"

#define CHUNK (UINT64_C (1) << 20)
#define PRESS_NS (200 * NS_PER_MS) /* between two checks */
#define STALE_NS (3 * NS_PER_S)    /* since the last check: begin anew */
#define MOVED_BYTES (256u << 10)   /* in `stall_ns` */
#define KEEP_STALLS 6u             /* times `stall_ns`, for all it keeps */

void
budget_init (struct budget *budget, uint64_t limit, uint64_t stall_ns)
{
  memset (budget, 0, sizeof *budget);
  pthread_mutex_init (&budget->lock, NULL);
  budget->limit = limit;
  budget->stall_ns = stall_ns;
}

void
budget_end (struct budget *budget)
{
  pthread_mutex_destroy (&budget->lock);
}

/* The reservation of a session with `bytes` bytes of buffers. */
static uint64_t
charge_of (uint64_t bytes)
{
  if (bytes <= DIRECT_FREE_BYTES)
    return 0;
  return (bytes - DIRECT_FREE_BYTES + CHUNK - 1) / CHUNK * CHUNK;
}

static uint64_t
held_locked (const struct session *s)
{
  return s->bytes + s->kept + s->promised;
}

static uint64_t
room_for_requests (struct budget *budget)
{
  uint64_t fixed = atomic_load (&budget->fixed);

  return budget->limit > fixed + NBDM_MAX_REQUEST ? budget->limit - fixed
                                                  : NBDM_MAX_REQUEST;
}

static bool
reserve (struct budget *budget, uint64_t bytes)
{
  uint64_t used = atomic_load (&budget->used),
           room = room_for_requests (budget);

  do
    if (bytes > room || used > room - bytes)
      return false;
  while (!atomic_compare_exchange_weak (&budget->used, &used, used + bytes));
  return true;
}

/* --- Waiting sessions ---------------------------------------------------- */

/* Under the budget's lock: first come, first served. */
static void
grant (struct budget *budget)
{
  struct session *s;

  while ((s = budget->first) && reserve (budget, s->wants)) {
    budget->first = s->next_waiting;
    if (budget->first == NULL)
      budget->last = NULL;
    atomic_fetch_sub (&budget->nr_waiting, 1);
    atomic_store (&s->granted, s->wants);
    mailbox_ring (s->lane.watch.box);
  }
}

/* Either the session that joins the queue finds these bytes, or this thread
 * finds it there.
 */
static void
give_back (struct budget *budget, atomic_u64 *to, uint64_t bytes)
{
  atomic_fetch_sub (to, bytes);
  if (atomic_load (&budget->nr_waiting) == 0)
    return;
  LOCK_FOR_SCOPE (&budget->lock);
  grant (budget);
}

static void
queue (struct budget *budget, struct session *s, uint64_t wants)
{
  LOCK_FOR_SCOPE (&budget->lock);
  s->wants = wants;
  s->next_waiting = NULL;
  if (budget->last)
    budget->last->next_waiting = s;
  else
    budget->first = s;
  budget->last = s;
  atomic_fetch_add (&budget->nr_waiting, 1);
  grant (budget);
}

static void
leave_queue (struct budget *budget, struct session *s)
{
  struct session **p = &budget->first, *before = NULL;

  LOCK_FOR_SCOPE (&budget->lock);
  for (; *p && *p != s; p = &(*p)->next_waiting)
    before = *p;
  if (*p) {
    *p = s->next_waiting;
    if (budget->last == s)
      budget->last = before;
    atomic_fetch_sub (&budget->nr_waiting, 1);
    grant (budget); /* the next ones may need less */
  }
}

void
budget_come (struct budget *budget, uint64_t bytes)
{
  atomic_fetch_add (&budget->fixed, bytes);
}

void
budget_go (struct budget *budget, uint64_t bytes)
{
  give_back (budget, &budget->fixed, bytes);
  mailbox_ring_all ();
}

/* --- A session's part ----------------------------------------------------- */

void
budget_settle_locked (struct session *s)
{
  uint64_t due = charge_of (held_locked (s));

  if (due < s->charged) {
    uint64_t surplus = s->charged - due;

    s->charged = due;
    give_back (&s->clients->budget, &s->clients->budget.used, surplus);
  }
}

bool
budget_is_short (const struct session *s)
{
  return atomic_load_explicit (&s->clients->budget.nr_waiting,
                               memory_order_relaxed)
         > 0;
}

/* True: the memory it waited for is granted. */
static bool
collect_locked (struct session *s)
{
  uint64_t granted = atomic_exchange (&s->granted, 0);

  s->charged += granted;
  s->waiting = s->waiting && granted == 0;
  return !s->waiting;
}

/* Does the session hold enough, or is there more, and no session waits? */
static bool
charge_locked (struct session *s, size_t bytes)
{
  struct budget *budget = &s->clients->budget;
  uint64_t due = charge_of (held_locked (s) + bytes);

  if (due > s->charged) {
    if (atomic_load (&budget->nr_waiting) > 0
        || !reserve (budget, due - s->charged))
      return false;
    s->charged = due;
  }
  s->promised = bytes;
  return true;
}

/* Otherwise it would be granted memory that it never uses: its client may send
 * nothing more, and an idle client does not count as stalled.
 */
void
budget_withdraw_locked (struct session *s)
{
  if (!s->waiting)
    return;
  leave_queue (&s->clients->budget, s);
  (void)collect_locked (s);
  s->waiting = false;
  budget_settle_locked (s);
}

/* Its own requests may have ended by now: then it need not wait. */
static bool
fits_locked (struct session *s, size_t bytes)
{
  if (charge_of (held_locked (s) + bytes) > s->charged)
    return false;
  s->promised = bytes;
  budget_withdraw_locked (s);
  return true;
}

bool
budget_take_locked (struct session *s, size_t bytes)
{
  struct budget *budget = &s->clients->budget;

  if (fits_locked (s, bytes))
    return true;
  if (s->waiting && !collect_locked (s))
    return false;
  if (charge_locked (s, bytes))
    return true;
  spare_free_locked (s);
  if (charge_locked (s, bytes))
    return true;
  /* Rounded up, so that it stays enough whatever is given back before. */
  s->waiting = true;
  queue (budget, s, (bytes + CHUNK - 1) / CHUNK * CHUNK);
  return collect_locked (s) && charge_locked (s, bytes);
}

void
budget_leave (struct session *s)
{
  pthread_mutex_lock (&s->lock);
  s->promised = 0;
  budget_withdraw_locked (s);
  budget_settle_locked (s);
  pthread_mutex_unlock (&s->lock);
  mailbox_ring_all ();
}

/* --- Clients that keep memory
 * -------------------------------------------------
 */

/* The bytes of buffers that wait for the client, and not for the volume. */
static uint64_t
kept_locked (const struct session *s)
{
  uint64_t kept = atomic_load_explicit (&s->receiving, memory_order_relaxed);

  for (const struct op *op = s->first; op; op = op->next)
    kept += op->room;
  return kept;
}

static void
begin_pace (struct pace *pace, uint64_t now, uint64_t moved, uint64_t due)
{
  *pace = (struct pace){ .since_ns = now, .moved = moved, .due = due };
}

/* True: the time is over, and not all that was due has moved.  Begins again
 * once it has.
 */
static bool
is_late (struct pace *pace, uint64_t now, uint64_t moved, uint64_t due,
         uint64_t limit_ns)
{
  if (moved - pace->moved >= pace->due)
    begin_pace (pace, now, moved, due);
  return now - pace->since_ns >= limit_ns;
}

/* How long the client has moved too little of the memory that it keeps; 0: it
 * moves enough.
 */
static uint64_t
stalled_ns (struct session *s, uint64_t now, bool anew, uint64_t stall_ns)
{
  uint64_t moved = atomic_load_explicit (&s->moved, memory_order_relaxed);
  uint64_t kept;
  bool keeps;

  pthread_mutex_lock (&s->lock);
  spare_free_locked (s);
  kept = kept_locked (s);
  keeps = (s->charged > 0 || atomic_load (&s->granted) > 0)
          && (s->first || kept > 0);
  pthread_mutex_unlock (&s->lock);
  if (anew || s->least.since_ns == 0 || !keeps) {
    begin_pace (&s->least, now, moved, MOVED_BYTES);
    begin_pace (&s->whole, now, moved, kept);
    return 0;
  }
  if (is_late (&s->least, now, moved, MOVED_BYTES, stall_ns))
    return stall_ns;
  if (is_late (&s->whole, now, moved, kept, KEEP_STALLS * stall_ns))
    return KEEP_STALLS * stall_ns;
  return 0;
}

void
budget_press (struct clients *clients)
{
  struct budget *budget = &clients->budget;
  uint64_t now = now_ns ();
  bool anew;

  pthread_mutex_lock (&clients->lock);
  if (now - budget->pressed_ns >= PRESS_NS) {
    anew = now - budget->pressed_ns > STALE_NS;
    budget->pressed_ns = now;
    for (struct session *s = clients->first; s; s = s->next) {
      uint64_t stalled = stalled_ns (s, now, anew, budget->stall_ns);

      if (stalled > 0) {
        atomic_store (&s->stalled_ns, stalled);
        (void)shutdown (s->fd, SHUT_RDWR);
      }
    }
  }
  pthread_mutex_unlock (&clients->lock);
  mailbox_ring_all ();
}
