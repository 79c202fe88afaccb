/* SPDX-License-Identifier: BSD-3-Clause */

/* Identify a disk by properties that survive a reboot.  See device_id.c. */

#ifndef NBDM_DEVICE_ID_H
#define NBDM_DEVICE_ID_H

#include <stddef.h>
#include <stdint.h>

/* Describe the open file or block device by properties that survive a reboot:
 * UTF-8, to compare and to show.  "" if none is known.
 */
void device_describe (int fd, char *text, size_t size);

/* Identify the attachment of the device, or the mount of the file's file
 * system: a new one has a new page cache.  Zeroes: unknown.
 */
void device_instance (int fd, uint64_t instance[3]);

#endif /* NBDM_DEVICE_ID_H */
