/* SPDX-License-Identifier: BSD-3-Clause */

/* Extents go cold.  See cool.c. */

#ifndef NBDM_COOL_H
#define NBDM_COOL_H

#include <stdint.h>

struct nbdm;

/* Make the staged sectors of the activity log durable.  Releases the lock for
 * that.
 */
int write_activity_relock (struct nbdm *v);
/* Let up to `max` extents go cold that were last used before `before_ns`: both
 * sides are flushed, the dirty maps' pages durable, and no request took the
 * extents in the meantime.  Releases the lock.  Returns how many went cold;
 * -EAGAIN: all are in use.
 */
int cool_relock (struct nbdm *v, uint32_t max, uint64_t before_ns);

#endif /* NBDM_COOL_H */
