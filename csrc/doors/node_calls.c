/* SPDX-License-Identifier: BSD-3-Clause */

/* What other nodes ask, and Python answers: the control thread takes a call
 * (nbdm_server_next_call), judges it, and answers it by its number.
 *
 * The session's own thread waits, and the call lies on its stack.  It waits in
 * poll, for its mailbox and for the end of its socket: so it notices at once
 * that the other node has left, or that the door needs its place.  Then it
 * takes its call back, and a late answer finds no one.
 *
 * There are never more calls than connections in the handshake, as a connection
 * makes one at a time and counts as one in the handshake until it has a claim
 * (direct_clients.c): so hostile nodes cannot use up memory.  When all places
 * are taken, the oldest call of the host with most of them gives way.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "api.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/lock.h"
#include "doors/direct.h"
#include "doors/direct_server.h"
#include "doors/node_calls.h"
#include "wire/mailbox.h"
#include "wire/tls_identity.h"
#include "wire/tls_secrets.h"

#define PATIENCE_MS 60000u /* a fence waits for a disk */
/* The other side asks an idle server after 4.5 s, and waits as long for the
 * answer (wire/silence.c).
 */
#define SILENCE_MS 9000u
#define MAX_MAPS 2u /* served at a time, 32 MiB each of a disk of 16 TiB */

void
node_calls_init (struct node_calls *calls, const struct nbdm_limits *limits)
{
  memset (calls, 0, sizeof *calls);
  pthread_mutex_init (&calls->lock, NULL);
  cond_init (&calls->come);
  cond_init (&calls->left);
  TAILQ_INIT (&calls->waiting);
  TAILQ_INIT (&calls->claims);
  TAILQ_INIT (&calls->ended);
  calls->patience_ns
      = (limits->call_ms ? limits->call_ms : PATIENCE_MS) * NS_PER_MS;
  calls->silence_ns
      = (limits->silence_ms ? limits->silence_ms : SILENCE_MS) * NS_PER_MS;
}

void
node_calls_destroy (struct node_calls *calls)
{
  claims_free (&calls->claims);
  claims_free (&calls->ended);
  pthread_cond_destroy (&calls->come);
  pthread_cond_destroy (&calls->left);
  pthread_mutex_destroy (&calls->lock);
}

void
node_calls_over (struct node_calls *calls)
{
  LOCK_FOR_SCOPE (&calls->lock);
  calls->over = true;
  pthread_cond_broadcast (&calls->come);
}

bool
node_calls_take_place (struct node_calls *calls)
{
  LOCK_FOR_SCOPE (&calls->lock);
  if (calls->nr_maps == MAX_MAPS)
    return false;
  calls->nr_maps++;
  return true;
}

void
node_calls_give_place (struct node_calls *calls)
{
  LOCK_FOR_SCOPE (&calls->lock);
  calls->nr_maps--;
}

/* --- The session's side -------------------------------------------------- */

static bool
is_answered (struct node_calls *calls, const struct node_call *call)
{
  LOCK_FOR_SCOPE (&calls->lock);
  return call->answered;
}

/* False: the answer came first. */
static bool
take_back (struct node_calls *calls, struct node_call *call)
{
  LOCK_FOR_SCOPE (&calls->lock);
  if (call->answered)
    return false;
  TAILQ_REMOVE (&calls->waiting, call, entry);
  call->answered = true;
  return true;
}

static int
await (struct session *s, struct node_calls *calls, struct node_call *call)
{
  struct pollfd fd = { .fd = s->fd, .events = POLLRDHUP };
  uint64_t until = now_ns () + calls->patience_ns;

  while (!is_answered (calls, call)) {
    uint64_t now = now_ns ();

    if (now >= until && take_back (calls, call)) {
      call->rc = -ETIMEDOUT;
      return 0;
    }
    if (now >= until)
      return 0;
    lane_poll (&s->lane, &fd, (int)((until - now) / NS_PER_MS) + 1);
    lane_take (&s->lane);
    if (fd.revents && take_back (calls, call))
      return -ECONNRESET;
  }
  return 0;
}

int
node_calls_ask (struct session *s, struct node_call *call)
{
  struct node_calls *calls = direct_calls (s->server);

  pthread_mutex_lock (&calls->lock);
  call->session = s;
  call->number = ++calls->numbers;
  TAILQ_INSERT_TAIL (&calls->waiting, call, entry);
  pthread_cond_signal (&calls->come);
  pthread_mutex_unlock (&calls->lock);
  return await (s, calls, call);
}

/* --- The control thread's ------------------------------------------------ */

