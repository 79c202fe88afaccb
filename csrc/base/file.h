/* SPDX-License-Identifier: BSD-3-Clause */

/* Read, write and create files completely.  See file.c. */

#ifndef NBDM_FILE_H
#define NBDM_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Transfer all bytes or fail; EINTR and short counts are handled. */
int full_pread (int fd, void *buf, size_t count, uint64_t offset);
int full_pwrite (int fd, const void *buf, size_t count, uint64_t offset);

/* Is every byte zero?  `length` is at least 1. */
bool all_zero (const uint8_t *buf, uint64_t length);

/* Flags to open a file of the state directory: follow no symbolic link there,
 * and never wait for a FIFO.
 */
#define PLAIN_FILE (O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC)

/* Create `name` in the directory, with `size` bytes, durably and in one step (a
 * rename), so that no other process sees a half-made file.  `fill` writes the
 * bytes that are not zero, with full_pwrite, before the rename; it returns 0 or
 * -errno.  All space is allocated, so a later store into a mapping of the file
 * cannot fail.
 */
typedef int (*file_fill) (int fd, const void *opaque);
int file_make_filled (int dirfd, const char *name, uint64_t size,
                      file_fill fill, const void *opaque);

#endif /* NBDM_FILE_H */
