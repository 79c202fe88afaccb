/* SPDX-License-Identifier: BSD-3-Clause */

/* The ticker: the engine's own thread, which never waits for a remote.  It
 * bounds every wait (rule 13): it ends commands past their deadline, holds that
 * are over, and connections that die while no thread waits on them.  So every
 * wait has a limit, whatever Python does.
 */

#include <string.h>

#include "api.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/lock.h"
#include "life/ticker.h"
#include "volume/local.h"
#include "volume/state.h"
#include "volume/volume.h"
#include "wire/conn.h"
#include "wire/transport.h"

#define TICK_NS (50 * NS_PER_MS) /* how late it may notice a deadline */

/* `hurry_ns`: when the volume began to stop, or 0. */
static void
tick_remote (struct remote *r, uint64_t hurry_ns)
{
  struct nbdm *v = r->disk.volume;
  struct conn *conn;

  pthread_mutex_lock (&v->lock);
  conn = r->conn ? conn_get (r->conn) : NULL;
  pthread_mutex_unlock (&v->lock);

  if (conn)
    conn_tick (conn, r->deadline_ms, hurry_ns);

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
  uint64_t until_ns = now_ns () + TICK_NS;

  LOCK_FOR_SCOPE (&v->lock);
  if (v->nr_waiting > 0)
    pthread_cond_broadcast (&v->changed); /* waiters also check the time */
  if (!v->ticker_stop)
    wait_until (&v->ticking, &v->lock, until_ns);
}

static void *
ticker (void *opaque)
{
  struct nbdm *v = opaque;
  uint64_t hurry_ns = 0;
  bool stop = false;

  while (!stop) {
    for (uint32_t i = 0; i < v->nr_remotes; i++)
      tick_remote (&v->remotes[i], hurry_ns);
    local_watch (v);
    nap (v);
    pthread_mutex_lock (&v->lock);
    stop = v->ticker_stop;
    /* A stop does not wait for a slow link: first the keepers must end, then
     * the requests under way.
     */
    if (hurry_ns == 0 && (v->waking || v->stopping))
      hurry_ns = now_ns ();
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
