/* SPDX-License-Identifier: BSD-3-Clause */

/* Trims and zeroes that take a remote too long.
 *
 * A client zeroes 4 GiB with one small request and waits for one answer, its
 * kernel for half a minute or so.  A server that does not know zeroes is sent
 * the bytes, minutes of them on a slow link; another one may write them, as
 * slowly.  So a request waits for a remote for one deadline.  What it has not
 * been sent by then is left to resync: dirty, durably, before the answer, and
 * the remote is resyncing.  While it is, other long ones are left at once, or
 * a client that trims all of its disk would wait a deadline for each request.
 *
 * Not under policy stop, which wants every answered write on both; nor while
 * local misses anything or is doubted, as then the remote may be the only one
 * to have it.
 */

#include "api.h"
#include "base/clock.h"
#include "request/admit.h"
#include "request/long_zero.h"
#include "volume/local_state.h"
#include "volume/state.h"
#include "volume/volume.h"

#define LONG_BYTES (1u << 20)

static bool
may_leave_locked (const struct request *req, const struct remote *r)
{
  const struct nbdm *v = r->disk.volume;

  return req->long_zero && r->admitted && v->policy == NBDM_DEGRADE
         && local_believed (v);
}

bool
long_zero_leave_locked (const struct request *req, struct remote *r,
                        uint64_t waited_ns)
{
  if (!may_leave_locked (req, r))
    return false;
  waited_ns += req->long_zero->waited_ns[remote_index (r)];
  if (waited_ns < r->deadline_ms * NS_PER_MS
      && !(r->leaves_zeroes && req->length >= LONG_BYTES))
    return false;
  remote_miss_locked (r, req);
  r->leaves_zeroes = true;
  if (r->state == NBDM_IN_SYNC) {
    remote_set_locked (r, NBDM_RESYNCING,
                       "it took longer than %g s to zero what a client "
                       "trimmed or zeroed: the rest is copied",
                       r->deadline_ms / 1000.0);
    volume_persist_locked (r->disk.volume);
  }
  return true;
}
