/* SPDX-License-Identifier: BSD-3-Clause */

/* Reads, from a disk that misses nothing in the range.  See read.c. */

#ifndef NBDM_READ_H
#define NBDM_READ_H

#include <stdint.h>

struct nbdm;
struct remote;

/* Read from a disk that misses no answered write of the range, but not from
 * `except` (NULL: any).  Waits for a remote on hold that has the range.  The
 * caller holds the range, so that no write to it is under way.  -EIO.
 */
int source_pread (struct nbdm *v, const struct remote *except, void *buf,
                  uint64_t count, uint64_t offset);
/* Local has refused a write of the range, and stays in use.  Where it cannot be
 * read either, it is no source: mark as missing on local what a remote has.
 */
void miss_unreadable (struct nbdm *v, uint64_t count, uint64_t offset);
/* The same as source_pread from any disk, for a client.  The caller holds no
 * range. */
int client_pread (struct nbdm *v, void *buf, uint64_t count, uint64_t offset);

#endif /* NBDM_READ_H */
