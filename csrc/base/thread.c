/* SPDX-License-Identifier: BSD-3-Clause */

/* Detached threads: no other thread joins them. */

#include <pthread.h>

#include "base/thread.h"

int
thread_start (void *(*run) (void *), void *opaque, size_t stack_bytes)
{
  pthread_attr_t attr;
  pthread_t thread;
  int err = pthread_attr_init (&attr);

  if (err)
    return -err;
  pthread_attr_setdetachstate (&attr, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize (&attr, stack_bytes);
  err = pthread_create (&thread, &attr, run, opaque);
  pthread_attr_destroy (&attr);
  return -err;
}
