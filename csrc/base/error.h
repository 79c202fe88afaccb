/* SPDX-License-Identifier: BSD-3-Clause */

/* The message of this thread's last error.  See error.c. */

#ifndef NBDM_ERROR_H
#define NBDM_ERROR_H

/* Keep the message for nbdm_last_error and return `err` (-errno), so that a
 * function ends in `return set_error (-EIO, "bitmap: msync %s", path)`.  The
 * text of the errno is appended.
 */
int set_error (int err, const char *fmt, ...)
    __attribute__ ((format (printf, 2, 3)));

/* The same without the text of the errno, where the message is complete. */
int set_message (int err, const char *fmt, ...)
    __attribute__ ((format (printf, 2, 3)));

const char *last_error (void);

/* Forget this thread's message, so that nbdm_last_error never gives that of an
 * earlier request.
 */
void clear_error (void);

#endif /* NBDM_ERROR_H */
