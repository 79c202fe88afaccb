/* SPDX-License-Identifier: BSD-3-Clause */

/* Trims and zeroes that take too long.  See long_zero.c. */

#ifndef NBDM_LONG_ZERO_H
#define NBDM_LONG_ZERO_H

#include <stdbool.h>
#include <stdint.h>

struct remote;
struct request;

/* If the request is a trim or zero that has waited too long for the remote,
 * leave its rest to resync, durably.  `waited_ns` is the wait so far.
 */
bool long_zero_leave_locked (const struct request *req, struct remote *r,
                             uint64_t waited_ns);

#endif /* NBDM_LONG_ZERO_H */
