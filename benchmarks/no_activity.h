/* SPDX-License-Identifier: BSD-3-Clause */

/* The engine without its activity log: what one row of the benchmark compares
 * the log's cost with.  benchmarks/no_activity.py puts this ahead of a copy of
 * csrc/admit.c, the only file that holds extents.  A mirror built so loses
 * track of writes when the power goes: nobody is given it, there is no switch.
 */

#include "internal.h"

#define activity_hold(act, first, last)                                        \
  ((void)(act), (void)(first), (void)(last), 0)
#define activity_release(act, first, last, now)                                \
  ((void)(act), (void)(first), (void)(last))
