/* SPDX-License-Identifier: BSD-3-Clause */

/* A node's record in the superblock.  See nodes.c. */

#ifndef NBDM_NODES_H
#define NBDM_NODES_H

#include "api.h"

struct disk_superblock;
struct disk_nodes;

/* Put the record into both pages; the caller stores them.  Changes no other
 * field of `sb`.
 */
void nodes_put (const struct nbdm_node *node, struct disk_superblock *sb,
                struct disk_nodes *nodes);
/* Get the record; all zero if the volume has no nodes. */
void nodes_get (const struct disk_superblock *sb,
                const struct disk_nodes *nodes, struct nbdm_node *node);

#endif /* NBDM_NODES_H */
