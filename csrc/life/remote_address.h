/* SPDX-License-Identifier: BSD-3-Clause */

/* Remotes that have exchanged their addresses.  See remote_address.c. */

#ifndef NBDM_REMOTE_ADDRESS_H
#define NBDM_REMOTE_ADDRESS_H

struct nbdm;
struct remote;

/* The remote has a new connection, to `uri`.  If that is where another remote's
 * disk was, it misses what either missed, durably.  -EINVAL with a message: not
 * to be used there.  Before it is compared.
 */
int remote_address_locked (struct remote *r, const char *uri);
/* At a start: note where the remotes of the superblock were that have left the
 * configuration.  Before the store that names them no more, which makes the
 * note durable.
 */
void remote_addresses_left_out (struct nbdm *v);

#endif /* NBDM_REMOTE_ADDRESS_H */
