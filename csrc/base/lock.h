/* SPDX-License-Identifier: BSD-3-Clause */

/* Mutexes that a function holds to the end of a scope. */

#ifndef NBDM_LOCK_H
#define NBDM_LOCK_H

#include <pthread.h>

static inline void
unlock_at_scope_end (pthread_mutex_t **lock)
{
  pthread_mutex_unlock (*lock);
}

/* Lock the mutex now, and unlock it when the scope ends in any way: a return
 * value is computed with the lock held.  One mutex a scope; a condition
 * variable's wait names the mutex itself.
 */
#define LOCK_FOR_SCOPE(mutex)                                                  \
  __attribute__ ((cleanup (unlock_at_scope_end))) pthread_mutex_t *scope_lock  \
      = (mutex);                                                               \
  pthread_mutex_lock (scope_lock)

#endif /* NBDM_LOCK_H */
