/* SPDX-License-Identifier: BSD-3-Clause */

/* Generations that the engine begins by itself.
 *
 * Python applies every other rule of generations (rules/generation.py), as they
 * follow from what nodes tell each other.  A generation that begins with a
 * write cannot wait for Python: the write is answered only once the generation
 * is durable.  So this one rule is here too, and a test compares the two.
 */

#include <string.h>

#include "logs/lineage.h"

struct nbdm_peer *
lineage_peer (struct nbdm_node *node, const char *name)
{
  for (uint32_t i = 0; i < node->nr_peers; i++)
    if (strcmp (node->peers[i].name, name) == 0)
      return &node->peers[i];
  return NULL;
}

bool
lineage_counted (const struct nbdm_peer *peer)
{
  return peer->shared && peer->bases[0] == 0;
}

bool
lineage_is_fresh (const struct nbdm_node *node, uint64_t generation)
{
  bool fresh = generation != 0 && generation != node->generation;

  for (unsigned i = 0; i < NBDM_ANCESTORS && fresh; i++)
    fresh = node->history[i] != generation;
  return fresh;
}

/* The present generation is the latest base.  The oldest one is kept as well,
 * since the node has confirmed it; it did not confirm those between.
 */
static void
add_base (struct nbdm_peer *peer, uint64_t generation)
{
  uint64_t bases[NBDM_BASES + 1] = { generation };
  unsigned nr = 1;

  for (unsigned i = 0; i < NBDM_BASES && peer->bases[i]; i++)
    if (peer->bases[i] != generation)
      bases[nr++] = peer->bases[i];
  if (nr > NBDM_BASES)
    bases[NBDM_BASES - 1] = bases[NBDM_BASES];
  memcpy (peer->bases, bases, sizeof peer->bases);
}

void
lineage_begin (struct nbdm_node *node, uint64_t fresh, const bool *missing)
{
  for (uint32_t i = 0; i < node->nr_peers; i++)
    if (node->peers[i].shared) {
      add_base (&node->peers[i], node->generation);
      node->peers[i].shared = !missing[i];
    }
  memmove (&node->history[1], &node->history[0],
           sizeof node->history - sizeof node->history[0]);
  node->history[0] = node->generation;
  node->generation = fresh;
}
