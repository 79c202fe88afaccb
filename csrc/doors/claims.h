/* SPDX-License-Identifier: BSD-3-Clause */

/* The connections that may write to a node's disk.  See claims.c. */

#ifndef NBDM_CLAIMS_H
#define NBDM_CLAIMS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/queue.h>

struct nbdm_call;
struct node_calls;
struct session;

/* A granted claim, from its first connection until its end is reported. */
struct claim {
  TAILQ_ENTRY (claim) entry;
  TAILQ_HEAD (, session) sessions;
  bool broken;  /* a connection has ended: no other may join */
  bool unclean; /* and it did not part */
  size_t size;  /* of the name: the whole claim, as the export's name */
  uint8_t name[];
};

TAILQ_HEAD (claims, claim);

void claims_free (struct claims *claims);
/* The session becomes a connection of the claim with that name.  -ESTALE: the
 * claim is broken; -ENOMEM.
 */
int claims_join_locked (struct node_calls *calls, struct session *session,
                        const void *name, size_t size, uint64_t number);
/* None of the session's requests is at the disk, nor can come there.  No
 * effect if it has no claim.
 */
void claims_leave (struct session *session, bool clean);
/* Take the first ended claim and tell about it; false: there is none. */
bool claims_report_locked (struct node_calls *calls, struct nbdm_call *call);

#endif /* NBDM_CLAIMS_H */
