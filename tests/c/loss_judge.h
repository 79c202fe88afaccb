/* SPDX-License-Identifier: BSD-3-Clause */

/* The judge of lost power and killed processes: recovers from what was left,
 * and compares with what the model of loss.h knows:
 *
 *   - recovery succeeds, whatever was left;
 *   - every region that may differ between local and a remote is dirty on it,
 *     and every region a command may still arrive for is late;
 *   - nothing more is dirty than what the logs that were left name, and no log
 *     is disbelieved: whatever is torn, none of it looks garbled;
 *   - the local disk is known again by its samples, whatever was lost of it.
 *
 * It reads the logs by itself, by docs/FORMAT.md.
 */

#ifndef NBDM_LOSS_JUDGE_H
#define NBDM_LOSS_JUDGE_H

#include "loss.h"

#define EXTENTS 34u /* the bits of the last two lie in a page of their own */
#define SIZE ((uint64_t)EXTENTS * EXTENT_SIZE) /* bytes of the volume */
#define PEERS 2u                               /* its remotes */

struct verdict {
  enum loss_how how;
  bool lived; /* the process died and the page cache lived */
};

/* Make a place beside the site for what is left and recovered. */
void judge_begin (const struct site *site, uint64_t seed);
void judge_end (void);
/* Under the lock, at an event; the test fails if the judge finds anything.
 * `boot` is what the next start reads, `event` a number for the message.
 */
void judge (const struct verdict *verdict, const char *boot, unsigned event);

extern unsigned judge_recoveries, judge_samples; /* how many so far */

#endif /* NBDM_LOSS_JUDGE_H */
