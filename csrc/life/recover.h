/* SPDX-License-Identifier: BSD-3-Clause */

/* What a start believes, and what it creates again.  See recover.c. */

#ifndef NBDM_RECOVER_H
#define NBDM_RECOVER_H

#include <stdbool.h>
#include <stdint.h>

struct disk;
struct disk_log_header;
struct nbdm;
struct nbdm_remote_params;

/* Load one remote from the superblock and dirty.<remote>.  Changes nothing:
 * volume_recover creates a new or lost map.
 */
int remote_load (struct nbdm *v, const struct nbdm_remote_params *params,
                 uint32_t index);
bool volume_has_remote (const struct nbdm *v, const char *name);
/* Does a log match the superblock?  Also notes whether the last session was
 * closed, so call it before this start stamps any log.  -EUCLEAN.
 */
int volume_check_log (struct nbdm *v, const char *file,
                      const struct disk_log_header *header);
/* The same of a dirty map that was opened, which is closed if it does not fit.
 * -EUCLEAN: or it stands in for one that was lost.
 */
int volume_check_map (struct disk *d);
/* Rename a log that cannot be believed, to keep it.  With "~", which no remote
 * has in its name: the bad map of "a" must not replace the map of "a.bad".
 */
int volume_put_away (struct nbdm *v, const char *file);
/* With all dirty maps loaded: may the volume be served?  -EINVAL: a remote that
 * may have the only copy of some data is not in the configuration;
 * -ENOTRECOVERABLE: local is not ok, and it is unknown which disk has the
 * newest data.
 */
int volume_check_sources (struct nbdm *v);
/* The session that a start stamps: one more than the superblock's (open.c). */
uint64_t volume_next_session (const struct nbdm *v);
/* Create lost maps again, load the other logs, and mark all that may differ. */
int volume_recover (struct nbdm *v);

#endif /* NBDM_RECOVER_H */
