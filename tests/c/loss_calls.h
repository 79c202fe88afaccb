/* SPDX-License-Identifier: BSD-3-Clause */

/* What loss_record.c and loss_remotes.c share: see loss.h. */

#ifndef NBDM_LOSS_CALLS_H
#define NBDM_LOSS_CALLS_H

#include "loss.h"

/* A function that takes the place of another. */
#define WRAPPED(type, name, ...)                                               \
  type __real_##name (__VA_ARGS__);                                            \
  type __wrap_##name (__VA_ARGS__)

/* Call the test's function, if calls are recorded. The caller holds the lock.
 */
void loss_look (bool sync);

#endif /* NBDM_LOSS_CALLS_H */
