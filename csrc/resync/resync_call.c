/* SPDX-License-Identifier: BSD-3-Clause */

/* Drive a call of nbdm_disk_resync: decide when it ends, its pace, its flushes
 * and its rests.  A strategy makes the copies: resync.c has the strategy for a
 * remote, local_resync.c the one for the local disk.
 *
 * A call runs for as long as its caller wants, because each end of a call
 * leaves the link idle for two round trips.  The pace, which is how much is
 * under way and how long the call rests, is read again for each copy
 * (nbdm_disk_resync_pace).  A pause, a stop or a lost connection ends the call.
 * No copy outlives the call, because no thread would then receive its answer
 * and release its range.
 */

#include "api.h"
#include "base/clock.h"
#include "base/latency.h"
#include "base/lock.h"
#include "resync/resync_call.h"
#include "volume/volume.h"

#define LEAST_COMMAND (64u << 10) /* a region may be smaller */

/* Flush what was copied after this time, so that progress is visible, or after
 * this many bytes (flush_bytes), so that an outage repeats few copies.
 */
#define FLUSH_NS 500000000
#define MAX_REST_NS 2000000000 /* so that progress is visible */

bool
resync_flush_due (const struct resync_call *c, uint64_t unflushed_bytes)
{
  return unflushed_bytes >= c->target->volume->flush_bytes
         || (unflushed_bytes > 0 && now_ns () - c->flush_ended_ns >= FLUSH_NS);
}

void
resync_cleaned_locked (struct resync_call *c, uint64_t regions)
{
  uint64_t bytes = regions * c->target->volume->region_size;

  c->cleaned_bytes += bytes;
  c->target->copied_bytes += bytes;
}

/* --- pace ---------------------------------------------------------------- */

/* The pace within its limits, and in whole regions. */
static struct resync_pace
resync_pace (const struct nbdm *v, const struct nbdm_pace *pace)
{
  uint32_t bytes = pace->copy_bytes ? pace->copy_bytes : RESYNC_COPY_BYTES;
  uint32_t region = v->region_size;
  uint32_t depth = pace->depth < 1                  ? 1
                   : pace->depth > RESYNC_MAX_DEPTH ? RESYNC_MAX_DEPTH
                                                    : pace->depth;
  struct resync_pace found
      = { .burst_us = pace->burst_us, .rest_us = pace->rest_us };

  bytes = bytes < RESYNC_COPY_BYTES ? bytes : RESYNC_COPY_BYTES;
  found.command_bytes = bytes > LEAST_COMMAND ? bytes : LEAST_COMMAND;
  found.window = depth < RESYNC_COPY_COMMANDS ? depth : RESYNC_COPY_COMMANDS;
  found.copy_bytes = bytes > region ? bytes - bytes % region : region;
  /* If a region is longer than a copy, fewer copies carry the same bytes. */
  found.depth = (uint32_t)((uint64_t)depth * bytes / found.copy_bytes);
  if (found.depth < 1)
    found.depth = 1;
  if (found.depth > depth)
    found.depth = depth;
  return found;
}

static void
set_pace_locked (struct disk *d, const struct nbdm_pace *pace)
{
  if (d->pace.rest_us > 0 && pace->rest_us == 0)
    pthread_cond_broadcast (&d->volume->events); /* ends the rest */
  d->pace = resync_pace (d->volume, pace);
}

int
nbdm_disk_resync_pace (struct nbdm *v, uint32_t disk,
                       const struct nbdm_pace *pace)
{
  struct disk *d = volume_disk (v, disk);

  if (d == NULL)
    return no_such_disk (disk);
  LOCK_FOR_SCOPE (&v->lock);
  set_pace_locked (d, pace);
  return 0;
}

/* Leave the disks to clients for a while.  The caller has settled, so no thread
 * waits for this one.
 */
