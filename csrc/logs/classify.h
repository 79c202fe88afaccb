/* SPDX-License-Identifier: BSD-3-Clause */

/* Which bytes of a write go to one remote; see classify.c. */

#ifndef NBDM_CLASSIFY_H
#define NBDM_CLASSIFY_H

#include <stdbool.h>
#include <stdint.h>

struct dirty_map;

/* A run of a write's bytes that goes to one remote. */
struct piece {
  uint64_t offset, length;
};

/* Does a region's write go to the remote, or is the region left to resync?
 * Clean and copied ones go.  Writes to late ones go, and the region stays
 * dirty: only the lost connection's command keeps it from being clean.  With
 * `always` (policy stop) all go, so that every answered write is on both disks.
 */
bool classify_goes_remote (const struct dirty_map *dm, uint64_t region,
                           bool always);
/* The next run of bytes in [from, end) that goes to the remote, at most
 * `max` bytes; false if there is none.
 */
bool classify_next (const struct dirty_map *dm, uint32_t region_size,
                    uint64_t from, uint64_t end, uint64_t max, bool always,
                    struct piece *piece);

#endif /* NBDM_CLASSIFY_H */
