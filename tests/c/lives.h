/* SPDX-License-Identifier: BSD-3-Clause */

/* Lives of a volume: sessions that lead to each state from which a start may
 * begin.  Each ends in a clean stop, or is killed in the middle of a write.
 */

#ifndef NBDM_LIVES_H
#define NBDM_LIVES_H

#include "interrupted.h"

#include <stdbool.h>

#define NR_LIVES 6

struct life {
  const char *name;
  /* In a child; without `stop` the caller's fault kills it in its last write.
   */
  void (*live) (struct bench *bench, bool stop);
  const char *fault; /* that it needs, or NULL */
  bool local_ok;     /* at its end */
  bool loses_caches; /* the remotes', before it ends */
};

extern const struct life lives[NR_LIVES];

#endif /* NBDM_LIVES_H */
