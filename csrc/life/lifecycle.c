/* SPDX-License-Identifier: BSD-3-Clause */

/* Start and stop of an open volume: threads, drain, flush, stamp.
 *
 * A clean stop leaves an empty ring, an empty activity set, and logs stamped
 * clean.  The superblock is stamped last and vouches for all of them, so a
 * start after an interrupted stop recovers as after a crash.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#include "api.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/fault.h"
#include "base/lock.h"
#include "life/local_map.h"
#include "life/ticker.h"
#include "logs/activity.h"
#include "logs/dirty_map.h"
#include "logs/inflight.h"
#include "volume/flush.h"
#include "volume/flusher.h"
#include "volume/identity.h"
#include "volume/local_deadline.h"
#include "volume/local_io.h"
#include "volume/state.h"
#include "volume/volume.h"
#include "volume/volume_free.h"
#include "wire/conn.h"
#include "wire/transport.h"

/* When the kernel is short of memory it may write back a file system on this
 * disk, and must not wait for our threads to get memory: so they do no reclaim
 * into block devices, and none of our pages is swapped out.  Best effort, as it
 * needs privileges; later threads inherit it.  If the limit cannot be lifted,
 * later mappings are not locked, as they could then fail.
 */
static void
avoid_reclaim_deadlock (void)
{
  const struct rlimit unlimited = { RLIM_INFINITY, RLIM_INFINITY };

  (void)prctl (PR_SET_IO_FLUSHER, 1, 0, 0, 0);
  if (setrlimit (RLIMIT_MEMLOCK, &unlimited) == 0)
    (void)mlockall (MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT);
}

/* A woken thread waits for a free core instead of preempting another thread: a
 * server that will answer more, or a client that will send more.  So one
 * wake-up handles several answers or requests.  A woken thread still takes an
 * idle core at once.  Later threads inherit the policy.
 */
static void
prefer_batches (void)
{
  const struct sched_param none = { 0 };

  (void)sched_setscheduler (0, SCHED_BATCH, &none);
}

int
nbdm_start (struct nbdm *v)
{
  uint64_t until = now_ns () + v->hold_ms * NS_PER_MS;
  int rc;

  /* The hold begins when the keepers try to connect, not at the open. */
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    v->remotes[i].hold_until_ns = until;
  avoid_reclaim_deadlock ();
  prefer_batches ();
  rc = ticker_start (v);
  if (rc == 0)
    rc = local_guard_start (v);
  return rc == 0 ? flushers_start (v) : rc;
}

/* A stop does not wait for reads, except for one that has started a takeover:
 * the takeover changes the maps, and must end before they are closed.
 */
static bool
anybody_waits_locked (const struct nbdm *v)
{
  return v->nr_requests > 0 || v->local.taking_over;
}

/* Refuse new requests and wait for those under way.  False: an earlier call has
 * done so.
 */
static bool
drain (struct nbdm *v)
{
  bool first, held;

  pthread_mutex_lock (&v->lock);
  first = !v->stopping;
  v->stopping = true;
  pthread_cond_broadcast (&v->changed);
  /* No keeper connects any more: held requests would wait for nothing, and so
   * would a flush for extents that go cold.
   */
  held = anybody_waits_locked (v) || v->cooling;
  for (uint32_t i = 0; i < v->nr_remotes && held; i++)
    if (v->remotes[i].state == NBDM_HOLDING)
      remote_degrade_locked (&v->remotes[i]);
  while (anybody_waits_locked (v) || v->cooling || v->activity_writing)
    pthread_cond_wait (&v->changed, &v->lock);
  /* The flush of such a disk may fail when the maps are closed. */
  if (v->local.nr_opening > 0)
    local_miss_all_locked (v);
  v->drained = true;
  pthread_mutex_unlock (&v->lock);
  fault_point ("stop_drained");
  return first;
}

static void
disconnect_all (struct nbdm *v)
{
  LOCK_FOR_SCOPE (&v->lock);
  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    struct remote *r = &v->remotes[i];
    struct conn *conn = r->conn;

    if (conn == NULL)
      continue;
    r->conn = NULL;
    r->admitted = false;
    conn_farewell (conn);
    conn_put (conn);
  }
}

/* Close every log, then stamp the superblock. */
static int
persist_clean (struct nbdm *v)
{
  int rc = 0;

  LOCK_FOR_SCOPE (&v->lock);
  FOR_EACH_DISK (d, v)
    if (rc == 0)
      rc = dirty_map_finish (&d->dm);
  fault_point ("stop_maps_finished");
  if (rc == 0)
    rc = inflight_finish (&v->inflight);
  fault_point ("stop_slots_finished");
  if (rc == 0)
    rc = activity_finish (&v->activity);
  fault_point ("stop_set_finished");
  if (rc < 0)
    volume_fail_locked (v, last_error ());
  else {
    v->stopped = true;
    rc = volume_persist_locked (v);
    v->closed = rc == 0;
  }
  return rc < 0 ? -EIO : 0;
}

int
nbdm_stop (struct nbdm *v)
{
  int rc;

  if (!drain (v))
    return v->stopped
               ? 0
               : set_message (-EIO, "the stop was not clean: %s", v->reason);
  rc = volume_flush (v, false);
  /* Local has failed: the remotes have made durable all that they answered. */
  if (v->local.state == NBDM_LOCAL_FAILED)
    rc = 0;
  fault_point ("stop_flushed");
  local_guard_join (v);
  flushers_join (v);
  ticker_join (v);
  disconnect_all (v);
  fault_point ("stop_disconnected");
  if (rc == 0 && !v->failed)
    rc = identity_stop (v);
  if (rc == 0 && !v->failed)
    rc = persist_clean (v);
  if (rc < 0 || v->failed)
    return set_message (-EIO, "the stop was not clean: %s", v->reason);
  return 0;
}

void
nbdm_close (struct nbdm *v)
{
  local_guard_join (v);
  flushers_join (v);
  ticker_join (v);
  disconnect_all (v);
  FOR_EACH_DISK (d, v)
    dirty_map_close (&d->dm);
  inflight_close (&v->inflight);
  activity_close (&v->activity);
  if (v->sb_fd >= 0)
    close (v->sb_fd);
  if (v->lock_fd >= 0)
    close (v->lock_fd);
  if (v->dirfd >= 0)
    close (v->dirfd);
  if (local_io_end (v))
    volume_free (v);
}
