/* SPDX-License-Identifier: BSD-3-Clause */

/* Open and lock the state directory.  See open.c. */

#ifndef NBDM_OPEN_H
#define NBDM_OPEN_H

#include <stdint.h>

struct local_file;

/* The beginning of nbdm_chain's text. */
#define VOLUME_CHAIN "nbd_mirror volumes:"

/* A descriptor of the state directory, to which no other user may write: the
 * server would write to a link or wait for a lock that another user puts there.
 * -EPERM.
 */
int state_dir_open (const char *path);

/* Allow one server or create at a time in a state directory.  A process that
 * holds the lock for a moment is waited for; the message of -EBUSY names one
 * that keeps it.  The lock ends with the descriptor.
 */
int state_lock (int dirfd, const char *state_dir, int *lock_fd);
/* The second lock, on the open superblock: an operator may have removed the
 * file of the first one.  -EBUSY.  The lock ends with the descriptor.
 */
int superblock_lock (int fd, const char *state_dir);

/* local_open, which waits a moment for a server that ends.  Only a start or a
 * create may wait here, as no other thread waits for it.
 */
int local_open_patiently (struct local_file *disk, const char *path,
                          uint64_t *size);

#endif /* NBDM_OPEN_H */
