/* SPDX-License-Identifier: BSD-3-Clause */

/* The header that each log's file begins with.  See log_header.c. */

#ifndef NBDM_LOG_HEADER_H
#define NBDM_LOG_HEADER_H

#include <stdint.h>

struct disk_log_header;
struct disk_superblock;

/* Create `name` in the directory: the `header` page, then `size` bytes of
 * zeroes, durably and in one step (a rename), so that no half-made file is ever
 * seen.  All space is allocated: a later store into the map cannot fail for
 * lack of space.
 */
int file_make (int dirfd, const char *name, const void *header, uint64_t size);

/* Headers in memory are as on disk, little-endian.  Fill one in with flags 0
 * and seal it, that is, compute its CRC.  The caller seals it again after any
 * change.
 */
void log_header_init (struct disk_log_header *header, const char *magic,
                      const char *name, const uint8_t *uuid, uint64_t session,
                      uint64_t entries, uint64_t entry_size);
void log_header_seal (struct disk_log_header *header);

/* Read and check a log's header: -ENOENT, or -EUCLEAN with a message if its
 * magic, version, CRC, uuid, name, entries or entry size are not as in `expect`
 * (of log_header_init), or the file, header included, is shorter than `size`.
 * The caller checks the session.
 */
int log_header_load (int fd, const char *name,
                     const struct disk_log_header *expect, uint64_t size,
                     struct disk_log_header *header);
/* Check a log of the right session against the superblock.  -EUCLEAN with a
 * message: by the superblock the volume was closed, but the log was not.
 */
int log_header_check_closed (const char *name,
                             const struct disk_log_header *header,
                             const struct disk_superblock *sb);
/* Seal and write it, with fdatasync. */
int log_header_store (int fd, const char *name, struct disk_log_header *header);

#endif /* NBDM_LOG_HEADER_H */
