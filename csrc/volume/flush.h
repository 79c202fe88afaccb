/* SPDX-License-Identifier: BSD-3-Clause */

/* Flushes of local and of the remotes, shared by all who ask.  See flush.c. */

#ifndef NBDM_FLUSH_H
#define NBDM_FLUSH_H

#include <stdbool.h>
#include <stdint.h>

struct conn;
struct nbdm;
struct remote;

struct remote_flush {
  struct remote *remote;
  uint64_t ticket;
  const struct conn *conn; /* over if this one is lost; NULL: if any is back */
};

/* Everything the remote answered so far becomes flushed, or the remote is
 * lost.  Begin sends it, end waits for it: between them the local disk can
 * be flushed, and the thread may wait for whatever it likes, as others take
 * the answer in if they need it.  0; -ENOTCONN: lost or out of sync, its
 * unflushed set is dirty.
 */
void remote_flush_begin (struct remote *r, struct remote_flush *flush);
int remote_flush_end (struct remote_flush *flush);
/* The same without a wait: false, and it is not over yet.  The thread that
 * began it must call remote_flush_end in the end.
 */
bool remote_flush_poll (struct remote_flush *flush, int *rc);
/* Wait for the answer of a flush that is under way, unless another thread does:
 * false.  Drops the lock.
 */
bool remote_flush_take_relock (struct remote *r);
/* A flush that no client asked for: false, and nothing sent, if one is under
 * way or there is no connection.  Blocks, bounded by the deadline, and waits
 * for no hold.
 */
bool remote_flush_alone (struct remote *r);
/* The local leg alone, shared with the threads that ask meanwhile; FUA goes
 * through it as well.  After a failure each call fails: local_flush_lost_relock
 * follows.
 */
int flush_local_group (struct nbdm *v);
/* All legs; -EIO: no disk that has everything did it.  A lost remote is not
 * an error here while local is ok.
 */
int volume_flush (struct nbdm *v);

#endif /* NBDM_FLUSH_H */
