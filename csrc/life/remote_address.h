/* SPDX-License-Identifier: BSD-3-Clause */

/* Detects remotes that have exchanged their addresses.  See remote_address.c.
 */

#ifndef NBDM_REMOTE_ADDRESS_H
#define NBDM_REMOTE_ADDRESS_H

struct nbdm;
struct remote;

/* The remote has a new connection, to `uri`.  If another remote's disk was
 * there, each of the two now misses what either missed, durably.  -EINVAL with
 * a message: the remote must not be used there.  Call it before the comparison.
 */
int remote_address_locked (struct remote *r, const char *uri);
/* At a start: keep the addresses of the remotes that are in the superblock but
 * have left the configuration.  Call it before the store that removes their
 * names; that store makes the addresses durable.
 */
void remote_addresses_left_out (struct nbdm *v);

#endif /* NBDM_REMOTE_ADDRESS_H */
