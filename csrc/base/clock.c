/* SPDX-License-Identifier: BSD-3-Clause */

/* The clock of all deadlines and times. */

#include <errno.h>
#include <time.h>

#include "base/clock.h"

static struct timespec
timespec_of (uint64_t ns)
{
  return (struct timespec){ .tv_sec = (time_t)(ns / NS_PER_S),
                            .tv_nsec = (long)(ns % NS_PER_S) };
}

static uint64_t
read_ns (clockid_t clock)
{
  struct timespec ts;

  clock_gettime (clock, &ts);
  return (uint64_t)ts.tv_sec * NS_PER_S + (uint64_t)ts.tv_nsec;
}

uint64_t
now_ns (void)
{
  return read_ns (CLOCK_MONOTONIC);
}

uint64_t
now_coarse_ns (void)
{
  return read_ns (CLOCK_MONOTONIC_COARSE);
}

void
cond_init (pthread_cond_t *cond)
{
  pthread_condattr_t attr;

  pthread_condattr_init (&attr);
  pthread_condattr_setclock (&attr, CLOCK_MONOTONIC);
  pthread_cond_init (cond, &attr);
  pthread_condattr_destroy (&attr);
}

bool
wait_until (pthread_cond_t *cond, pthread_mutex_t *lock, uint64_t until_ns)
{
  struct timespec until = timespec_of (until_ns);

  if (until_ns == NEVER)
    return pthread_cond_wait (cond, lock) == 0;
  return pthread_cond_timedwait (cond, lock, &until) != ETIMEDOUT;
}

void
sleep_ns (uint64_t ns)
{
  const struct timespec time = timespec_of (ns);

  nanosleep (&time, NULL);
}
