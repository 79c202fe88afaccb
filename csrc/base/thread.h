/* SPDX-License-Identifier: BSD-3-Clause */

/* Threads that no other thread joins. */

#ifndef NBDM_THREAD_H
#define NBDM_THREAD_H

#include <stddef.h>

/* Start `run` in a thread of its own, whose stack has that many bytes.
 * -EAGAIN: the process has no room for one.
 */
int thread_start (void *(*run) (void *), void *opaque, size_t stack_bytes);

#endif /* NBDM_THREAD_H */
