/* SPDX-License-Identifier: BSD-3-Clause */

/* What a disk is, by what outlives a reboot.  See device_id.c. */

#ifndef NBDM_DEVICE_ID_H
#define NBDM_DEVICE_ID_H

#include <stddef.h>
#include <stdint.h>

/* What the open file or block device is, by what outlives a reboot: UTF-8, to
 * be compared and to be shown.  "" where nothing is known that does.
 */
void device_describe (int fd, char *text, size_t size);

/* Which attachment of the device, or mount of the file's file system, this is:
 * made anew, its page cache is another one.  Zeroes: nothing is known.
 */
void device_instance (int fd, uint64_t instance[3]);

#endif /* NBDM_DEVICE_ID_H */
