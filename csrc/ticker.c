/* SPDX-License-Identifier: BSD-3-Clause */

/* The ticker: a thread of the engine's own, which never waits for a remote.
 * It is what bounds every wait (rule 13): commands past their deadline, holds
 * that are over, and connections that die while nobody waits on them.  Whatever
 * Python does or does not do meanwhile, no request waits longer.
 */

#include <errno.h>
#include <string.h>
#include <time.h>

#include "internal.h"
#include "volume.h"

#define TICK_NS 50000000 /* 50 ms: how late a deadline may be noticed */

static void
tick_remote (struct remote *r)
{
  struct nbdm *v = r->volume;
  struct conn *conn;

  pthread_mutex_lock (&v->lock);
  conn = r->conn ? conn_get (r->conn) : NULL;
  pthread_mutex_unlock (&v->lock);

  if (conn)
    conn_tick (conn, r->deadline_ms);

  pthread_mutex_lock (&v->lock);
  if (conn && conn_dead (conn))
    remote_lost_locked (r, conn);
  if (r->state == NBDM_HOLDING && now_ns () >= r->hold_until_ns)
    remote_degrade_locked (r);
  pthread_mutex_unlock (&v->lock);
  conn_put (conn);
}

static void
nap (struct nbdm *v)
{
  struct timespec until;

  clock_gettime (CLOCK_MONOTONIC, &until);
  until.tv_nsec += TICK_NS;
  if (until.tv_nsec >= 1000000000) {
    until.tv_nsec -= 1000000000;
    until.tv_sec++;
  }
  pthread_mutex_lock (&v->lock);
  if (v->nr_waiting > 0)
    pthread_cond_broadcast (&v->changed); /* they watch the clock too */
  if (!v->ticker_stop)
    pthread_cond_timedwait (&v->ticking, &v->lock, &until);
  pthread_mutex_unlock (&v->lock);
}

static void *
ticker (void *opaque)
{
  struct nbdm *v = opaque;
  bool stop = false;

  while (!stop) {
    for (uint32_t i = 0; i < v->nr_remotes; i++)
      tick_remote (&v->remotes[i]);
    nap (v);
    pthread_mutex_lock (&v->lock);
    stop = v->ticker_stop;
    pthread_mutex_unlock (&v->lock);
  }
  return NULL;
}

int
ticker_start (struct nbdm *v)
{
  int err = pthread_create (&v->ticker, NULL, ticker, v);

  if (err)
    return set_error (-err, "cannot start the ticker thread");
  v->ticker_running = true;
  return 0;
}

void
ticker_join (struct nbdm *v)
{
  if (!v->ticker_running)
    return;
  pthread_mutex_lock (&v->lock);
  v->ticker_stop = true;
  pthread_cond_broadcast (&v->ticking);
  pthread_mutex_unlock (&v->lock);
  pthread_join (v->ticker, NULL);
  v->ticker_running = false;
}
