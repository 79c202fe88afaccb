/* SPDX-License-Identifier: BSD-3-Clause */

/* Files that are read, written and made whole.  See file.c. */

#ifndef NBDM_FILE_H
#define NBDM_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* All of it or an error; EINTR and short counts are handled. */
int full_pread (int fd, void *buf, size_t count, uint64_t offset);
int full_pwrite (int fd, const void *buf, size_t count, uint64_t offset);

/* Is every byte zero?  `length` is at least 1. */
bool all_zero (const uint8_t *buf, uint64_t length);

/* How a file of the state directory is opened: a link there is not followed,
 * and a FIFO not waited for.
 */
#define PLAIN_FILE (O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC)

/* Make `name` in the directory, `size` bytes in all, durable, in one step (a
 * rename), so that no half-made file is ever seen.  `fill` writes what is not
 * zero, with full_pwrite, before the file is seen; it returns 0 or -errno.  The
 * space is really allocated, so a later store into a mapping of it cannot fail.
 */
typedef int (*file_fill) (int fd, const void *opaque);
int file_make_filled (int dirfd, const char *name, uint64_t size,
                      file_fill fill, const void *opaque);

#endif /* NBDM_FILE_H */
