/* SPDX-License-Identifier: BSD-3-Clause */

/* Flush the remotes when clients do not: one thread per remote.
 *
 * All that a remote answered but did not flush is copied again when the remote
 * is lost (rule 4).  If clients never flush, that grows to all they ever wrote.
 * So a flusher thread flushes its remote when the unflushed set is large or
 * old, and when half of the remote's bound is unflushed (backlog.c).  It joins
 * the group commit like any other thread, holds no lock while it waits, and the
 * ticker's deadline bounds its wait.  Each remote has its own flusher, because
 * a remote that hangs must not let the sets of the others grow, and because the
 * ticker must never wait.  With nothing unflushed the flusher sleeps and sends
 * nothing.
 */

#include "api.h"
#include "base/clock.h"
#include "base/error.h"
#include "logs/bitmap.h"
#include "logs/layout.h"
#include "volume/backlog.h"
#include "volume/flush.h"
#include "volume/flusher.h"
#include "volume/state.h"
#include "volume/volume.h"

/* This takes about half a second to copy again on a link of 1 Gbit/s. */
#define FLUSH_BYTES (64u << 20)
/* File systems commit, and the kernel looks for old dirty pages, about this
 * often.
 */
#define FLUSH_MS 5000
/* A long flush slows the remote's writes.  After a flush rest for this many
 * times its duration, so that the remote works mostly for clients.
 */
#define REST_TIMES 3
#define LOCAL_FLUSH_MS 6000 /* for copies back to local: see backlog.c */
/* When to look again after another thread's flush. */
#define BUSY_NS (50 * NS_PER_MS)

bool
unflushed_any_locked (const struct remote *r)
{
  return r->disk.dm.map[MAP_UNFLUSHED0].nr_set > 0
         || r->disk.dm.map[MAP_UNFLUSHED1].nr_set > 0;
}

/* Is anything unflushed that the flush under way, if any, does not cover?  At a
 * start either map may have what an earlier session kept.
 */
static bool
flush_needed_locked (const struct remote *r)
{
  return r->disk.flush.running
             ? r->disk.dm.map[MAP_UNFLUSHED0 + r->filling].nr_set > 0
             : unflushed_any_locked (r);
}

/* Is so much unflushed that its age does not matter? */
static bool
enough_unflushed_locked (const struct remote *r)
{
  const struct nbdm *v = r->disk.volume;

  return r->disk.dm.map[MAP_UNFLUSHED0 + r->filling].nr_set * v->region_size
         >= v->flush_bytes;
}

/* When to flush next; NEVER: nothing is unflushed.  Not before `rest_until`,
 * unless writers would have to wait.
 */
static uint64_t
next_flush_locked (const struct remote *r, uint64_t rest_until)
{
  const struct nbdm *v = r->disk.volume;
  uint64_t due = 0;

  if (!r->admitted || v->failed || !flush_needed_locked (r))
    return NEVER;
  if (backlog_pressed_locked (r))
    return 0;
  if (!enough_unflushed_locked (r))
    due = r->unflushed_ns + v->flush_ms * NS_PER_MS;
  return due > rest_until ? due : rest_until;
}

static void
nap_relock (struct remote *r, uint64_t until_ns)
{
  r->flusher_naps = true;
  wait_until (&r->flush_due, &r->disk.volume->lock, until_ns);
  r->flusher_naps = false;
}

static void *
flusher (void *opaque)
{
  struct remote *r = opaque;
  struct nbdm *v = r->disk.volume;
  uint64_t rest_until = 0;

  pthread_mutex_lock (&v->lock);
  while (!v->flushers_stop) {
    uint64_t now = now_ns (), due = next_flush_locked (r, rest_until);

    if (due > now) {
      nap_relock (r, due);
      continue;
    }
    pthread_mutex_unlock (&v->lock);
    if (remote_flush_alone (r)) {
      uint64_t end = now_ns ();
      rest_until = end + REST_TIMES * (end - now);
    }
    else
      rest_until = now + BUSY_NS;
    pthread_mutex_lock (&v->lock);
  }
  pthread_mutex_unlock (&v->lock);
  return NULL;
}

static void
wake_locked (struct remote *r)
{
  if (r->flusher_naps)
    pthread_cond_signal (&r->flush_due);
  r->flusher_naps = false;
}

void
flusher_admitted_locked (struct remote *r)
{
  wake_locked (r);
}

void
flusher_wake_locked (struct remote *r)
{
  if (r->flusher_naps && backlog_pressed_locked (r))
    wake_locked (r);
}

void
unflushed_add_locked (struct remote *r, uint64_t offset, uint64_t length)
{
  struct bitmap *map = &r->disk.dm.map[MAP_UNFLUSHED0 + r->filling];
  bool first = map->nr_set == 0;
  uint64_t region, count;

  if (first)
    r->unflushed_ns = now_ns ();
  region_span (r->disk.volume, offset, length, &region, &count);
  bitmap_set (map, region, count);
  /* The flusher sleeps until the oldest bit is old enough.  A later bit matters
   * only if the set becomes large.
   */
  if (r->flusher_naps
      && (first || enough_unflushed_locked (r) || backlog_pressed_locked (r)))
    wake_locked (r);
}

void
flushers_init (struct nbdm *v, const struct nbdm_params *params)
{
  v->flush_bytes = params->flush_bytes ? params->flush_bytes : FLUSH_BYTES;
  v->flush_ms = params->flush_ms ? params->flush_ms : FLUSH_MS;
  flush_bound_init (&v->local.flush_bound, LOCAL_FLUSH_MS);
}

static int
flusher_start (struct remote *r)
{
  int err;

  cond_init (&r->flush_due);
  err = pthread_create (&r->flusher, NULL, flusher, r);
  if (err) {
    pthread_cond_destroy (&r->flush_due);
    return set_error (-err, "cannot start a flusher thread");
  }
  r->flusher_running = true;
  return 0;
}

int
flushers_start (struct nbdm *v)
{
  int rc = 0;

  for (uint32_t i = 0; i < v->nr_remotes && rc == 0; i++)
    rc = flusher_start (&v->remotes[i]);
  return rc;
}

void
flushers_join (struct nbdm *v)
{
  pthread_mutex_lock (&v->lock);
  v->flushers_stop = true;
  for (uint32_t i = 0; i < NBDM_MAX_REMOTES; i++)
    if (v->remotes[i].flusher_running)
      pthread_cond_signal (&v->remotes[i].flush_due);
  pthread_mutex_unlock (&v->lock);
  for (uint32_t i = 0; i < NBDM_MAX_REMOTES; i++) {
    struct remote *r = &v->remotes[i];

    if (!r->flusher_running)
      continue;
    pthread_join (r->flusher, NULL);
    pthread_cond_destroy (&r->flush_due);
    r->flusher_running = false;
  }
}
