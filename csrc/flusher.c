/* SPDX-License-Identifier: BSD-3-Clause */

/* Flush what clients do not: a thread a remote.
 *
 * What a remote answered and did not flush is copied again when it is lost
 * (rule 4).  Clients that never flush would let that grow to all they ever
 * wrote, so each remote is flushed from here when its unflushed set is large
 * or old.  It joins the group commit like anybody else, holds no lock while
 * it waits, and is bounded by the ticker's deadline; a thread each, because a
 * remote that hangs must not keep the others' sets growing, and because the
 * ticker itself may never wait.  Nothing unflushed: it sleeps, sends nothing.
 */

#include <errno.h>
#include <time.h>

#include "internal.h"
#include "volume.h"

/* Copied again in about half a second on a link of 1 Gbit/s. */
#define FLUSH_BYTES (64u << 20)
/* How often file systems commit, and the kernel looks for old dirty pages. */
#define FLUSH_MS 5000
/* A flush that took long slows the remote's writes: rest for so many times as
 * long, and it has most of its time for clients.
 */
#define REST_TIMES 3
#define BUSY_NS 50000000 /* 50 ms: look again after somebody else's flush */

#define NEVER UINT64_MAX

static bool
many_locked (const struct remote *r)
{
  const struct nbdm *v = r->volume;

  return r->dm.map[MAP_UNFLUSHED0 + r->filling].nr_set * v->region_size
         >= v->flush_bytes;
}

static uint64_t
due_locked (const struct remote *r)
{
  const struct nbdm *v = r->volume;

  if (!r->admitted || v->failed
      || r->dm.map[MAP_UNFLUSHED0 + r->filling].nr_set == 0)
    return NEVER;
  if (many_locked (r))
    return 0;
  return r->unflushed_ns + v->flush_ms * UINT64_C (1000000);
}

static void
nap_locked (struct remote *r, uint64_t until_ns)
{
  struct timespec until = { .tv_sec = (time_t)(until_ns / 1000000000),
                            .tv_nsec = (long)(until_ns % 1000000000) };

  r->flusher_naps = true;
  if (until_ns == NEVER)
    pthread_cond_wait (&r->flush_due, &r->volume->lock);
  else
    pthread_cond_timedwait (&r->flush_due, &r->volume->lock, &until);
  r->flusher_naps = false;
}

static void *
flusher (void *opaque)
{
  struct remote *r = opaque;
  struct nbdm *v = r->volume;
  uint64_t rest_until = 0;

  pthread_mutex_lock (&v->lock);
  while (!v->flushers_stop) {
    uint64_t now = now_ns (), due = due_locked (r);

    if (due < rest_until)
      due = rest_until;
    if (due > now) {
      nap_locked (r, due);
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

void
unflushed_add_locked (struct remote *r, uint64_t offset, uint64_t length)
{
  struct bitmap *map = &r->dm.map[MAP_UNFLUSHED0 + r->filling];
  bool first = map->nr_set == 0;
  uint64_t region, count;

  if (first)
    r->unflushed_ns = now_ns ();
  region_span (r->volume, offset, length, &region, &count);
  bitmap_set (map, region, count);
  /* It naps until the first grows old: later ones matter by their number. */
  if (r->flusher_naps && (first || many_locked (r))) {
    r->flusher_naps = false;
    pthread_cond_signal (&r->flush_due);
  }
}

void
flushers_init (struct nbdm *v, const struct nbdm_params *params)
{
  v->flush_bytes = params->flush_bytes ? params->flush_bytes : FLUSH_BYTES;
  v->flush_ms = params->flush_ms ? params->flush_ms : FLUSH_MS;
}

static int
flusher_start (struct remote *r)
{
  pthread_condattr_t attr;
  int err;

  pthread_condattr_init (&attr);
  pthread_condattr_setclock (&attr, CLOCK_MONOTONIC);
  pthread_cond_init (&r->flush_due, &attr);
  pthread_condattr_destroy (&attr);
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
