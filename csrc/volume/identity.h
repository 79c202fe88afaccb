/* SPDX-License-Identifier: BSD-3-Clause */

/* Samples of the local disk: taken, and voided.  See identity.c. */

#ifndef NBDM_IDENTITY_H
#define NBDM_IDENTITY_H

#include <stdbool.h>
#include <stdint.h>

#include "logs/layout.h"

struct nbdm;

/* What a superblock says of a local disk. */
struct described_disk {
  uint64_t size;
  char device[sizeof ((struct disk_superblock *)0)->local_device];
  uint64_t instance[3];
};

/* The bytes of a sample's block that belong to the volume. */
uint64_t sample_length (const struct nbdm *v, uint64_t block);
/* May its content have changed since the sample was taken? */
bool sample_in_flux_locked (const struct nbdm *v, uint64_t block);
/* As struct disk_sample's `crc`. */
uint64_t sample_crc (const uint8_t *buf, uint64_t length);

/* Before the picked extents leave the activity set: their samples are void,
 * durably.
 */
int identity_cool_locked (struct nbdm *v);
/* Before regions that were copied back to local stop being dirty on it. */
int identity_copied_back_locked (struct nbdm *v);
/* Another disk, or one whose state nothing tells: nothing is known of it. */
void identity_forget_locked (struct nbdm *v);
/* Asks the local disk, which may hang: the caller holds no lock. */
void identity_describe (const struct nbdm *v, struct described_disk *disk);
/* This is the disk from now on; its samples are as they are. */
void identity_adopt_locked (struct nbdm *v, const struct described_disk *disk);
/* A clean stop: everything is flushed, and nothing is written any more. */
int identity_stop (struct nbdm *v);

#endif /* NBDM_IDENTITY_H */
