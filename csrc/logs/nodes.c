/* SPDX-License-Identifier: BSD-3-Clause */

/* A node's record: in the API's form, and as two pages of the superblock.
 *
 * Generation, role and the latest ancestors have their place in the superblock,
 * as every volume has them; the page of nodes has the rest.  One store writes
 * both, so that no crash separates a generation from what it is a base for.
 */

#include <endian.h>
#include <stdio.h>
#include <string.h>

#include "logs/layout.h"
#include "logs/nodes.h"
#include "logs/superblock.h"

/* Names on disk are padded with zeroes, and no byte after the NUL is left over
 * from an earlier name.
 */
static void
put_name (char *disk, const char *name)
{
  memset (disk, 0, NBDM_NAME_LEN);
  snprintf (disk, NBDM_NAME_LEN, "%s", name);
}

static void
get_name (char *name, const char *disk)
{
  snprintf (name, NBDM_NAME_LEN, "%.63s", disk);
}

static void
put_peer (const struct nbdm_peer *peer, struct disk_peer *disk)
{
  put_name (disk->name, peer->name);
  memcpy (disk->id, peer->id, sizeof disk->id);
  for (unsigned i = 0; i < NBDM_BASES; i++)
    disk->bases[i] = htole64 (peer->bases[i]);
  disk->flags = htole32 (peer->shared ? PEER_SHARED : 0);
  disk->replaced = htole32 (peer->replaced);
  disk->met = (int64_t)htole64 ((uint64_t)peer->met);
}

static void
get_peer (const struct disk_peer *disk, struct nbdm_peer *peer)
{
  get_name (peer->name, disk->name);
  memcpy (peer->id, disk->id, sizeof peer->id);
  for (unsigned i = 0; i < NBDM_BASES; i++)
    peer->bases[i] = le64toh (disk->bases[i]);
  peer->shared = (le32toh (disk->flags) & PEER_SHARED) != 0;
  peer->replaced = le32toh (disk->replaced);
  peer->met = (int64_t)le64toh ((uint64_t)disk->met);
}

static void
put_claim (const struct nbdm_claim *claim, struct disk_nodes *nodes)
{
  nodes->claim_epoch = htole64 (claim->epoch);
  put_name (nodes->claim_node, claim->node);
  nodes->claim_session = htole64 (claim->session);
  memcpy (nodes->claim_nonce, claim->nonce, sizeof nodes->claim_nonce);
}

static void
get_claim (const struct disk_nodes *nodes, struct nbdm_claim *claim)
{
  claim->epoch = le64toh (nodes->claim_epoch);
  get_name (claim->node, nodes->claim_node);
  claim->session = le64toh (nodes->claim_session);
  memcpy (claim->nonce, nodes->claim_nonce, sizeof claim->nonce);
}

void
nodes_put (const struct nbdm_node *node, struct disk_superblock *sb,
           struct disk_nodes *nodes)
{
  sb->incompatible |= htole64 (FEATURE_NODES);
  sb->role = htole32 (node->role);
  sb->generation = htole64 (node->generation);
  for (unsigned i = 0; i < NR_HISTORY; i++)
    sb->history[i] = htole64 (node->history[i]);

  memset (nodes, 0, sizeof *nodes);
  memcpy (nodes->id, node->id, sizeof nodes->id);
  put_name (nodes->name, node->name);
  for (unsigned i = 0; i < NR_OLDER; i++)
    nodes->older[i] = htole64 (node->history[NR_HISTORY + i]);
  nodes->epoch = htole64 (node->epoch);
  put_name (nodes->leader, node->leader);
  put_name (nodes->handed, node->handed);
  nodes->crash = htole32 (node->crash);
  nodes->flags = htole32 ((node->inconsistent ? NODE_INCONSISTENT : 0)
                          | (node->zero ? NODE_ZERO : 0));
  put_claim (&node->claim, nodes);
  nodes->own_session = htole64 (node->own_session);
  nodes->replaced = htole32 (node->replaced);
  nodes->nr_peers = htole32 (node->nr_peers);
  for (uint32_t i = 0; i < node->nr_peers; i++)
    put_peer (&node->peers[i], &nodes->peers[i]);
}

void
nodes_get (const struct disk_superblock *sb, const struct disk_nodes *nodes,
           struct nbdm_node *node)
{
  uint32_t flags;

  memset (node, 0, sizeof *node);
  if (!superblock_has_nodes (sb))
    return;
  flags = le32toh (nodes->flags);
  get_name (node->name, nodes->name);
  memcpy (node->id, nodes->id, sizeof node->id);
  node->role = le32toh (sb->role);
  node->crash = le32toh (nodes->crash);
  node->inconsistent = (flags & NODE_INCONSISTENT) != 0;
  node->zero = (flags & NODE_ZERO) != 0;
  node->generation = le64toh (sb->generation);
  for (unsigned i = 0; i < NR_HISTORY; i++)
    node->history[i] = le64toh (sb->history[i]);
  for (unsigned i = 0; i < NR_OLDER; i++)
    node->history[NR_HISTORY + i] = le64toh (nodes->older[i]);
  node->epoch = le64toh (nodes->epoch);
  get_name (node->leader, nodes->leader);
  get_name (node->handed, nodes->handed);
  get_claim (nodes, &node->claim);
  node->own_session = le64toh (nodes->own_session);
  node->replaced = le32toh (nodes->replaced);
  node->nr_peers = le32toh (nodes->nr_peers);
  for (uint32_t i = 0; i < node->nr_peers && i < NBDM_MAX_REMOTES; i++)
    get_peer (&nodes->peers[i], &node->peers[i]);
}
