/* SPDX-License-Identifier: BSD-3-Clause */

/* Open the local disk and get its size.  See local_open.c. */

#ifndef NBDM_LOCAL_OPEN_H
#define NBDM_LOCAL_OPEN_H

#include <stdint.h>

struct local_file;

/* Open, lock and measure; the caller closes disk->fd, also after an error. */
int local_open (struct local_file *disk, const char *path, uint64_t *size);

/* -EINVAL with a message: the open disk lies in the state directory, perhaps
 * behind a link.  A start refuses that too (check_links in
 * nbd_mirror/volume/config.py), but looks at the path, where a disk may hang.
 */
int local_check_place (const struct local_file *disk, int state_fd,
                       const char *path);

#endif /* NBDM_LOCAL_OPEN_H */
