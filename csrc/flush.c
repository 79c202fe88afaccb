/* SPDX-License-Identifier: BSD-3-Clause */

/* Flushes, shared by those who ask at the same time (group commit).
 *
 * A remote answers from memory; what it answered since its last flush is in
 * its *unflushed* set, and becomes dirty if the connection is lost (rule 4).
 * The set is two maps: answers go into the one that is `filling`, and a flush
 * turns them over before it is sent, so that its success clears exactly what
 * was answered before it began.
 *
 * A flush covers every write answered on any connection of ours, so clients
 * may be told that several connections see one disk (multi-conn).
 */

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "internal.h"
#include "volume.h"

static void
lead_locked (struct remote_flush *flush)
{
  struct remote *r = flush->remote;

  flush->leading = true;
  flush->conn = conn_get (r->conn);
  flush->covers = r->flush.asked;
  flush->command = (struct command){ .kind = COMMAND_FLUSH };
  r->flush.running = true;
  r->filling ^= 1;
}

static void
send_flush (struct remote_flush *flush)
{
  /* A server without flush has no cache it admits to; there is nothing to
   * send, and nothing more to be had from it.
   */
  if (!conn_info (flush->conn)->can_flush)
    return;
  if (conn_issue (flush->conn, &flush->command, &flush->waiter) < 0)
    flush->command.error = ENOTCONN;
}

void
remote_flush_begin (struct remote *r, struct remote_flush *flush)
{
  struct nbdm *v = r->volume;

  flush->remote = r;
  flush->leading = false;
  flush->waiter = (struct waiter)WAITER_INIT;
  pthread_mutex_lock (&v->lock);
  flush->ticket = ++r->flush.asked;
  if (r->admitted && !r->flush.running)
    lead_locked (flush);
  pthread_mutex_unlock (&v->lock);
  fault_point ("flush_turned");
  if (flush->leading)
    send_flush (flush);
  fault_point ("flush_sent");
}

static void
land_locked (struct remote_flush *flush)
{
  struct remote *r = flush->remote;
  struct conn *conn = flush->conn;
  int error = flush->command.error;
  char why[NBDM_REASON_LEN];

  flush->leading = false;
  r->flush.running = false;
  if (error == ENOTCONN || error == ESHUTDOWN) {
    conn_kill (conn, "the server is shutting down");
    remote_lost_locked (r, conn);
  }
  else if (error != 0) {
    snprintf (why, sizeof why, "it answered a flush with: %s",
              strerror (error));
    remote_broken_locked (r, conn, why);
  }
  else if (r->conn == conn && !r->volume->failed) {
    bitmap_clear_all (&r->dm.map[MAP_UNFLUSHED0 + (r->filling ^ 1)]);
    r->flush.done = flush->covers;
  }
  pthread_cond_broadcast (&r->volume->changed);
  conn_put (conn);
}

/* Its answer is there: what it means, under the lock. */
static void
take_answer_locked (struct remote_flush *flush)
{
  pthread_mutex_unlock (&flush->remote->volume->lock);
  fault_point ("flush_answered");
  pthread_mutex_lock (&flush->remote->volume->lock);
  land_locked (flush);
  fault_point ("flush_landed");
}

/* Is there nothing more to wait for?  `*rc`: as remote_flush_end returns. */
static bool
over_locked (const struct remote_flush *flush, int *rc)
{
  const struct remote *r = flush->remote;
  const struct nbdm *v = r->volume;

  *rc = 0;
  if (r->flush.done >= flush->ticket)
    return true;
  *rc = -ENOTCONN;
  return !remote_used_locked (r) || v->failed || (v->drained && !r->admitted);
}

/* Lead the next one if nobody does.  Drops the lock to send it. */
static bool
follow_up_locked (struct remote_flush *flush)
{
  struct remote *r = flush->remote;

  if (!r->admitted || r->flush.running)
    return false;
  lead_locked (flush);
  pthread_mutex_unlock (&r->volume->lock);
  send_flush (flush);
  pthread_mutex_lock (&r->volume->lock);
  return true;
}

int
remote_flush_end (struct remote_flush *flush)
{
  struct nbdm *v = flush->remote->volume;
  int rc;

  pthread_mutex_lock (&v->lock);
  for (;;) {
    if (flush->leading) {
      pthread_mutex_unlock (&v->lock);
      conn_wait (flush->conn, &flush->waiter);
      pthread_mutex_lock (&v->lock);
      take_answer_locked (flush);
    }
    if (over_locked (flush, &rc))
      break;
    if (!follow_up_locked (flush))
      pthread_cond_wait (&v->changed, &v->lock);
  }
  pthread_mutex_unlock (&v->lock);
  return rc;
}

bool
remote_flush_poll (struct remote_flush *flush, int *rc)
{
  struct nbdm *v = flush->remote->volume;
  bool over;

  if (flush->leading && !conn_answered_all (flush->conn, &flush->waiter))
    return false;
  pthread_mutex_lock (&v->lock);
  if (flush->leading)
    take_answer_locked (flush);
  over = over_locked (flush, rc);
  if (!over)
    follow_up_locked (flush);
  pthread_mutex_unlock (&v->lock);
  return over;
}

