/* SPDX-License-Identifier: BSD-3-Clause */

/* Requests that begin or end inside a sector of 512 bytes.
 *
 * A client that negotiated no block sizes may send any range of bytes, and a
 * remote may accept only whole sectors.  So a part of a sector is written as
 * the whole sector: the request is admitted, so that no other thread touches
 * the sector; then the sector is read, changed in memory, and written to every
 * leg like any other write.  All remotes get the same bytes, whatever block
 * size they accept.
 */

#include <errno.h>
#include <string.h>

#include "api.h"
#include "logs/inflight.h"
#include "request/engine.h"
#include "request/read.h"
#include "request/sector.h"
#include "volume/volume.h"

static uint64_t
part_of_sector (const struct nbdm *v, uint64_t count, uint64_t offset)
{
  uint64_t block = nbdm_min_block (v);
  uint64_t left = block - offset % block;

  return offset % block > 0 || count < block ? left < count ? left : count : 0;
}

uint64_t
next_part (const struct nbdm *v, uint64_t count, uint64_t offset, uint64_t max)
{
  uint64_t part = part_of_sector (v, count, offset);

  if (part > 0)
    return part;
  return count < max ? count - count % nbdm_min_block (v) : max;
}

int
request_fill (struct nbdm *v, const struct request *req)
{
  const struct sector *s = req->sector;
  int rc = source_pread (v, NULL, s->bytes, req->length, req->offset);

  if (rc < 0)
    return rc;
  if (s->from)
    memcpy (s->bytes + s->at, s->from, s->count);
  else
    memset (s->bytes + s->at, 0, s->count);
  return 0;
}

int
sector_write (struct nbdm *v, const void *buf, uint64_t count, uint64_t offset,
              uint32_t flags)
{
  uint64_t block = nbdm_min_block (v);
  uint8_t bytes[NBDM_SECTOR];
  struct sector sector
      = { .bytes = bytes, .from = buf, .at = offset % block, .count = count };

  return request_run (v, SLOT_WRITE, bytes, block, offset - sector.at,
                      flags & NBDM_FUA, &sector, NULL);
}

int
parts_pread (struct nbdm *v, void *buf, uint64_t count, uint64_t offset)
{
  uint64_t block = nbdm_min_block (v);
  uint8_t bytes[NBDM_SECTOR], *to = buf;
  int rc = 0;

  while (rc == 0 && count > 0) {
    uint64_t n = part_of_sector (v, count, offset);
    uint64_t at = offset % block;

    if (n > 0) {
      rc = client_pread (v, bytes, block, offset - at);
      if (rc == 0)
        memcpy (to, bytes + at, n);
    }
    else {
      n = count - count % block;
      rc = client_pread (v, to, n, offset);
    }
    to += n;
    offset += n;
    count -= n;
  }
  return rc;
}
