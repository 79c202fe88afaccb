/* SPDX-License-Identifier: BSD-3-Clause */

/* Replace a local disk that keeps a request longer than `local_deadline`.
 *
 * With that key, threads that may hang make the disk's system calls
 * (local_io.c).  The guard thread checks the age of the oldest call.  When it
 * is over the deadline, the guard lets a remote in sync replace local, and all
 * threads that wait for the disk continue.  The ticker cannot do this: it must
 * never wait for a remote, and it bounds the time of a takeover.
 */

#include <stdio.h>
#include <string.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/lock.h"
#include "volume/local.h"
#include "volume/local_deadline.h"
#include "volume/local_io.h"
#include "volume/local_state.h"
#include "volume/state.h"
#include "volume/volume.h"

#define LOOK_NS (50 * NS_PER_MS) /* check at this interval */

static void
nap_relock (struct nbdm *v)
{
  wait_until (&v->ticking, &v->lock, now_ns () + LOOK_NS);
}

static void
say_silent (char *reason, size_t size, uint64_t silent)
{
  snprintf (reason, size, "it has not answered for %.1f s",
            (double)silent / 1e9);
}

/* Set the reason only if the takeover succeeds. */
static void
replace_relock (struct nbdm *v, uint64_t silent)
{
  char before[sizeof v->local.disk.reason];

  memcpy (before, v->local.disk.reason, sizeof before);
  say_silent (v->local.disk.reason, sizeof v->local.disk.reason, silent);
  if (local_takeover_relock (v) < 0)
    memcpy (v->local.disk.reason, before, sizeof before);
}

/* Detach a disk that was attached and is not admitted yet.  Its content is
 * being compared with a remote, and clients' writes wait for that range.
 */
static void
put_away_locked (struct nbdm *v, uint64_t silent)
{
  v->local.attached = false;
  say_silent (v->local.disk.reason, sizeof v->local.disk.reason, silent);
  disk_bump_locked (&v->local.disk);
  volume_persist_locked (v);
  local_io_give_up (v);
}

static void
look_relock (struct nbdm *v)
{
  uint64_t silent = local_watch (v);

  if (silent < v->local.deadline_ms * NS_PER_MS)
    return;
  if (local_may_be_replaced_locked (v))
    replace_relock (v, silent);
  else if (v->local.attached && !v->drained)
    put_away_locked (v, silent);
}

static void *
guard (void *opaque)
{
  struct nbdm *v = opaque;

  LOCK_FOR_SCOPE (&v->lock);
  while (!v->local.guard_stop) {
    look_relock (v);
    nap_relock (v);
  }
  return NULL;
}

int
local_guard_start (struct nbdm *v)
{
  int rc, err;

  if (v->local.deadline_ms == 0)
    return 0;
  rc = local_io_start (v);
  if (rc < 0)
    return rc;
  err = pthread_create (&v->local.guard, NULL, guard, v);
  if (err)
    return set_error (-err, "cannot start the local disk's guard");
  v->local.guard_running = true;
  return 0;
}

void
local_guard_join (struct nbdm *v)
{
  if (!v->local.guard_running)
    return;
  pthread_mutex_lock (&v->lock);
  v->local.guard_stop = true;
  pthread_cond_broadcast (&v->ticking);
  pthread_mutex_unlock (&v->lock);
  pthread_join (v->local.guard, NULL);
  v->local.guard_running = false;
}
