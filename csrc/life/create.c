/* SPDX-License-Identifier: BSD-3-Clause */

/* Format a state directory.
 *
 * A directory is a volume only with a superblock, so create removes it first
 * and writes it last: a crash or a full disk leaves no half-made volume.
 */

#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include "api.h"
#include "base/error.h"
#include "base/fault.h"
#include "base/file.h"
#include "life/open.h"
#include "logs/activity.h"
#include "logs/dirty_map.h"
#include "logs/inflight.h"
#include "logs/layout.h"
#include "logs/nodes.h"
#include "logs/superblock.h"
#include "volume/local_open.h"
#include "volume/volume.h"
#include "volume/zero_proof.h"

/* What a look at the local disk has found. */
struct found {
  uint64_t size; /* bytes */
  bool zero;     /* of a node: it reads as zeroes */
};

/* Servers may still carry out commands of an earlier volume that was killed,
 * and its maps are replaced: so all regions are late as well.  Any log shows
 * that a volume existed, as an interrupted create has removed the superblock.
 */
static unsigned
first_contents (int dirfd)
{
  return faccessat (dirfd, "inflight", F_OK, 0) == 0
             ? NEW_MAP_DIRTY | NEW_MAP_LATE
             : NEW_MAP_DIRTY;
}

/* The map towards a node begins empty: no write was answered that the other
 * node lacks.  That neither has data is what the generations say.
 */
static int
make_logs (const struct nbdm_params *params, const struct disk_superblock *sb,
           int dirfd, uint64_t nr_regions)
{
  unsigned contents = first_contents (dirfd);
  uint64_t session = le64toh (sb->session);
  int rc = activity_create (dirfd, sb->uuid, session, ACTIVITY_EXTENTS,
                            EXTENT_SIZE);

  if (rc == 0)
    rc = inflight_create (dirfd, sb->uuid, session, RING_SLOTS);
  if (rc == 0)
    rc = dirty_map_create (dirfd, LOCAL_NAME, sb->uuid, session, nr_regions,
                           params->region_size, 0);
  for (uint32_t i = 0; i < params->nr_remotes && rc == 0; i++) {
    const struct nbdm_remote_params *remote = &params->remotes[i];
    unsigned map = remote->is_node          ? NEW_MAP_NODE
                   : remote->assume_in_sync ? 0
                                            : contents;

    rc = dirty_map_create (dirfd, remote->name, sb->uuid, session, nr_regions,
                           params->region_size, map);
  }
  return rc;
}

static void
fill_remotes (const struct nbdm_params *params, struct disk_superblock *sb)
{
  for (uint32_t i = 0; i < params->nr_remotes; i++) {
    struct disk_remote *disk = &sb->remotes[i];
    bool assumed = params->remotes[i].assume_in_sync;

    snprintf (disk->name, sizeof disk->name, "%s", params->remotes[i].name);
    disk->state = htole32 (assumed ? NBDM_IN_SYNC : NBDM_OUT_OF_SYNC);
    disk->flags = htole32 (assumed ? REMOTE_ASSUMED : 0);
    /* A node has no generation yet: fill_nodes. */
    disk->generation = assumed && !params->node ? sb->generation : 0;
    disk->since = (int64_t)htole64 ((uint64_t)time (NULL));
    snprintf (disk->reason, sizeof disk->reason, "%s",
              assumed ? "assumed to be a copy" : "never copied yet");
  }
  sb->nr_remotes = htole32 (params->nr_remotes);
}

/* A node has no data until an operator promotes one: then that one's copy
 * counts, and the others are filled from it.
 */
static int
fill_nodes (const struct nbdm_params *params, bool zero,
            struct disk_superblock *sb, struct disk_nodes *nodes)
{
  struct nbdm_node node = { .role = NBDM_SECONDARY, .zero = zero };

  if (params->node == NULL)
    return 0;
  if (getrandom (node.id, sizeof node.id, 0) != (ssize_t)sizeof node.id)
    return set_error (-errno, "cannot get random numbers");
  snprintf (node.name, sizeof node.name, "%s", params->node);
  for (uint32_t i = 0; i < params->nr_remotes; i++)
    if (params->remotes[i].is_node) {
      struct nbdm_peer *peer = &node.peers[node.nr_peers++];

      snprintf (peer->name, sizeof peer->name, "%s", params->remotes[i].name);
    }
  sb->incompatible |= htole64 (FEATURE_DOUBTS);
  nodes_put (&node, sb, nodes);
  return 0;
}

static int
fill_superblock (const struct nbdm_params *params, const struct found *found,
                 int dirfd, struct disk_superblock *sb,
                 struct disk_nodes *nodes)
{
  uint64_t generation;
  int rc;

