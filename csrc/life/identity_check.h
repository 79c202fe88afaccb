/* SPDX-License-Identifier: BSD-3-Clause */

/* Is the local disk the one the state belongs to?  See identity_check.c. */

#ifndef NBDM_IDENTITY_CHECK_H
#define NBDM_IDENTITY_CHECK_H

#include <stdbool.h>
#include <stdint.h>

#include "logs/layout.h"

struct local_file;
struct nbdm;
struct nbdm_params;

/* At a start, before any file is changed: -EMEDIUMTYPE with a message if this
 * is not the disk of the last session.
 */
int identity_check_start (struct nbdm *v, const struct nbdm_params *params,
                          uint64_t local_size);
/* Make every remote dirty, if NBDM_LOCAL_FORCED was needed.  Call it after the
 * recovery.
 */
void identity_take_by_force (struct nbdm *v);
/* As identity_check_start, for a disk that replaces a failed one.  The
 * data to compare with is copied before: while the disk is read, another thread
 * may write the superblock, or close the logs.
 */
struct attached_check {
  struct disk_sample samples[NR_SAMPLES];
  uint32_t nr;
  char device[sizeof ((struct disk_superblock *)0)->local_device];
  bool unproven; /* the content proves nothing, and it is another device */
};
void identity_choose_locked (const struct nbdm *v,
                             struct attached_check *check);
int identity_check_attached (const struct nbdm *v, struct attached_check *check,
                             const struct local_file *disk, const char *path);
/* -ENOMEDIUM with a message if the volume does not fit on it. */
int identity_check_size (const struct nbdm *v, const char *path,
                         uint64_t local_size);
/* The operator says that the local disk is lost (NBDM_LOCAL_LOST): a remote
 * that was in sync serves from now on, durably.  Call it before the recovery.
 */
int identity_give_up_local (struct nbdm *v);
/* The samples count for the session that begins. */
void identity_begin (struct nbdm *v);

#endif /* NBDM_IDENTITY_CHECK_H */
