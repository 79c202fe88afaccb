/* SPDX-License-Identifier: BSD-3-Clause */

/* Operations on the local disk other than reads and writes. local.c carries
 * them out on the calling thread, or on a carrier if the disk has a deadline.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <unistd.h>

#include "base/error.h"
#include "volume/local.h"
#include "volume/local_io.h"
#include "volume/local_state.h"
#include "volume/volume.h"

static int64_t
run (struct nbdm *v, const struct local_job *job)
{
  return v->local.io ? local_io_run (v, job) : local_carry_out (v, job);
}

int
local_pread_or_pass (struct nbdm *v, void *buf, uint64_t count, uint64_t offset)
{
  const struct local_job job = { .act = LOCAL_READ,
                                 .buf = buf,
                                 .count = count,
                                 .offset = offset,
                                 .wait_ms = 2 * v->local.deadline_ms };

  return (int)run (v, &job);
}

bool
local_pread_believed (struct nbdm *v, void *buf, uint64_t count,
                      uint64_t offset)
{
  bool good;

  local_use (v);
  good = local_believed (v) && local_pread (v, buf, count, offset) == 0
         && local_believed (v);
  local_leave ();
  return good;
}

static int
check_size (struct nbdm *v, uint32_t wait_ms)
{
  const struct local_job job = { .act = LOCAL_SIZE, .wait_ms = wait_ms };

  return (int)run (v, &job);
}

int
local_check_size (struct nbdm *v)
{
  return check_size (v, 0);
}

int
local_zero (struct nbdm *v, uint64_t count, uint64_t offset, bool may_trim)
{
  const struct local_job job = {
    .act = LOCAL_ZERO, .count = count, .offset = offset, .may_trim = may_trim
  };

  return (int)run (v, &job);
}

bool
local_fast_zero (const struct nbdm *v, bool may_trim)
{
  return v->local.file.can_zero_range || (may_trim && v->local.file.can_punch);
}

int
local_flush (struct nbdm *v)
{
  const struct local_job job = { .act = LOCAL_FLUSH };

  return (int)run (v, &job);
}

int
local_sample (struct nbdm *v, void *buf, uint64_t count, uint64_t offset)
{
  const struct local_job job = { .act = LOCAL_SAMPLE,
                                 .buf = buf,
                                 .count = count,
                                 .offset = offset,
                                 .wait_ms = v->local.deadline_ms };

  return (int)run (v, &job);
}

void
local_advise (struct nbdm *v, uint64_t count, uint64_t offset)
{
  const struct local_job job = { .act = LOCAL_ADVISE,
                                 .count = count,
                                 .offset = offset,
                                 .wait_ms = v->local.deadline_ms };

  (void)run (v, &job);
}

static off_t
seek (struct nbdm *v, uint64_t offset, int whence)
{
  const struct local_job job = { .act = LOCAL_SEEK,
                                 .offset = offset,
                                 .whence = whence,
                                 .wait_ms = v->local.deadline_ms };

  return (off_t)run (v, &job);
}

static uint64_t
hole_end (struct nbdm *v, uint64_t offset, uint64_t end)
{
  off_t data;

  if (!local_believed (v))
    return offset;
  data = seek (v, offset, SEEK_DATA);
  if (data < 0 && (errno != ENXIO || v->local.file.is_block))
    return offset;
  /* A file that was cut reports a hole past its end. */
  if (check_size (v, v->local.deadline_ms) < 0 || !local_believed (v))
    return offset;
  return data >= 0 && (uint64_t)data < end ? (uint64_t)data : end;
}

uint64_t
local_hole_end (struct nbdm *v, uint64_t offset, uint64_t end)
{
  uint64_t found;

  local_use (v); /* the same disk throughout */
  found = hole_end (v, offset, end);
  local_leave ();
  return found;
}

uint64_t
local_data_end (struct nbdm *v, uint64_t offset, uint64_t end)
{
  off_t hole;

  if (!local_believed (v))
    return end;
  hole = seek (v, offset, SEEK_HOLE);
  if (hole < 0 || (uint64_t)hole <= offset || (uint64_t)hole > end)
    return end;
  return (uint64_t)hole;
}

int
local_call (struct nbdm *v, int (*call) (struct nbdm *v, void *opaque),
            void (*drop) (void *opaque), void *opaque)
{
  const struct local_job job = { .act = LOCAL_CALL,
                                 .wait_ms = 2 * v->local.deadline_ms,
                                 .call = call,
                                 .drop = drop,
                                 .opaque = opaque };
  int rc = (int)run (v, &job);

  if (rc != -ETIMEDOUT)
    return rc;
  return set_message (LOCAL_GIVEN_UP,
                      "the local disk did not answer within %g s",
                      job.wait_ms / 1000.0);
}
