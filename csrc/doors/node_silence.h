/* SPDX-License-Identifier: BSD-3-Clause */

/* Is a node with a claim still there?  See node_silence.c. */

#ifndef NBDM_NODE_SILENCE_H
#define NBDM_NODE_SILENCE_H

#include <stdbool.h>

struct session;

#define NODE_LOOK_MS 500 /* between looks */

/* The other side is alive now. */
void node_heard (struct session *session);
/* Nothing came within a look.  True: the other side was silent for too long,
 * and the socket is shut down.  Only the session's thread calls both.
 */
bool node_is_gone (struct session *session);

#endif /* NBDM_NODE_SILENCE_H */
