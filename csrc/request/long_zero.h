/* SPDX-License-Identifier: BSD-3-Clause */

/* Trims and zeroes that take too long.  See long_zero.c. */

#ifndef NBDM_LONG_ZERO_H
#define NBDM_LONG_ZERO_H

#include <stdbool.h>
#include <stdint.h>

struct remote;
struct request;

/* Leave the rest of the request to a resync of the remote, durably, if it is a
 * trim or zero that has waited for it too long, `waited_ns` in this request.
 */
bool long_zero_leave_locked (const struct request *req, struct remote *r,
                             uint64_t waited_ns);

#endif /* NBDM_LONG_ZERO_H */
