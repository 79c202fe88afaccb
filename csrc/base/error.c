/* SPDX-License-Identifier: BSD-3-Clause */

/* The message that belongs to a -errno.
 *
 * Each thread has its own message, as with errno: the thread that got -EIO asks
 * for the message, and a failure of another thread must not replace it.  So an
 * error that moves to another thread takes its message along: a request that
 * one thread begins and another completes keeps it in struct request, and a
 * thread that shares another's failed flush sets the message again.  A longer
 * message is cut.
 *
 * A thread gets room for its messages with its first one.  If there is no
 * memory, it takes a spare, so that the error "no memory" has a message.  The
 * room is no thread-local variable: the C library ends the process where it has
 * no memory for those of a shared object, unless they are small enough to lie
 * in each thread's stack (-ftls-model in nbd_mirror/_build.py).  So all
 * thread-local variables together stay small.
 */

#define _GNU_SOURCE /* the strerror_r that returns the string */

#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"

#define MESSAGE_MAX 1024
#define NR_SPARES 32

struct room {
  char text[MESSAGE_MAX];
  atomic_bool taken; /* of a spare */
};

static struct room spares[NR_SPARES];
static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_key_t key; /* frees a thread's room when the thread ends */
static bool has_key;
static _Thread_local struct room *mine; /* or NULL */

static void
give_back (void *opaque)
{
  struct room *room = opaque;

  mine = NULL;
  if (room >= spares && room < spares + NR_SPARES)
    atomic_store (&room->taken, false);
  else
    free (room);
}

static void
make_key (void)
{
  has_key = pthread_key_create (&key, give_back) == 0;
}

static struct room *
take_spare (void)
{
  for (unsigned i = 0; i < NR_SPARES; i++)
    if (!atomic_exchange (&spares[i].taken, true))
      return &spares[i];
  return NULL;
}

/* The thread's room; NULL: there is none. */
static struct room *
room (void)
{
  if (mine)
    return mine;
  pthread_once (&once, make_key);
  mine = malloc (sizeof *mine);
  if (mine == NULL)
    mine = take_spare ();
  if (mine && has_key)
    (void)pthread_setspecific (key, mine);
  return mine;
}

/* The arguments may point into the message they replace ("%s", last_error ()),
 * so the new message is formatted in another buffer.
 */
static void __attribute__ ((format (printf, 1, 0)))
keep (const char *fmt, va_list args)
{
  char text[MESSAGE_MAX];

  vsnprintf (text, sizeof text, fmt, args);
  if (room ())
    strcpy (mine->text, text);
}

int
set_error (int err, const char *fmt, ...)
{
  char buf[128];
  size_t length;
  va_list args;

  va_start (args, fmt);
  keep (fmt, args);
  va_end (args);
  if (mine == NULL)
    return err;
  length = strlen (mine->text);
  snprintf (mine->text + length, MESSAGE_MAX - length, ": %s",
            strerror_r (-err, buf, sizeof buf));
  return err;
}

int
set_message (int err, const char *fmt, ...)
{
  va_list args;

  va_start (args, fmt);
  keep (fmt, args);
  va_end (args);
  return err;
}

const char *
last_error (void)
{
  return mine ? mine->text : "";
}

void
clear_error (void)
{
  if (mine)
    mine->text[0] = '\0';
}
