/* SPDX-License-Identifier: BSD-3-Clause */

/* Fault points; see fault.c. */

#ifndef NBDM_FAULT_H
#define NBDM_FAULT_H

#include <stdatomic.h>

/* Named fault points, for crash and race tests.  NBDM_FAULT names points and
 * actions: "after_log=kill", "after_local:3=kill" (the third time),
 * "resync_after_read=wait:PATH" (make PATH.reached, go on when PATH exists, or
 * after 60 s), "superblock_sync=error:ENOSPC" (the point returns -ENOSPC).  The
 * table in fault.c lists the names, and says at which points an error is
 * possible: the caller uses the result there; elsewhere it is always 0.
 */
extern atomic_int fault_count; /* 0 until fault_init found some */
int fault_reached (const char *name);
void fault_init (void); /* reads NBDM_FAULT; idempotent */

/* Costs one load and a branch when no fault is set, as always outside tests.  0
 * or -errno.
 */
static inline int
fault_point (const char *name)
{
  if (__builtin_expect (
          atomic_load_explicit (&fault_count, memory_order_acquire) == 0, 1))
    return 0;
  return fault_reached (name);
}

#endif /* NBDM_FAULT_H */
