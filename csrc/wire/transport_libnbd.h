/* SPDX-License-Identifier: BSD-3-Clause */

/* libnbd's transport, and the handshake of both transports.  See
 * transport_libnbd.c.
 */

#ifndef NBDM_TRANSPORT_LIBNBD_H
#define NBDM_TRANSPORT_LIBNBD_H

#include <stdint.h>

struct conn;

/* Connect and negotiate by `until_ns`; conn->nbd and conn->info are set.
 * -errno with a message.
 */
int libnbd_connect (struct conn *conn, const char *uri, uint64_t until_ns,
                    uint32_t timeout_ms);

#endif /* NBDM_TRANSPORT_LIBNBD_H */
