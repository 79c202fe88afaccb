/* SPDX-License-Identifier: BSD-3-Clause */

/* The policy: what clients get when a remote is lost, and the switch between
 * policies at runtime.
 *
 * The switch happens under the volume's lock.  A fence that it sets is durable
 * before the lock is released, so that no request is answered under a policy
 * that is not in force:
 *
 *   degrade -> stop   A leg that is behind sets the fence at once.  Requests
 *                     that were admitted before, and left regions to resync,
 *                     still run.  decide_relock () answers them EIO, because
 *                     the fence cannot be lifted before their range is free
 *                     and copied.
 *   stop -> degrade   The fence is lifted: clients may write at once.  The
 *                     states do not change, and the first write that a remote
 *                     misses begins a new generation.
 *
 * A remote that is holding misses nothing that was answered.  When its hold
 * ends, the policy then in force decides.
 *
 * The policy itself is not stored: at a start the configuration decides.
 */

#include <errno.h>

#include "api.h"
#include "base/error.h"
#include "base/lock.h"
#include "volume/policy.h"
#include "volume/state.h"
#include "volume/volume.h"

static bool
any_missing_locked (const struct nbdm *v)
{
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    if (v->remotes[i].state != NBDM_IN_SYNC
        && v->remotes[i].state != NBDM_HOLDING)
      return true;
  return v->local.state != NBDM_LOCAL_OK;
}

static int
switch_locked (struct nbdm *v, enum nbdm_policy policy)
{
  bool was_fenced = v->fenced;

  v->policy = policy;
  v->fenced = policy == NBDM_STOP && (v->fenced || any_missing_locked (v));
  pthread_cond_broadcast (&v->changed); /* policy stop makes flushes wait */
  return v->fenced == was_fenced ? 0 : volume_persist_locked (v);
}

int
nbdm_set_policy (struct nbdm *v, uint32_t policy, uint32_t fail_fenced_reads)
{
  if (policy != NBDM_DEGRADE && policy != NBDM_STOP)
    return set_message (-EINVAL, "there is no policy %u", policy);
  LOCK_FOR_SCOPE (&v->lock);
  if (v->stopping)
    return set_message (-ESHUTDOWN, "the volume is stopping");
  if (v->failed)
    return set_message (-EIO, "the volume has failed: %s", v->reason);
  if (v->secondary)
    return set_message (-EPERM, "this node is secondary: the policy is the "
                                "primary's");
  atomic_store (&v->fail_fenced_reads, fail_fenced_reads != 0);
  return switch_locked (v, policy);
}

int
fenced_read_check (struct nbdm *v)
{
  if (!atomic_load (&v->fail_fenced_reads))
    return 0;
  LOCK_FOR_SCOPE (&v->lock);
  return v->fenced ? set_message (-EIO, "policy stop: a remote is out of sync, "
                                        "and fenced reads fail")
                   : 0;
}
