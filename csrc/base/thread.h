/* SPDX-License-Identifier: BSD-3-Clause */

/* Detached threads: no other thread joins them. */

#ifndef NBDM_THREAD_H
#define NBDM_THREAD_H

#include <stddef.h>

/* Start `run` in a new thread with a stack of that many bytes.  -EAGAIN: the
 * process cannot have another thread.
 */
int thread_start (void *(*run) (void *), void *opaque, size_t stack_bytes);

#endif /* NBDM_THREAD_H */
