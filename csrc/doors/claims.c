/* SPDX-License-Identifier: BSD-3-Clause */

/* Which connections may write to this node's disk, and their end.
 *
 * Invariant: after nbdm_server_fence has returned a count, no request of a
 * connection that it cut changes the disk, ever.
 *
 * The session's own thread is the only one that submits its requests.  At the
 * end it waits until all of them have ended, and then calls claims_leave.  So a
 * fence marks the sessions and waits until they have left.  It need not know
 * where a request is: in the socket, received in part, in a worker's queue or
 * at the disk.  A request that the thread has received in full may still be
 * carried out, before the fence returns.
 *
 * A session gets its claim with the answer itself, under the lock, and not when
 * its thread next runs.  So a fence that comes right after the answer finds it.
 *
 * A claim is over as soon as one of its connections is lost: the other node
 * must not send a request of that connection again on another one.  The others
 * are cut then.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "api.h"
#include "base/clock.h"
#include "base/error.h"
#include "doors/claims.h"
#include "doors/direct.h"
#include "doors/direct_server.h"
#include "doors/node_calls.h"
#include "wire/mailbox.h"

void
claims_free (struct claims *claims)
{
  struct claim *claim;

  while ((claim = TAILQ_FIRST (claims))) {
    TAILQ_REMOVE (claims, claim, entry);
    free (claim);
  }
}

static struct claim *
find (struct claims *claims, const void *name, size_t size)
{
  struct claim *claim;

  TAILQ_FOREACH (claim, claims, entry)
    if (claim->size == size && memcmp (claim->name, name, size) == 0)
      break;
  return claim;
}

static struct claim *
add_locked (struct node_calls *calls, const void *name, size_t size)
{
  struct claim *claim = calloc (1, sizeof *claim + size);

  if (claim == NULL)
    return NULL;
  claim->size = size;
  memcpy (claim->name, name, size);
  TAILQ_INIT (&claim->sessions);
  TAILQ_INSERT_TAIL (&calls->claims, claim, entry);
  return claim;
}

int
claims_join_locked (struct node_calls *calls, struct session *s,
                    const void *name, size_t size, uint64_t number)
{
  struct claim *claim = find (&calls->claims, name, size);

  if ((claim && claim->broken) || find (&calls->ended, name, size))
    return set_message (-ESTALE, "a connection of this session has ended: "
                                 "claim a higher session");
  if (claim == NULL)
    claim = add_locked (calls, name, size);
  if (claim == NULL)
    return set_error (-ENOMEM, "a claim");
  s->claim = claim;
  s->call = number;
  TAILQ_INSERT_TAIL (&claim->sessions, s, of_claim);
  return 0;
}

/* Its thread takes in no more requests, and its answers are dropped. */
static void
cut_locked (struct node_calls *calls, struct session *s)
{
  if (s->cut)
    return;
  s->cut = true;
  calls->nr_cut++;
  atomic_store (&s->ending, true);
  (void)shutdown (s->fd, SHUT_RDWR);
  mailbox_ring (s->lane.watch.box);
}

static void
leave_locked (struct node_calls *calls, struct session *s, bool clean)
{
  struct claim *claim = s->claim;
  struct session *other;

  TAILQ_REMOVE (&claim->sessions, s, of_claim);
  s->claim = NULL;
  if (s->cut) {
    calls->nr_cut--;
    pthread_cond_broadcast (&calls->left);
  }
  claim->broken = true;
  claim->unclean |= !clean;
  if (!clean)
    TAILQ_FOREACH (other, &claim->sessions, of_claim)
      cut_locked (calls, other);
  if (TAILQ_EMPTY (&claim->sessions)) {
    TAILQ_REMOVE (&calls->claims, claim, entry);
    TAILQ_INSERT_TAIL (&calls->ended, claim, entry);
    pthread_cond_broadcast (&calls->come);
  }
}

void
claims_leave (struct session *s, bool clean)
{
  struct node_calls *calls = direct_calls (s->server);

  pthread_mutex_lock (&calls->lock);
  if (s->claim)
    leave_locked (calls, s, clean);
  pthread_mutex_unlock (&calls->lock);
  mailbox_ring_all ();
}

bool
claims_report_locked (struct node_calls *calls, struct nbdm_call *call)
{
  struct claim *claim = TAILQ_FIRST (&calls->ended);

  if (claim == NULL)
    return false;
  call->number = ++calls->numbers;
  call->kind = NBDM_CALL_SESSION_ENDED;
  call->clean = !claim->unclean;
  call->size = (uint32_t)claim->size;
  memcpy (call->words, claim->name, claim->size);
  TAILQ_REMOVE (&calls->ended, claim, entry);
  free (claim);
  return true;
}

/* --- The fence ----------------------------------------------------------- */

static int
cut_all_locked (struct node_calls *calls, uint64_t keep_call)
{
  struct claim *claim;
  struct session *s;
  int nr = 0;

  TAILQ_FOREACH (claim, &calls->claims, entry)
    TAILQ_FOREACH (s, &claim->sessions, of_claim)
      if (keep_call == 0 || s->call != keep_call) {
        cut_locked (calls, s);
        nr++;
      }
  return nr;
}

static int
fence (struct node_calls *calls, uint64_t keep_call, uint64_t until_ns)
{
  int nr;

  pthread_mutex_lock (&calls->lock);
  nr = cut_all_locked (calls, keep_call);
  pthread_mutex_unlock (&calls->lock);
  mailbox_ring_all ();
  pthread_mutex_lock (&calls->lock);
  while (calls->nr_cut > 0 && wait_until (&calls->left, &calls->lock, until_ns))
    ;
  if (calls->nr_cut > 0)
    nr = -ETIMEDOUT;
  pthread_mutex_unlock (&calls->lock);
  return nr;
}

int
nbdm_server_fence (struct direct_server *server, uint64_t keep_call,
                   uint32_t timeout_ms)
{
  uint64_t until = now_ns () + timeout_ms * NS_PER_MS;
  int nr = fence (direct_calls (server), keep_call, until);

  if (nr == -ETIMEDOUT)
    return set_message (nr,
                        "requests of an earlier session are still at the disk "
                        "after %u ms",
                        timeout_ms);
  return nr;
}