  memset (sb, 0, sizeof *sb);
  memcpy (sb->magic, SUPERBLOCK_MAGIC, sizeof sb->magic);
  sb->version = htole32 (LAYOUT_VERSION);
  if (getrandom (sb->uuid, sizeof sb->uuid, 0) != (ssize_t)sizeof sb->uuid
      || getrandom (&generation, sizeof generation, 0)
             != (ssize_t)sizeof generation)
    return set_error (-errno, "cannot get random numbers");
  sb->uuid[6] = (sb->uuid[6] & 0x0f) | 0x40; /* a random uuid: RFC 4122 */
  sb->uuid[8] = (sb->uuid[8] & 0x3f) | 0x80;
  snprintf (sb->name, sizeof sb->name, "%s", params->name);
  sb->size = htole64 (found->size);
  sb->region_size = htole32 (params->region_size);
  sb->extent_size = htole32 (EXTENT_SIZE);
  sb->ring_slots = htole32 (RING_SLOTS);
  sb->activity_slots = htole32 (ACTIVITY_EXTENTS);
  sb->session = htole64 (1);
  sb->generation = htole64 (generation | 1);
  sb->role = htole32 (ROLE_PRIMARY);
  sb->flags = htole32 (SUPERBLOCK_CLEAN);
  sb->local_state = htole32 (NBDM_LOCAL_OK);
  fill_remotes (params, sb);
  rc = fill_nodes (params, found->zero, sb, nodes);
  if (rc < 0)
    return rc;
  return superblock_identity (dirfd, sb->boot_id, sb->mount_id);
}

static int
check_size (const struct nbdm_params *params, uint64_t local_size,
            struct found *found)
{
  found->size = params->size ? params->size : local_size;
  if (found->size == 0)
    return set_message (-EINVAL, "the local disk %s is empty", params->local);
  if (local_size < found->size)
    return set_message (
        -EINVAL,
        "the local disk %s has %llu bytes, but the volume needs "
        "%llu",
        params->local, (unsigned long long)local_size,
        (unsigned long long)found->size);
  return 0;
}

/* Open and lock the local disk as a server would, and look at it.  The lock
 * ends here: a start proves again that a node's disk reads as zeroes.
 */
static int
measure_local (const struct nbdm_params *params, struct found *found)
{
  struct local_file disk = { .fd = -1 };
  uint64_t local_size = 0;
  int rc = local_open_patiently (&disk, params->local, &local_size);

  if (rc == 0)
    rc = check_size (params, local_size, found);
  if (rc == 0)
    found->zero
        = params->node != NULL && reads_as_zeroes (disk.fd, found->size);
  if (disk.fd >= 0)
    close (disk.fd);
  return rc;
}

/* Refuse if a server has the superblock, or if only the remotes have some data:
 * a new volume takes local as the source.  Checked under the lock, as a server
 * may have lost the disk since the caller's check.  An unreadable superblock
 * gives no answer; the operator uses force then.
 */
static int
check_replaceable (int dirfd, const char *state_dir)
{
  struct disk_superblock sb;
  struct disk_nodes nodes;
  bool torn, whole = true;
  int fd = openat (dirfd, "superblock", O_RDONLY | PLAIN_FILE);

  if (fd < 0)
    return 0;
  if (superblock_lock (fd, state_dir) < 0) {
    close (fd);
    return -EBUSY;
  }
  if (superblock_load (fd, &sb, &nodes, &torn) == 0)
    whole = le32toh (sb.local_state) == NBDM_LOCAL_OK;
  close (fd);
  return whole ? 0
               : set_message (-EEXIST,
                              "the local disk of the volume in %s misses "
                              "writes that only the remotes have",
                              state_dir);
}

static int
check_absent (int dirfd, const char *state_dir, int force)
{
  int rc;

  if (faccessat (dirfd, "superblock", F_OK, 0) < 0)
    return errno == ENOENT
               ? 0
               : set_error (-errno, "cannot look into %s", state_dir);
  if (!force)
    return set_message (-EEXIST, "%s already holds a volume's state",
                        state_dir);
  rc = check_replaceable (dirfd, state_dir);
  if (rc < 0)
    return rc;
  if (unlinkat (dirfd, "superblock", 0) < 0 || fsync (dirfd) < 0)
    return set_error (-errno, "cannot remove the superblock in %s", state_dir);
  fault_point ("create_erased");
  return 0;
}

int
nbdm_create (const struct nbdm_params *params, int force)
{
  struct disk_superblock sb;
  struct disk_nodes nodes;
  struct found found = { 0 };
  uint64_t nr_regions;
  int dirfd, lock_fd = -1, rc;

  fault_init ();
  dirfd = state_dir_open (params->state_dir);
  if (dirfd < 0)
    return dirfd;
  rc = state_lock (dirfd, params->state_dir, &lock_fd);
  if (rc == 0)
    rc = measure_local (params, &found);
  if (rc == 0)
    rc = check_absent (dirfd, params->state_dir, force);
  if (rc == 0)
    rc = fill_superblock (params, &found, dirfd, &sb, &nodes);
  if (rc == 0) {
    nr_regions = (found.size - 1) / params->region_size + 1;
    rc = make_logs (params, &sb, dirfd, nr_regions);
  }
  fault_point ("create_logs_made");
  if (rc == 0)
    rc = superblock_create (dirfd, &sb, &nodes);
  if (lock_fd >= 0)
    close (lock_fd);
  close (dirfd);
  return rc;
}
