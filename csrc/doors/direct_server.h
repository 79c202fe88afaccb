/* SPDX-License-Identifier: BSD-3-Clause */

/* The server.  See direct_server.c. */

#ifndef NBDM_DIRECT_SERVER_H
#define NBDM_DIRECT_SERVER_H

#include <stdint.h>

struct direct_server;
struct exports;
struct node_calls;
struct session;

/* The server's exports; add to them before nbdm_server_start. */
struct exports *direct_exports (struct direct_server *server);
struct node_calls *direct_calls (struct direct_server *server);
/* The kind of the listening socket that the client came by; unless NULL, `text`
 * has room for NBDM_TEXT_LEN bytes and gets the listener's text.
 */
uint32_t direct_listener (const struct session *session, char *text);
/* Write a log line about one client, as printf.  Lines beyond a rate are left
 * out.
 */
void direct_log (const struct session *session, const char *fmt, ...)
    __attribute__ ((format (printf, 2, 3)));

#endif /* NBDM_DIRECT_SERVER_H */
