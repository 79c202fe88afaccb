/* SPDX-License-Identifier: BSD-3-Clause */

/* Flush the remotes when clients do not.  See flusher.c. */

#ifndef NBDM_FLUSHER_H
#define NBDM_FLUSHER_H

#include <stdbool.h>
#include <stdint.h>

struct nbdm;
struct nbdm_params;
struct remote;

/* The remote answered a write of this range. */
void unflushed_add_locked (struct remote *r, uint64_t offset, uint64_t length);
/* Is anything in its unflushed set? */
bool unflushed_any_locked (const struct remote *r);
void flushers_init (struct nbdm *v, const struct nbdm_params *params);
int flushers_start (struct nbdm *v);
void flushers_join (struct nbdm *v); /* call it while the ticker runs */

/* The remote was admitted: wake the flusher, as it may have unflushed regions
 * of an earlier connection.
 */
void flusher_admitted_locked (struct remote *r);
/* Wake the flusher if a flush has ended and another is due. */
void flusher_wake_locked (struct remote *r);

#endif /* NBDM_FLUSHER_H */
