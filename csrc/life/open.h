/* SPDX-License-Identifier: BSD-3-Clause */

/* The state directory, opened and locked.  See open.c. */

#ifndef NBDM_OPEN_H
#define NBDM_OPEN_H

/* How nbdm_chain begins. */
#define VOLUME_CHAIN "nbd_mirror volumes:"

/* A descriptor of the state directory, which must be ours alone: what another
 * user can plant in it, a link or a lock, would be written to or waited for.
 * -EPERM.
 */
int state_dir_open (const char *path);

/* Only one server, or create, a state directory: -EBUSY names the process.
 * The lock ends with the descriptor.
 */
int state_lock (int dirfd, const char *state_dir, int *lock_fd);

#endif /* NBDM_OPEN_H */