static bool
next_locked (struct node_calls *calls, struct nbdm_call *out)
{
  struct node_call *call;

  if (claims_report_locked (calls, out))
    return true;
  TAILQ_FOREACH (call, &calls->waiting, entry)
    if (!call->taken)
      break;
  if (call == NULL)
    return false;
  call->taken = true;
  out->number = call->number;
  out->kind = call->kind;
  out->clean = 0;
  out->size = call->size;
  if (call->size > 0)
    memcpy (out->words, call->words, call->size);
  return true;
}

int
nbdm_server_next_call (struct direct_server *server, struct nbdm_call *call,
                       uint32_t timeout_ms)
{
  struct node_calls *calls = direct_calls (server);
  uint64_t until = now_ns () + timeout_ms * NS_PER_MS;

  LOCK_FOR_SCOPE (&calls->lock);
  while (!next_locked (calls, call)) {
    if (calls->over)
      return set_message (-ESHUTDOWN, "the server has ended");
    if (!wait_until (&calls->come, &calls->lock, until))
      return set_message (-EAGAIN, "no node called in %u ms", timeout_ms);
  }
  return 0;
}

int
nbdm_server_next_ended (struct direct_server *server, struct nbdm_call *call)
{
  struct node_calls *calls = direct_calls (server);

  LOCK_FOR_SCOPE (&calls->lock);
  return claims_report_locked (calls, call)
             ? 0
             : set_message (-EAGAIN, "no session has ended");
}

static struct node_call *
find_locked (struct node_calls *calls, uint64_t number)
{
  struct node_call *call;

  TAILQ_FOREACH (call, &calls->waiting, entry)
    if (call->number == number && call->taken)
      break;
  return call;
}

static int
check_size (const struct node_call *call, int rc, uint64_t size)
{
  uint64_t most = rc < 0                          ? NBDM_TEXT_LEN - 1
                  : call->kind == NBDM_CALL_META  ? NBDM_CALL_LEN
                  : call->kind == NBDM_CALL_DIRTY ? UINT32_MAX
                                                  : 0;

  if (size <= most)
    return 0;
  return set_message (-EINVAL, "an answer of %llu bytes: at most %llu go",
                      (unsigned long long)size, (unsigned long long)most);
}

static void
end_locked (struct node_calls *calls, struct node_call *call, int rc,
            void *bytes, uint64_t size)
{
  TAILQ_REMOVE (&calls->waiting, call, entry);
  call->rc = rc;
  call->bytes = bytes;
  call->nr_bytes = (uint32_t)size;
  call->answered = true;
  mailbox_ring (call->session->lane.watch.box);
}

/* The session's thread waits meanwhile, and so nothing changes its stream. */
int
nbdm_server_proves (struct direct_server *server, uint64_t number,
                    const char *const *names, uint32_t nr_names)
{
  struct node_calls *calls = direct_calls (server);
  const struct node_call *call;
  char has[NBDM_TEXT_LEN / 2];

  LOCK_FOR_SCOPE (&calls->lock);
  call = find_locked (calls, number);
  if (call == NULL)
    return set_message (-ENOENT, "the calling node has left");
  if (call->session->secrets == NULL || call->session->secrets->x509 == NULL
      || tls_is_of (&call->session->stream, names, nr_names))
    return 1;
  tls_describe (&call->session->stream, has, sizeof has);
  return set_message (0, "%s", has[0] ? has : "none");
}

/* Takes the bytes over, unless -EINVAL. */
static int
answer_locked (struct node_calls *calls, uint64_t number, int rc, void *bytes,
               uint64_t size)
{
  struct node_call *call = find_locked (calls, number);
  int joined = 0;

  if (call == NULL) {
    free (bytes);
    return set_message (-ENOENT, "no node waits for this answer any more");
  }
  if (check_size (call, rc, size) < 0)
    return -EINVAL;
  if (rc == 0 && call->kind == NBDM_CALL_CLAIM)
    joined = claims_join_locked (calls, call->session, call->words, call->size,
                                 number);
  end_locked (calls, call, joined < 0 ? joined : rc, bytes, size);
  return joined;
}

int
nbdm_server_answer (struct direct_server *server, uint64_t number, int rc,
                    const void *bytes, uint64_t size)
{
  struct node_calls *calls = direct_calls (server);
  void *copy = NULL;

  if (rc > 0)
    return set_message (-EINVAL, "an answer is 0 or -errno");
  if (size > 0) {
    copy = malloc (size);
    if (copy == NULL)
      return set_error (-ENOMEM, "an answer");
    memcpy (copy, bytes, size);
  }
  pthread_mutex_lock (&calls->lock);
  rc = answer_locked (calls, number, rc, copy, size);
  pthread_mutex_unlock (&calls->lock);
  mailbox_ring_all ();
  if (rc == -EINVAL)
    free (copy);
  return rc;
}
