/* SPDX-License-Identifier: BSD-3-Clause */

/* The plain transport.  See transport_plain.c. */

#ifndef NBDM_TRANSPORT_PLAIN_H
#define NBDM_TRANSPORT_PLAIN_H

#include <sys/socket.h>
#include <sys/types.h>

struct conn;

/* Take over the socket of conn->nbd, which is closed: 0.  1: it is none that
 * this transport can carry.  -errno with a message.
 */
int plain_take_over (struct conn *conn);

/* sendmsg, of commands that may be answered, and their payloads gone, before
 * it returns.  The kernel has read them by then, but the sanitizers' own
 * sendmsg looks at them once more after the call: so they are passed by.  Not
 * a part of transport_plain.c, for tests to take the place of it.
 */
ssize_t conn_sendmsg (int fd, const struct msghdr *msg, int flags);

#endif /* NBDM_TRANSPORT_PLAIN_H */
