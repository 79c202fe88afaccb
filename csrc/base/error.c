/* SPDX-License-Identifier: BSD-3-Clause */

/* The message that belongs to a -errno.
 *
 * Each thread has its own message, as with errno: the thread that got -EIO asks
 * for the message, and a failure of another thread must not replace it.  So an
 * error that moves to another thread takes its message along: a request that
 * one thread begins and another completes keeps it in struct request, and a
 * thread that shares another's failed flush sets the message again.  The
 * storage is a fixed array, so that an error has a message when memory is out;
 * a longer message is cut.
 */

#define _GNU_SOURCE /* the strerror_r that returns the string */

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/error.h"

#define MESSAGE_MAX 1024

static _Thread_local char message[MESSAGE_MAX];

/* The arguments may point into the message they replace ("%s", last_error ()),
 * so the new message is formatted in another buffer.
 */
static void __attribute__ ((format (printf, 1, 0)))
keep (const char *fmt, va_list args)
{
  char text[MESSAGE_MAX];

  vsnprintf (text, sizeof text, fmt, args);
  strcpy (message, text);
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
  length = strlen (message);
  snprintf (message + length, sizeof message - length, ": %s",
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
  return message;
}

void
clear_error (void)
{
  message[0] = '\0';
}
