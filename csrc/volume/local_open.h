/* SPDX-License-Identifier: BSD-3-Clause */

/* Open the local disk and get its size.  See local_open.c. */

#ifndef NBDM_LOCAL_OPEN_H
#define NBDM_LOCAL_OPEN_H

#include <stdint.h>

struct local_file;

/* Open, lock and measure; the caller closes disk->fd, also after an error. */
int local_open (struct local_file *disk, const char *path, uint64_t *size);

#endif /* NBDM_LOCAL_OPEN_H */
