/* SPDX-License-Identifier: BSD-3-Clause */

/* A state directory without room for one more file.  A test that includes this
 * wraps openat (tests/c/Makefile).
 */

#ifndef NBDM_NO_ROOM_H
#define NBDM_NO_ROOM_H

#include <stdarg.h>
#include <stdatomic.h>

#include "test.h"

/* Files that are there can be opened, and so can the lock. */
static atomic_bool no_room;

int __real_openat (int dirfd, const char *name, int flags, ...);
int __wrap_openat (int dirfd, const char *name, int flags, ...);

int
__wrap_openat (int dirfd, const char *name, int flags, ...)
{
  va_list args;
  mode_t mode;

  va_start (args, flags);
  mode = flags & O_CREAT ? va_arg (args, mode_t) : 0;
  va_end (args);
  if (no_room && flags & O_CREAT && strcmp (name, "lock") != 0) {
    errno = ENOSPC;
    return -1;
  }
  return __real_openat (dirfd, name, flags, mode);
}

#endif /* NBDM_NO_ROOM_H */
