/* SPDX-License-Identifier: BSD-3-Clause */

/* Generations that the engine begins by itself.  See lineage.c. */

#ifndef NBDM_LINEAGE_H
#define NBDM_LINEAGE_H

#include <stdbool.h>
#include <stdint.h>

#include "api.h"

/* The entry of that node; NULL: the volume has no such node. */
struct nbdm_peer *lineage_peer (struct nbdm_node *node, const char *name);
/* Does it hold this node's generation? */
bool lineage_counted (const struct nbdm_peer *peer);
/* Has no generation of this node, and none of its ancestors, this number? */
bool lineage_is_fresh (const struct nbdm_node *node, uint64_t generation);
/* `begin` of rules/generation.py: `missing[i]` says that peers[i] cannot hold
 * the generation `fresh`.
 */
void lineage_begin (struct nbdm_node *node, uint64_t fresh,
                    const bool *missing);

#endif /* NBDM_LINEAGE_H */
