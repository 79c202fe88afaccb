/* SPDX-License-Identifier: BSD-3-Clause */

/* Where a write's bytes go on one remote.  See classify.c. */

#ifndef NBDM_CLASSIFY_H
#define NBDM_CLASSIFY_H

#include <stdbool.h>
#include <stdint.h>

struct dirty_map;

/* Where a write's bytes go on one remote: the table of design section 5. */
struct piece {
  uint64_t offset, length;
};

/* Does a region's write go to the remote, or is the region left to resync?
 * Clean and copied ones go.  Late ones go and stay dirty: only a lost
 * connection's command keeps them from being clean.  With `always` (policy
 * stop) all go, so that every answered write is on both disks.
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
