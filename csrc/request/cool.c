/* SPDX-License-Identifier: BSD-3-Clause */

/* Extents go cold: idle ones, or the least recently used ones if a request
 * needs their room in the activity log.
 */

#include <errno.h>

#include "api.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/fault.h"
#include "logs/activity.h"
#include "logs/dirty_map.h"
#include "request/cool.h"
#include "volume/flush.h"
#include "volume/identity.h"
#include "volume/local.h"
#include "volume/local_state.h"
#include "volume/state.h"
#include "volume/volume.h"

int
write_activity_relock (struct nbdm *v)
{
  struct activity_batch batch = { 0 };
  int rc;

  v->activity_writing = true;
  rc = activity_stage (&v->activity, &batch);
  if (rc > 0) {
    fault_point ("activity_staged");
    pthread_mutex_unlock (&v->lock);
    rc = activity_write (&v->activity, &batch);
    pthread_mutex_lock (&v->lock);
  }
  if (rc < 0) {
    volume_fail_locked (v, last_error ());
    activity_discard (&batch);
  }
  else
    activity_written (&v->activity, &batch);
  v->activity_writing = false;
  pthread_cond_broadcast (&v->changed);
  return rc;
}

int
cool_relock (struct nbdm *v, uint32_t max, uint64_t before_ns)
{
  int rc = 0;

  if (activity_pick (&v->activity, max, before_ns) == 0)
    return -EAGAIN;
  fault_point ("cool_picked");
  pthread_mutex_unlock (&v->lock);
  rc = volume_flush (v, true);
  fault_point ("cool_flushed");
  pthread_mutex_lock (&v->lock);
  if (rc < 0) /* failed, or only remotes serve and none could flush */
    return v->failed ? rc : -EAGAIN;
  rc = dirty_map_persist (&v->local.disk.dm);
  for (uint32_t i = 0; i < v->nr_remotes && rc == 0; i++)
    rc = dirty_map_persist (&v->remotes[i].disk.dm);
  if (rc == 0) {
    fault_point ("cool_persisted");
    rc = identity_cool_locked (v);
    if (rc < 0) /* the volume has failed */
      return rc;
    return (int)activity_drop (&v->activity);
  }
  volume_fail_locked (v, last_error ());
  return rc;
}

int
nbdm_cool (struct nbdm *v, uint32_t idle_ms)
{
  uint64_t idle_ns = idle_ms * NS_PER_MS;
  uint64_t now = now_ns ();
  int rc = 0;

  pthread_mutex_lock (&v->lock);
  if (v->local.state != NBDM_LOCAL_FAILED && !v->failed && !v->stopping) {
    local_use (v); /* before another disk could replace it */
    pthread_mutex_unlock (&v->lock);
    /* Local may have lost bytes that no client has read yet. */
    if (local_check_size (v) < 0)
      local_give_up (v);
    local_leave ();
    pthread_mutex_lock (&v->lock);
  }
  if (v->failed) {
    rc = command_gate_locked (v);
    if (rc == 0)
      rc = set_message (-EIO, "the volume has failed: %s", v->reason);
  }
  else if (!v->cooling && !v->stopping) {
    v->cooling = true;
    rc = cool_relock (v, v->activity.nr_entries,
                      now > idle_ns ? now - idle_ns : 0);
    while (rc > 0 && v->activity_writing)
      pthread_cond_wait (&v->changed, &v->lock);
    if (rc > 0 && !v->failed) {
      fault_point ("cool_dropped");
      activity_forget (&v->activity);
      rc = write_activity_relock (v);
      fault_point ("cool_forgotten");
    }
    v->cooling = false;
    pthread_cond_broadcast (&v->changed);
  }
  pthread_mutex_unlock (&v->lock);
  return rc < 0 && rc != -EAGAIN ? rc : 0;
}
