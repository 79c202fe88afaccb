/* SPDX-License-Identifier: BSD-3-Clause */

/* Receive from a process that is not trusted, and close its socket, without a
 * wait in the kernel; see receive.c.
 */

#ifndef NBDM_RECEIVE_H
#define NBDM_RECEIVE_H

#include <stddef.h>
#include <sys/types.h>
#include <sys/uio.h>

/* Of a connected socket, before anything is received from it; or of one that
 * listens, which leaves a client no time to send files before its accept.
 */
void receive_prepare (int fd);
/* As recv and readv with flags.  EBADMSG: open files came with the bytes, which
 * no honest peer sends: the caller must end the connection.
 */
ssize_t receive (int fd, void *buf, size_t size, int flags);
ssize_t receive_iov (int fd, struct iovec *iov, size_t nr, int flags);
/* Close a connected socket, which may hold unread messages of that kind. */
void close_socket (int fd);

#endif /* NBDM_RECEIVE_H */
