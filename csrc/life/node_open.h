/* SPDX-License-Identifier: BSD-3-Clause */

/* A volume of nodes at its start.  See node_open.c. */

#ifndef NBDM_NODE_OPEN_H
#define NBDM_NODE_OPEN_H

#include <stdbool.h>
#include <stdint.h>

struct nbdm;
struct nbdm_params;
struct remote;

/* With the superblock loaded: load the record, and the role.  -EINVAL: the
 * parameters are not of this node; -EPERM: it may not be primary.
 */
int node_load (struct nbdm *v, const struct nbdm_params *params);
/* The regions of a range may differ from every other node. */
void node_doubt_locked (struct nbdm *v, uint64_t offset, uint64_t length);
/* The same of an activity extent; `opaque` is the volume. */
void node_doubt_extent (void *opaque, uint64_t extent);
bool node_any_doubts (const struct nbdm *v);
/* This node's map of what the other one had answered and not flushed. */
void node_doubt_unflushed_locked (struct remote *r);
/* After the recovery: how the doubts came about.  `crashed`: the last session
 * was not closed; `host`: and the page cache is another one.
 */
void node_recovered (struct nbdm *v, bool crashed, bool host);
/* An operator chose another disk: neither copy is known to be newer, and any
 * other one is a better source.
 */
void node_took_disk (struct nbdm *v);
/* The first store of a session. */
int node_first_store (struct nbdm *v);
/* A primary's clients read the regions that it doubts: from now on its content
 * of them counts.  After the session's first store.
 */
int node_settle_doubts (struct nbdm *v);
/* The state of another node, or of a secondary's remote, until it connects. */
void node_begin_state (struct remote *r);

#endif /* NBDM_NODE_OPEN_H */
