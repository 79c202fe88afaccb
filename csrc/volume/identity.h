/* SPDX-License-Identifier: BSD-3-Clause */

/* Take and void samples of the local disk.  See identity.c. */

#ifndef NBDM_IDENTITY_H
#define NBDM_IDENTITY_H

#include <stdbool.h>
#include <stdint.h>

#include "logs/layout.h"

struct nbdm;

/* A superblock's description of a local disk. */
struct described_disk {
  uint64_t size;
  char device[sizeof ((struct disk_superblock *)0)->local_device];
  uint64_t instance[3];
};

/* The bytes of a sample's block that belong to the volume. */
uint64_t sample_length (const struct nbdm *v, uint64_t block);
/* Remove the samples of blocks that the volume does not have: a superblock with
 * a correct checksum can still name such blocks.  Called at a start, before
 * other threads run.
 */
void identity_void_outside (struct nbdm *v);
/* May the block's content have changed since its sample was taken? */
bool sample_in_flux_locked (const struct nbdm *v, uint64_t block);
/* The `crc` of struct disk_sample. */
uint64_t sample_crc (const uint8_t *buf, uint64_t length);

/* Void the samples of the extents that go cold, durably, before these extents
 * leave the activity set.
 */
int identity_cool_locked (struct nbdm *v);
/* Void the samples of regions that were copied back to local, durably, before
 * these regions become clean there.
 */
int identity_copied_back_locked (struct nbdm *v);
/* Drop all samples: the disk was exchanged, or its state is unknown. */
void identity_forget_locked (struct nbdm *v);
/* Reads properties of the local disk, which may hang; the caller must hold no
 * lock.
 */
void identity_describe (const struct nbdm *v, struct described_disk *disk);
/* From now on this is the volume's disk; the samples stay. */
void identity_adopt_locked (struct nbdm *v, const struct described_disk *disk);
/* Take samples at a clean stop, when all is flushed and no thread writes. */
int identity_stop (struct nbdm *v);

#endif /* NBDM_IDENTITY_H */
