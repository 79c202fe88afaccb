/* SPDX-License-Identifier: BSD-3-Clause */

/* What last went wrong in this thread, in words.  See error.c. */

#ifndef NBDM_ERROR_H
#define NBDM_ERROR_H

/* Keep the message for nbdm_last_error and return `err` (-errno), so that a
 * function ends in `return set_error (-EIO, "bitmap: msync %s", path)`.  The
 * errno's own words are added behind.
 */
int set_error (int err, const char *fmt, ...)
    __attribute__ ((format (printf, 2, 3)));

/* The same without errno's words, where the message says it all. */
int set_message (int err, const char *fmt, ...)
    __attribute__ ((format (printf, 2, 3)));

const char *last_error (void);

/* Forget this thread's message: one that no failed call replaces is then "",
 * and not that of an earlier request.
 */
void clear_error (void);

#endif /* NBDM_ERROR_H */
