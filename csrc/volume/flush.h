/* SPDX-License-Identifier: BSD-3-Clause */

/* Flushes of local and of the remotes, shared by all threads that ask for one.
 * See flush.c.
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
      *conn;   /* wait only for this one; NULL: for any later one too */
  bool upkeep; /* of a policy thread: see nbdm_wake */
};

/* Flush all that the remote has answered so far, or report that the remote is
 * lost.  Begin sends the flush, end waits for it.  Between the two calls the
 * thread may flush the local disk or wait for anything: another thread that
 * needs the answer receives it.  0; -ENOTCONN: the remote is lost or out of
 * sync, and its unflushed set is dirty, except for what it alone has.
 */
void remote_flush_begin (struct remote *r, struct remote_flush *flush);
int remote_flush_end (struct remote_flush *flush);
/* remote_flush_end without a wait.  False: the flush is still under way.  The
 * thread that began the flush must still call remote_flush_end.
 */
bool remote_flush_poll (struct remote_flush *flush, int *rc);
/* Wait for the answer of the flush under way and receive it.  False: no flush
 * is under way, or another thread waits for it.  Releases the lock while it
 * waits.
 */
bool remote_flush_take_relock (struct remote *r);
/* Flush without a client's request.  False: nothing was sent, because a flush
 * is under way or the remote has no connection.  Blocks for at most the
 * deadline, and waits for no hold.
 */
bool remote_flush_alone (struct remote *r);
/* Flush the local leg only, shared with other threads that ask.  After a
 * failure each call fails; the caller must then call local_flush_lost_relock.
 */
int flush_local_group (struct nbdm *v);
/* The same, and a remote that can takes local's place as soon as the flush has
 * failed, before the caller waits for an answer of a remote.  A process killed
 * before the takeover's marks starts with a local disk that it believes.  The
 * caller must still call local_flush_lost_relock.
 */
int flush_local_or_replace (struct nbdm *v);
/* Flush all legs.  -EIO: no disk that has all data was flushed.  A lost remote
 * is no error while local is ok.  What a remote that is not connected has alone
 * may still be unflushed: nbdm_flush reports that.  `upkeep`: wait for no
 * remote on hold once the policy threads end, because all that it misses is
 * dirty.
 */
int volume_flush (struct nbdm *v, bool upkeep);

#endif /* NBDM_FLUSH_H */
