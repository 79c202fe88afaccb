/* SPDX-License-Identifier: BSD-3-Clause */

/* Trims and zeroes that take a remote too long.
 *
 * A client zeroes 4 GiB with one small request, and its kernel waits about half
 * a minute for the answer.  A server without WRITE_ZEROES gets the bytes, which
 * takes minutes on a slow link; another server may write them as slowly.  So a
 * request waits for a remote for one deadline.  The rest is left to resync:
 * dirty, durably, before the answer, and the remote is resyncing.  While it
 * resyncs, other long requests are left to resync at once: otherwise a client
 * that trims its whole disk would wait a deadline for each request.
 *
 * The rest is not left to resync under policy stop, which needs every answered
 * write on both disks, or while local misses anything or is doubted, as the
 * remote may then have the only copy.
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
  if (r->state == NBDM_IN_SYNC || remote_unaware_locked (r)) {
    remote_lacks_locked (r,
                         "it took longer than %g s to zero what a client "
                         "trimmed or zeroed: the rest is copied",
                         r->deadline_ms / 1000.0);
    volume_persist_locked (r->disk.volume);
  }
  return true;
}