static void
rest (const struct resync_call *c, uint64_t rest_ns)
{
  const struct disk *d = c->target;
  struct nbdm *v = d->volume;
  uint64_t until_ns = now_ns () + rest_ns;
  bool resting = true;

  latency_copying (&v->latency, false);
  pthread_mutex_lock (&v->lock);
  while (resting && c->how->usable_locked (c) && !d->paused && !v->waking
         && !v->stopping && d->pace.rest_us > 0)
    resting = wait_until (&v->events, &v->lock, until_ns);
  pthread_mutex_unlock (&v->lock);
  latency_copying (&v->latency, true);
}

static uint64_t
stretched (uint64_t rest_ns, uint64_t burst_ns, uint64_t took_ns)
{
  double longer;

  if (burst_ns == 0 || took_ns <= burst_ns)
    return rest_ns;
  longer = (double)rest_ns * (double)took_ns / (double)burst_ns;
  if (longer > MAX_REST_NS)
    longer = MAX_REST_NS;
  return longer > (double)rest_ns ? (uint64_t)longer : rest_ns;
}

static int
rest_if_due (struct resync_call *c)
{
  uint64_t burst_ns = c->pace.burst_us * NS_PER_US;
  uint64_t rest_ns = c->pace.rest_us * NS_PER_US;
  int rc;

  if (rest_ns == 0 || now_ns () - c->burst_ns < burst_ns)
    return 0;
  rc = c->how->settle (c);
  if (c->how->stretches_rests)
    rest_ns = stretched (rest_ns, burst_ns, now_ns () - c->burst_ns);
  if (rc == 0)
    rest (c, rest_ns);
  c->burst_ns = now_ns ();
  return rc;
}

/* --- the call ------------------------------------------------------------ */

/* Is the call over, even if regions are left?  Otherwise read the pace to
 * continue with.
 */
static bool
call_over (struct resync_call *c)
{
  const struct disk *d = c->target;

  LOCK_FOR_SCOPE (&d->volume->lock);
  c->pace = d->pace;
  return d->paused || d->volume->waking || c->issued_bytes >= c->max_bytes
         || now_ns () >= c->until_ns;
}

static int
copy_until_over (struct resync_call *c, struct nbdm_resync *io)
{
  int rc = 1, other;

  while (rc == 1 && !call_over (c)) {
    rc = c->how->copy (c);
    if (rc < 1)
      break;
    other = c->how->flush (c);
    if (other == 0)
      other = rest_if_due (c);
    if (other < 0)
      rc = other;
  }
  io->next_region = rc == 0 ? 0 : c->cursor;
  rc = c->how->finish (c, rc);
  io->zero_bytes = c->zero_bytes;
  io->copied_bytes = c->cleaned_bytes;
  return rc;
}

static int
begin (struct resync_call *c, const struct nbdm_resync *io)
{
  struct disk *d = c->target;
  uint64_t now = now_ns ();
  int rc;

  c->cursor = io->first_region;
  c->max_bytes = io->max_bytes;
  c->until_ns = io->max_ms ? now + io->max_ms * NS_PER_MS : NEVER;
  c->burst_ns = c->flush_ended_ns = now;
  LOCK_FOR_SCOPE (&d->volume->lock);
  rc = c->how->begin_locked (c);
  if (rc == 1) {
    d->copying = true;
    set_pace_locked (d, &io->pace);
  }
  return rc;
}

int
resync_run (struct resync_call *c, struct nbdm_resync *io)
{
  struct nbdm *v = c->target->volume;
  int rc = begin (c, io);

  if (rc < 1)
    return rc;
  rc = c->how->prepare (c);
  if (rc == 0) {
    latency_copying (&v->latency, true);
    rc = copy_until_over (c, io);
    latency_copying (&v->latency, false);
  }
  pthread_mutex_lock (&v->lock);
  c->target->copying = false;
  pthread_mutex_unlock (&v->lock);
  c->how->release (c);
  return rc;
}

int
nbdm_disk_resync (struct nbdm *v, uint32_t disk, struct nbdm_resync *io)
{
  if (volume_disk (v, disk) == NULL)
    return no_such_disk (disk);
  io->next_region = io->copied_bytes = io->zero_bytes = 0;
  return disk == NBDM_LOCAL ? resync_to_local (v, io)
                            : resync_to_remote (&v->remotes[disk - 1], io);
}
