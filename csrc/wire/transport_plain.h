/* SPDX-License-Identifier: BSD-3-Clause */

/* The plain transport.  See transport_plain.c. */

#ifndef NBDM_TRANSPORT_PLAIN_H
#define NBDM_TRANSPORT_PLAIN_H

#include <stdbool.h>
#include <sys/socket.h>
#include <sys/types.h>

struct conn;

/* May this transport carry TLS?  Only tests say no. */
bool plain_can_secure (void);
/* Carry the connection; conn->stream and conn->info are set.  -ENOMEM with a
 * message.
 */
int plain_begin (struct conn *conn);
/* Take over the socket of conn->nbd, and close conn->nbd: 0.  1: this transport
 * cannot carry the connection.  -errno with a message.
 */
int plain_take_over (struct conn *conn);

/* sendmsg without the sanitizers' wrapper.  A command may be answered, and its
 * payload freed, before sendmsg returns: the kernel has read it by then, but
 * the wrapper reads it once more after the call.  A function of its own, so
 * that tests can replace it.
 */
ssize_t conn_sendmsg (int fd, const struct msghdr *msg, int flags);

#endif /* NBDM_TRANSPORT_PLAIN_H */
