/* SPDX-License-Identifier: BSD-3-Clause */

/* The interface between the two halves of the activity log: activity.c, the set
 * in memory, and activity_file.c, the file.  Other modules use only activity.h.
 */

#ifndef NBDM_ACTIVITY_SET_H
#define NBDM_ACTIVITY_SET_H

#include <stdint.h>

#include "logs/layout.h"

struct activity;

static inline uint32_t
activity_sectors (uint32_t nr_entries)
{
  return nr_entries / ACTIVITY_PER_SECTOR
         + (nr_entries % ACTIVITY_PER_SECTOR != 0);
}

/* --- activity_file.c ------------------------------------------------- */

void activity_seal_sector (struct disk_activity_sector *sector);

/* --- activity.c ------------------------------------------------------ */

/* Allocate zeroed memory for nr_entries.  -ENOMEM: the caller frees it all the
 * same.
 */
int activity_set_init (struct activity *act);
void activity_set_free (struct activity *act);

/* Add the extent in place `number` of the sectors as read: it is ACTIVE.
 * Returns why it is invalid, or NULL.  The caller calls this for every place,
 * in order, then activity_set_loaded once.
 */
const char *activity_set_load (struct activity *act, uint32_t number);
void activity_set_loaded (struct activity *act);

/* Empty the set and every sector.  -EBUSY: in use. */
int activity_set_clear (struct activity *act);

/* Seal every sector: the caller writes them all. */
void activity_set_seal (struct activity *act);

#endif /* NBDM_ACTIVITY_SET_H */
