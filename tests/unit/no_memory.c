/* SPDX-License-Identifier: BSD-3-Clause */

/* Preloaded into a process: an allocator that gives a thread no memory while
 * the thread says so.
 */

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>

void *__libc_malloc (size_t size);
void *__libc_calloc (size_t count, size_t size);
void *__libc_realloc (void *p, size_t size);
void *malloc (size_t size);
void *calloc (size_t count, size_t size);
void *realloc (void *p, size_t size);
void refuse_memory (int on);

static _Thread_local bool refuse;

void
refuse_memory (int on)
{
  refuse = on;
}

static bool
refused (void)
{
  if (refuse)
    errno = ENOMEM;
  return refuse;
}

void *
malloc (size_t size)
{
  return refused () ? NULL : __libc_malloc (size);
}

void *
calloc (size_t count, size_t size)
{
  return refused () ? NULL : __libc_calloc (count, size);
}

void *
realloc (void *p, size_t size)
{
  return refused () ? NULL : __libc_realloc (p, size);
}
