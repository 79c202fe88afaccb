/* SPDX-License-Identifier: BSD-3-Clause */

/* Requests of any bytes, in whole sectors.  See sector.c. */

#ifndef NBDM_SECTOR_H
#define NBDM_SECTOR_H

#include <stdint.h>

struct nbdm;
struct request;

/* How many of a request's bytes are carried out next: the part of a sector in
 * which it begins or ends, or whole sectors, at most `max` bytes of them.
 */
uint64_t next_part (const struct nbdm *v, uint64_t count, uint64_t offset,
                    uint64_t max);
/* An admitted request's sector: read it, and change its part.  -EIO. */
int request_fill (struct nbdm *v, const struct request *req);
/* Write, or with NULL zero, a part of one sector. */
int sector_write (struct nbdm *v, const void *buf, uint64_t count,
                  uint64_t offset, uint32_t flags);
/* Read any range, in whole sectors wherever it is read from. */
int parts_pread (struct nbdm *v, void *buf, uint64_t count, uint64_t offset);

#endif /* NBDM_SECTOR_H */
