/* SPDX-License-Identifier: BSD-3-Clause */

/* Connections with TLS.  See secure_connect.c. */

#ifndef NBDM_SECURE_CONNECT_H
#define NBDM_SECURE_CONNECT_H

#include <stdint.h>

struct conn;

/* Connect to an nbds:// or nbds+unix:// URI and negotiate by `until_ns`;
 * conn->fd, conn->stream and conn->info are set.  -errno with a message.  Also
 * without TLS, for a claim: the message has the text of a refusal, which libnbd
 * does not tell.
 */
int secure_connect (struct conn *conn, const char *uri, uint64_t until_ns,
                    uint32_t timeout_ms);

/* The same for a call between nodes: structured replies are agreed on. */
int call_connect (struct conn *conn, const char *uri, uint64_t until_ns,
                  uint32_t timeout_ms);

#endif /* NBDM_SECURE_CONNECT_H */
