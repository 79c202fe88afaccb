/* SPDX-License-Identifier: BSD-3-Clause */

/* A volume of nodes: its record, and what other nodes lack.  See node.c. */

#ifndef NBDM_NODE_H
#define NBDM_NODE_H

#include <stdbool.h>
#include <stdint.h>

struct nbdm;
struct remote;
struct request;

/* Put the record into the pages of the superblock, before a store. */
void node_put_locked (struct nbdm *v);
/* Is it in sync once nothing is dirty?  True of every plain remote. */
bool node_counted_locked (const struct remote *r);
/* Does its entry say that it has the volume's generation? */
bool node_has_generation_locked (const struct remote *r);
/* This node will not get a write.  If it may hold the present generation, begin
 * another one, durably; false: it may not.
 */
bool node_missed_locked (struct nbdm *v, struct remote *r);
/* Begin a generation that none of the nodes with `missing` can hold; in memory
 * alone.
 */
void node_begin_locked (struct nbdm *v, const bool *missing);
/* The record has a new generation: so have the plain remotes in sync. */
void node_generation_locked (struct nbdm *v, uint64_t before);
/* A write that the node did not get was left to its resync: as
 * node_missed_locked.
 */
void node_left_behind_locked (struct remote *r, const struct request *req);
/* On a secondary, before its first write: nothing tells any more what plain
 * remotes have.  Durable.
 */
void node_forget_plain_locked (struct nbdm *v);

#endif /* NBDM_NODE_H */
