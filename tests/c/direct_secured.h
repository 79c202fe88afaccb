/* SPDX-License-Identifier: BSD-3-Clause */

/* A direct door with TLS, and clients that it turns away. */

#ifndef NBDM_DIRECT_SECURED_H
#define NBDM_DIRECT_SECURED_H

#include "api.h"
#include "wire/conn.h"
#include "wire/protocol.h"
#include "direct_site.h"

#define FLAGS (NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES)

/* Its remote has TLS too. */
static void
bring_up_secured (void)
{
  setenv ("NBDM_TEST_TLS", "1", 1);
  bring_up (1, 1000);
  /* Else a worker would have to wait for each write. */
  assert (conn_watchable (site.volume->remotes[0].conn));
}

/* A client that has not asked for TLS yet. */
static struct client
connect_plain (void)
{
  struct client c;

  client_secure = NULL;
  c = client_connect (door, FLAGS);
  client_secure = tls_relay;
  return c;
}

/* What another client of TLS gets: no transmission. */
static TEST_UNUSED void
assert_turned_away (const struct tls_options *other)
{
  struct client c = connect_plain ();
  char byte;
  int fd;

  assert (client_ask (&c, NBD_OPT_STARTTLS, NULL, 0) == NBD_REP_ACK);
  fd = tls_relay_with (c.fd, other);
  if (fd < 0)
    return;
  /* A client of TLS 1.3 is ready before the server has checked it. */
  assert (recv (fd, &byte, 1, 0) <= 0);
  close (fd);
}

#endif /* NBDM_DIRECT_SECURED_H */
