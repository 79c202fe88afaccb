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
#include "volume/flush.h"
#include "volume/local_state.h"
#include "volume/volume.h"
#include "wire/conn.h"

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

/* Do all remotes that get the sector hold the same bytes there, for certain?
 * One that is on hold, or has no room for the command yet, gets it later.
 */
static bool
same_everywhere (const struct nbdm *v, const struct request *req)
{
  const struct sector *s = req->sector;
  uint64_t end = req->offset + req->length;
  uint8_t bytes[NBDM_SECTOR];
  bool same = true;

  for (uint32_t i = 0; i < v->nr_remotes && same; i++) {
    const struct leg *leg = &req->legs[i];

    if (leg->active && (leg->nr > 0 || leg->cursor < end))
      same = leg->conn
             && conn_pread (leg->conn, bytes, req->length, req->offset) == 0
             && memcmp (s->bytes, bytes, req->length) == 0;
  }
  return same;
}

/* Local may have lost the bytes beside those that the client writes, and only a
 * flush shows that; as part of this write they would replace the ones that the
 * remotes still have.  The range is held, so a remote that gets the sector has
 * the same bytes, unless either disk has lost some.
 */
static int
read_sector (struct nbdm *v, const struct request *req)
{
  const struct sector *s = req->sector;
  unsigned failures = v->local.failures;
  bool replaced;
  int rc = source_pread (v, NULL, s->bytes, req->length, req->offset);

  if (rc < 0 || same_everywhere (v, req))
    return rc;
  rc = flush_local_group (v);
  pthread_mutex_lock (&v->lock);
  if (rc < 0)
    rc = local_flush_failed_relock (v);
  replaced = v->local.failures != failures; /* then no flush has proved it */
  pthread_mutex_unlock (&v->lock);
  if (rc == 0 && replaced)
    rc = source_pread (v, NULL, s->bytes, req->length, req->offset);
  return rc;
}

int
request_fill (struct nbdm *v, const struct request *req)
{
  const struct sector *s = req->sector;
  int rc = read_sector (v, req);

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
