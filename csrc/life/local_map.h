/* SPDX-License-Identifier: BSD-3-Clause */

/* `dirty.local` at a start.  See local_map.c. */

#ifndef NBDM_LOCAL_MAP_H
#define NBDM_LOCAL_MAP_H

#include <stdint.h>

struct nbdm;

/* Open dirty.local, or say that it is lost; make it anew if it is; then, with
 * the remotes' maps open as well, make state and maps fit each other.
 */
int local_map_open (struct nbdm *v);
int local_map_renew (struct nbdm *v);
void local_map_recover (struct nbdm *v);
/* Lost power while local was failed: what it may miss, as there was no msync.
 */
void local_miss_range_locked (struct nbdm *v, uint64_t offset, uint64_t length);

#endif /* NBDM_LOCAL_MAP_H */
