/* SPDX-License-Identifier: BSD-3-Clause */

/* `dirty.local` at a start.  See local_map.c. */

#ifndef NBDM_LOCAL_MAP_H
#define NBDM_LOCAL_MAP_H

#include <stdint.h>

struct nbdm;

/* Three steps: open dirty.local or note that it is lost; create a lost one
 * again; with the remotes' maps also open, make the state and the maps
 * consistent.
 */
int local_map_open (struct nbdm *v);
int local_map_renew (struct nbdm *v);
void local_map_recover (struct nbdm *v);
/* Power was lost while local was failed: mark what it may miss, as its map was
 * not synced.
 */
void local_miss_range_locked (struct nbdm *v, uint64_t offset, uint64_t length);
/* The disk's flush has failed, or it is not known whether it will.  The kernel
 * may have dropped any page, and the next flush succeeds all the same (rule
 * 10): from now on local misses all that a remote has.
 */
void local_miss_all_locked (struct nbdm *v);

#endif /* NBDM_LOCAL_MAP_H */
