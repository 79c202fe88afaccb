/* SPDX-License-Identifier: BSD-3-Clause */

/* A request's part on one remote, from its commands to their answers.
 *
 * Commands go in rounds, as many at once as the server, the window and the
 * remote's backlog let through.  A leg whose connection is lost waits for the
 * next one while the remote is on hold, and then sends everything again: the
 * server may have carried out any part of it.
 */

#include <errno.h>

#include "api.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/lock.h"
#include "request/admit.h"
#include "request/leg.h"
#include "request/long_zero.h"
#include "volume/backlog.h"
#include "volume/flush.h"
#include "volume/state.h"
#include "volume/volume.h"
#include "wire/conn.h"

void
leg_issue (struct leg *leg)
{
  for (unsigned i = 0; i < leg->nr; i++) {
    struct command *cmd = &leg->commands[i];
    if (conn_issue (leg->conn, cmd, &leg->waiter) < 0)
      cmd->error = ENOTCONN;
  }
}

/* Wait for this round; 0, LEG_LOST or the server's error. */
static int
leg_round (struct leg *leg)
{
  int rc = 0;

  if (leg->conn == NULL)
    return LEG_LOST;
  conn_wait (leg->conn, &leg->waiter);
  fault_point ("leg_answered");
  for (unsigned i = 0; i < leg->nr; i++) {
    int error = leg->commands[i].error;

    remote_heed_refusal (leg->remote, &leg->commands[i]);
    if (error == ESHUTDOWN) {
      conn_kill (leg->conn, "the server is shutting down");
      error = ENOTCONN;
    }
    if (error != 0)
      rc = -error;
  }
  return rc;
}

/* The connection is lost: wait while the remote is on hold.  Returns 0 if there
 * is a new connection, on which all is sent again, else LEG_LOST.
 */
static int
leg_hold (struct request *req, struct leg *leg, bool hope)
{
  struct remote *r = leg->remote;
  struct nbdm *v = r->disk.volume;
  int rc = LEG_LOST;

  LOCK_FOR_SCOPE (&v->lock);
  remote_lost_locked (r, leg->conn);
  leg_count_locked (req, leg, false);
  conn_put (leg->conn);
  leg->conn = NULL;
  fault_point ("hold_lost");
  while (hope && r->state == NBDM_HOLDING && !v->failed)
    pthread_cond_wait (&v->changed, &v->lock);
  if (hope && r->admitted && !v->failed) {
    leg->conn = conn_get (r->conn);
    leg->cursor = req->offset;
    leg_plan_locked (req, leg);
    fault_point ("hold_resend");
    rc = 0;
  }
  return rc;
}

/* A round was answered: plan the next one once the backlog has room. */
static int
leg_next (struct request *req, struct leg *leg)
{
  struct remote *r = leg->remote;
  struct nbdm *v = r->disk.volume;
  uint64_t end = req->offset + req->length;
  int rc = 0;

  LOCK_FOR_SCOPE (&v->lock);
  leg_count_locked (req, leg, true);
  if (req->long_zero && r->conn == leg->conn
      && long_zero_leave_locked (req, r, now_ns () - leg->began_ns))
    leg->cursor = end;
  else
    leg_plan_locked (req, leg);
  if (leg->nr == 0 && leg->cursor < end) {
    backlog_enter_relock (r, leg->conn, leg_kind (req, leg));
    leg->first = true;
    leg_plan_locked (req, leg);
    leg->first = false;
    backlog_leave_locked (r);
    if (leg->nr == 0 && leg->cursor < end && r->conn != leg->conn)
      rc = LEG_LOST;
  }
  return rc;
}

/* Count the leg before the request waits for another remote's backlog:
 * otherwise two requests could each wait for room that the other's answered
 * bytes take.
 */
static void
leg_answered (const struct request *req, struct leg *leg)
{
  struct nbdm *v = leg->remote->disk.volume;

  if (v->nr_remotes == 1)
    return; /* leg_account_locked does it */
  LOCK_FOR_SCOPE (&v->lock);
  leg_count_locked (req, leg, true);
}

/* Flush the bytes that the leg's remote has answered; 0 or LEG_LOST. */
static int
leg_flush (struct leg *leg)
{
  struct nbdm *v = leg->remote->disk.volume;
  struct remote_flush flush;
  int rc;

  remote_flush_begin (leg->remote, &flush);
  rc = remote_flush_end (&flush);
  /* The connection was lost and is back: the flush ran on another connection.
   */
  LOCK_FOR_SCOPE (&v->lock);
  if (leg->remote->conn != leg->conn)
    rc = LEG_LOST;
  return rc;
}

/* The last round was answered. */
static int
leg_end (const struct request *req, struct leg *leg)
{
  leg_answered (req, leg);
  return req->remote_fua && !conn_info (leg->conn)->can_fua ? leg_flush (leg)
                                                            : 0;
}

void
leg_finish (struct request *req, struct leg *leg)
{
  uint64_t end = req->offset + req->length;
  unsigned losses = 0;

  if (req->long_zero)
    leg->began_ns = now_ns ();
  for (;;) {
    int rc = leg_round (leg);
    if (rc == 0 && leg->cursor < end)
      rc = leg_next (req, leg);
    else if (rc == 0) {
      rc = leg_end (req, leg);
      if (rc == 0)
        return;
    }
    /* Mostly the second loss ends the loop, as the range is dirty by then; but
     * not if the remote is the only source of it.
     */
    if (rc == LEG_LOST)
      rc = leg_hold (req, leg, ++losses < MAX_LOSSES);
    if (rc < 0) {
      leg->result = rc;
      return;
    }
    leg_issue (leg);
  }
}

void
leg_secure (struct request *req, struct leg *leg)
{
  leg->result = leg_flush (leg);
  if (leg->result != LEG_LOST || leg_hold (req, leg, true) < 0)
    return;
  leg->result = 0;
  leg_issue (leg);
  leg_finish (req, leg);
}
