/* SPDX-License-Identifier: BSD-3-Clause */

/* The superblock's two slots.  See superblock.c. */

#ifndef NBDM_SUPERBLOCK_H
#define NBDM_SUPERBLOCK_H

#include <stdbool.h>
#include <stdint.h>

struct disk_superblock;
struct disk_nodes;

/* Whether it is the superblock of a volume of nodes.  Of any other volume the
 * calls below neither read nor change `nodes`.
 */
bool superblock_has_nodes (const struct disk_superblock *sb);

/* Make the file with both slots written. */
int superblock_create (int dirfd, const struct disk_superblock *sb,
                       const struct disk_nodes *nodes);
/* Load the newest valid slot.  `*torn`: the other one was not valid.  -ENOENT;
 * -EUCLEAN: neither is valid; -EPROTONOSUPPORT: its version, an incompatible
 * feature or its role belongs to another program.
 */
int superblock_load (int fd, struct disk_superblock *sb,
                     struct disk_nodes *nodes, bool *torn);
/* Write the loaded slot once more, in the same place, and make it durable. */
int superblock_settle (int fd, const struct disk_superblock *sb,
                       const struct disk_nodes *nodes);
/* sequence + 1, CRC, write into the older slot, fdatasync.  If it fails, `*sb`
 * and `*nodes` keep their sequence.
 */
int superblock_store (int fd, struct disk_superblock *sb,
                      struct disk_nodes *nodes);
/* The boot id and the mount of the directory. */
int superblock_identity (int dirfd, uint8_t *boot_id, uint64_t *mount_id);

/* Three numbers of the mount through which the file was opened.  After a new
 * mount at least one of them differs.
 */
int file_mount_id (int fd, uint64_t *mount_id);

#endif /* NBDM_SUPERBLOCK_H */