bool
remote_flush_alone (struct remote *r)
{
  struct nbdm *v = r->volume;
  struct remote_flush flush = { .remote = r, .waiter = WAITER_INIT };

  pthread_mutex_lock (&v->lock);
  if (r->admitted && !r->flush.running)
    lead_locked (&flush);
  pthread_mutex_unlock (&v->lock);
  if (!flush.leading)
    return false;
  send_flush (&flush);
  conn_wait (flush.conn, &flush.waiter);
  pthread_mutex_lock (&v->lock);
  land_locked (&flush);
  pthread_mutex_unlock (&v->lock);
  return true;
}

int
flush_local_group (struct nbdm *v)
{
  struct flush_group *group = &v->local.flush;
  uint64_t ticket;
  int rc;

  pthread_mutex_lock (&v->lock);
  ticket = ++group->asked;
  while (group->done < ticket) {
    uint64_t covers = group->asked;
    unsigned failures = v->local.failures;

    if (group->running) {
      pthread_cond_wait (&v->changed, &v->lock);
      continue;
    }
    group->running = true;
    pthread_mutex_unlock (&v->lock);
    rc = local_flush (v);
    pthread_mutex_lock (&v->lock);
    group->running = false;
    group->done = covers;
    /* Not of a disk that has failed meanwhile, and been replaced. */
    if (rc < 0 && v->local.flush_error == 0 && v->local.failures == failures) {
      /* The kernel has dropped the pages it could not write: another fsync
       * would succeed and mean nothing (rule 10).
       */
      v->local.flush_error = rc;
      local_note_error_locked (v);
      atomic_store (&v->local.doubted, true);
    }
    pthread_cond_broadcast (&v->changed);
  }
  rc = v->local.flush_error;
  pthread_mutex_unlock (&v->lock);
  return rc;
}

int
volume_flush (struct nbdm *v)
{
  struct remote_flush flushes[NBDM_MAX_REMOTES];
  bool begun[NBDM_MAX_REMOTES] = { false };
  bool flushed = false;
  int rc;

  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    pthread_mutex_lock (&v->lock);
    /* Once drained nothing waits for a held remote, and it has nothing that
     * is not dirty already.
     */
    begun[i] = remote_used_locked (&v->remotes[i])
               && (v->remotes[i].admitted || !v->drained);
    pthread_mutex_unlock (&v->lock);
    if (begun[i])
      remote_flush_begin (&v->remotes[i], &flushes[i]);
  }
  rc = atomic_load (&v->local.state) == NBDM_LOCAL_FAILED
           ? 0
           : flush_local_group (v);
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    if (begun[i] && remote_flush_end (&flushes[i]) == 0)
      flushed = true; /* lost: a state, and not an error while local is ok */

  pthread_mutex_lock (&v->lock);
  if (rc < 0)
    rc = local_flush_lost_locked (v);
  else if (v->local.state == NBDM_LOCAL_FAILED && !flushed)
    rc = set_message (-EIO, "the local disk has failed, and no remote that is "
                            "in sync is connected");
  pthread_mutex_unlock (&v->lock);
  return rc;
}

/* Does a remote miss bytes that were answered?  Late regions' bytes were sent
 * again, and are only copied once more.
 */
static bool
any_behind_locked (const struct nbdm *v)
{
  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    const struct remote *r = &v->remotes[i];
    if (r->copying || r->dm.map[MAP_DIRTY].nr_set > r->dm.map[MAP_LATE].nr_set)
      return true;
  }
  return false;
}

/* Policy stop: what a server lost that was back within the hold is dirty, and
 * a flush is not answered before it has been copied; bounded.  The ticker
 * wakes us.
 */
static int
wait_for_both_locked (struct nbdm *v)
{
  uint64_t until = now_ns () + v->hold_ms * UINT64_C (1000000);

  for (uint32_t i = 0; i < v->nr_remotes; i++)
    until += 2 * v->remotes[i].deadline_ms * UINT64_C (1000000);
  while (v->policy == NBDM_STOP && !v->failed && !v->fenced && !v->stopping
         && any_behind_locked (v)) {
    if (now_ns () > until)
      return set_message (-EIO, "policy stop: a remote is not caught up yet");
    v->nr_waiting++;
    pthread_cond_wait (&v->changed, &v->lock);
    v->nr_waiting--;
  }
  if (v->policy == NBDM_STOP && v->stopping && any_behind_locked (v))
    return set_message (-ESHUTDOWN, "the volume is stopping");
  return 0;
}

int
nbdm_flush (struct nbdm *v)
{
  int rc = 0;

  pthread_mutex_lock (&v->lock);
  if (v->stopping)
    rc = set_message (-ESHUTDOWN, "the volume is stopping");
  else
    v->nr_requests++;
  pthread_mutex_unlock (&v->lock);
  if (rc < 0)
    return rc;

  rc = volume_flush (v);

  fault_point ("flush_before_answer");
  pthread_mutex_lock (&v->lock);
  if (rc == 0 && v->policy == NBDM_STOP)
    rc = wait_for_both_locked (v);
  v->nr_requests--;
  v->flushes++;
  if (v->stopping)
    pthread_cond_broadcast (&v->changed);
  /* Policy stop: what the remote did not flush is not safe on both. */
  if (rc == 0 && (v->failed || v->fenced))
    rc = set_message (-EIO, "the flush did not reach every leg: %s",
                      v->failed ? v->reason : "a remote is out of sync");
  pthread_mutex_unlock (&v->lock);
  return rc;
}
