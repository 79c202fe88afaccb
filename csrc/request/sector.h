/* SPDX-License-Identifier: BSD-3-Clause */

/* Requests for any byte range, done in whole sectors.  See sector.c. */

#ifndef NBDM_SECTOR_H
#define NBDM_SECTOR_H

#include <stdint.h>

struct nbdm;
struct request;

/* The length of the request's next part: a part of the sector in which it
 * begins or ends, or whole sectors, at most `max` bytes.
 */
uint64_t next_part (const struct nbdm *v, uint64_t count, uint64_t offset,
                    uint64_t max);
/* Read the sector of an admitted request, and change the request's part of it.
 * -EIO.
 */
int request_fill (struct nbdm *v, const struct request *req);
/* Write, or with NULL zero, a part of one sector. */
int sector_write (struct nbdm *v, const void *buf, uint64_t count,
                  uint64_t offset, uint32_t flags);
/* Read any byte range, with whole sectors from each disk. */
int parts_pread (struct nbdm *v, void *buf, uint64_t count, uint64_t offset);

#endif /* NBDM_SECTOR_H */
