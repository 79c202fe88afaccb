/* SPDX-License-Identifier: BSD-3-Clause */

/* Flushes of local and of the remotes, shared by all threads that ask.  See
 * flush.c.
 */

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
  const struct conn
      *conn; /* wait only for this one; NULL: for any later one too */
};

/* Flush all that the remote has answered so far, or find that the remote is
 * lost.  Begin sends the flush, end waits for it.  Between them the thread may
 * flush the local disk or wait for anything: another thread that needs the
 * answer receives it.  0; -ENOTCONN: the remote is lost or out of sync, and its
 * unflushed set is dirty.
 */
void remote_flush_begin (struct remote *r, struct remote_flush *flush);
int remote_flush_end (struct remote_flush *flush);
/* The same without a wait.  False: it is not over yet.  The thread that began
 * the flush must still call remote_flush_end.
 */
bool remote_flush_poll (struct remote_flush *flush, int *rc);
/* Wait for the answer of the flush under way and receive it.  False: there is
 * none, or another thread waits for it.  Drops the lock.
 */
bool remote_flush_take_relock (struct remote *r);
/* A flush that no client asked for.  False: nothing was sent, as a flush is
 * under way or there is no connection.  Blocks, bounded by the deadline, and
 * waits for no hold.
 */
bool remote_flush_alone (struct remote *r);
/* Flush the local leg alone, shared with other threads that ask; FUA uses it as
 * well.  After a failure each call fails; local_flush_lost_relock must follow.
 */
int flush_local_group (struct nbdm *v);
/* Flush all legs.  -EIO: no disk that has all data succeeded.  A lost remote is
 * no error here while local is ok.
 */
int volume_flush (struct nbdm *v);

#endif /* NBDM_FLUSH_H */
