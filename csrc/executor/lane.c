/* SPDX-License-Identifier: BSD-3-Clause */

/* A lane: many requests on one thread of a door.
 *
 * The thread submits all requests that have come, which admits them; lane_push
 * sends their commands to the remotes together and does the local disk's part;
 * lane_take ends those whose answers have come.  So under load each system call
 * and each wake-up serves several requests.  A single write takes the same
 * steps, and no other thread is involved.
 *
 * The thread waits only in lane_poll.  Workers do all that may wait elsewhere:
 * express.c says which requests those are.
 */

#include <stddef.h>
#include <stdlib.h>

#include "base/error.h"
#include "executor/lane.h"
#include "wire/mailbox.h"

int
lane_init (struct lane *lane)
{
  lane->executor = NULL;
  lane->nr_begun = lane->nr_kept = 0;
  lane->kept = NULL;
  return watch_init (&lane->watch);
}

void
lane_destroy (struct lane *lane)
{
  struct begun *b;

  while ((b = lane->kept)) {
    lane->kept = b->next;
    free (b);
  }
  watch_end (&lane->watch);
}

void
lane_enter (struct lane *lane)
{
  mailbox_own (lane->watch.box);
}

void
lane_leave (struct lane *lane)
{
  watch_leave_idle (&lane->watch);
  mailbox_own (NULL);
}

static struct begun *
begun_get (struct lane *lane)
{
  struct begun *b = lane->kept;

  if (b == NULL)
    return malloc (sizeof *b);
  lane->kept = b->next;
  lane->nr_kept--;
  return b;
}

static void
begun_put (struct lane *lane, struct begun *b)
{
  if (lane->nr_kept >= LANE_KEEP_BEGUN) {
    free (b);
    return;
  }
  b->next = lane->kept;
  lane->kept = b;
  lane->nr_kept++;
}

static bool
begin_express (struct lane *lane, struct io *io)
{
  struct begun *b = begun_get (lane);

  if (b == NULL)
    return false; /* a worker needs no memory for it */
  if (!express_begin (lane->executor->volume, &b->express, io->buf,
                      (uint32_t)io->length, io->offset, io->flags,
                      &lane->watch)) {
    begun_put (lane, b);
    return false;
  }
  b->io = io;
  io->begun = b;
  return true;
}

static bool
read_at_once (struct nbdm *v, struct io *io)
{
  uint32_t count = (uint32_t)io->length;

  return express_readable (v, count)
         && express_read (v, io->buf, count, io->offset);
}

void
lane_submit (struct lane *lane, struct io *io)
{
  struct nbdm *v = lane->executor->volume;

  io->begun = NULL;
  if (io->kind == IO_WRITE && begin_express (lane, io)) {
    lane->begun[lane->nr_begun++] = io->begun;
    if (lane->nr_begun == LANE_BATCH)
      lane_push (lane);
  }
  else if (io->kind == IO_READ && read_at_once (v, io))
    io_finish (io, IO_BY_LANE, 0);
  else
    executor_queue (lane->executor, io);
}

static void
end_express (struct lane *lane, struct begun *b)
{
  struct io *io = b->io;
  int rc;

  clear_error ();
  if (!express_end (lane->executor->volume, &b->express, &rc)) {
    executor_queue (lane->executor, io);
    return;
  }
  begun_put (lane, b);
  io_finish (io, IO_BY_LANE, rc);
}

void
lane_push (struct lane *lane)
{
  watch_push (&lane->watch);
  for (unsigned i = 0; i < lane->nr_begun; i++) {
    struct begun *b = lane->begun[i];

    express_local (lane->executor->volume, &b->express);
    if (b->express.legs_left == 0) /* nothing went to a remote */
      end_express (lane, b);
  }
  lane->nr_begun = 0;
}

int
lane_poll (struct lane *lane, struct pollfd *own, int timeout_ms)
{
  return watch_poll (&lane->watch, own, timeout_ms);
}

void
lane_take (struct lane *lane)
{
  struct waiter *waiter = watch_take (&lane->watch);

  while (waiter) {
    struct waiter *next = waiter->next;
    struct express *x = express_answered (&lane->watch, waiter);

    if (x)
      end_express (
          lane, (struct begun *)((char *)x - offsetof (struct begun, express)));
    waiter = next;
  }
}
