/* SPDX-License-Identifier: BSD-3-Clause */

/* The server.  See direct_server.c. */

#ifndef NBDM_DIRECT_SERVER_H
#define NBDM_DIRECT_SERVER_H

struct direct_server;
struct exports;
struct session;

/* The server's exports; add to them before nbdm_server_start. */
struct exports *direct_exports (struct direct_server *server);
/* Write a log line about one client, as printf.  Lines beyond a rate are left
 * out.
 */
void direct_log (const struct session *session, const char *fmt, ...)
    __attribute__ ((format (printf, 2, 3)));

#endif /* NBDM_DIRECT_SERVER_H */
