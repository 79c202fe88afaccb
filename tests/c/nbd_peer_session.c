/* SPDX-License-Identifier: BSD-3-Clause */

/* The connections of the server in nbd_peer.h: each has one thread, and with
 * `shuffle` a second one, which takes commands off the queue in any order.
 */

#define _GNU_SOURCE

#undef NDEBUG
#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "nbd_peer_session.h"
#include "nbd_wire.h"

#define MAX_QUEUE 64

/* --- applying and answering ------------------------------------------ */

static void
flush_locked (struct peer *peer, uint64_t offset, uint64_t length)
{
  for (uint64_t s = offset / PEER_SECTOR; s * PEER_SECTOR < offset + length;
       s++)
    if (peer->unflushed[s]) {
      memcpy (peer->flushed + s * PEER_SECTOR, peer->image + s * PEER_SECTOR,
              PEER_SECTOR);
      peer->unflushed[s] = 0;
    }
}

static void
apply_locked (struct peer *peer, const struct peer_command *cmd)
{
  uint8_t *bytes = peer->image + cmd->offset;

  switch (cmd->type) {
  case PEER_READ:
    memcpy (cmd->data, bytes, cmd->length);
    return;
  case PEER_FLUSH:
    flush_locked (peer, 0, peer->params.size);
    return;
  case PEER_WRITE:
    memcpy (bytes, cmd->data, cmd->length);
    break;
  default:
    memset (bytes, 0, cmd->length);
    break;
  }
  memset (peer->unflushed + cmd->offset / PEER_SECTOR, 1,
          cmd->length / PEER_SECTOR);
  if (cmd->fua)
    flush_locked (peer, cmd->offset, cmd->length);
}

/* Wait as long as the disk needs for the flush or the FUA write. */
static void
take_time (struct peer *peer, const struct peer_command *cmd)
{
  uint64_t bytes = 0, ms;

  pthread_mutex_lock (&peer->lock);
  ms = peer->flush_ms;
  if (peer->flush_rate > 0) {
    for (uint64_t s = 0; s < peer->params.size / PEER_SECTOR; s++)
      bytes += peer->unflushed[s] ? PEER_SECTOR : 0;
    bytes = cmd->type == PEER_FLUSH ? bytes : cmd->length;
    ms += bytes * 1000 / peer->flush_rate;
  }
  pthread_mutex_unlock (&peer->lock);
  if (ms > 0)
    poll (NULL, 0, (int)ms);
}

void
peer_apply (struct peer *peer, const struct peer_command *cmd)
{
  const struct peer_params *p = &peer->params;

  if (cmd->type == PEER_FLUSH || cmd->fua)
    take_time (peer, cmd);
  if (cmd->type == PEER_ZERO && p->refuse_zeroes)
    return;
  if (cmd->type == PEER_ZERO && p->zero_bytes_per_ms)
    poll (NULL, 0, (int)(cmd->length / p->zero_bytes_per_ms));
  if (p->enter)
    p->enter (p->opaque);
  pthread_mutex_lock (&peer->lock);
  apply_locked (peer, cmd);
  pthread_mutex_unlock (&peer->lock);
  if (p->applied)
    p->applied (p->opaque, cmd);
  if (p->leave)
    p->leave (p->opaque);
}

/* False: the connection is over. */
static bool
wait_for (struct session *s, enum peer_hold below)
{
  struct peer *peer = s->peer;
  bool go;

  pthread_mutex_lock (&peer->lock);
  while (peer->hold >= below && !s->ended)
    pthread_cond_wait (&peer->changed, &peer->lock);
  go = !s->ended;
  pthread_mutex_unlock (&peer->lock);
  return go;
}

static uint32_t
error_of (struct peer *peer, const struct peer_command *cmd)
{
  if (cmd->type == PEER_READ && atomic_load (&peer->fails_reads))
    return EIO;
  return cmd->type == PEER_ZERO ? peer->params.refuse_zeroes : 0;
}

static bool
answer (struct session *s, const struct peer_command *cmd)
{
  uint32_t error = error_of (s->peer, cmd);
  const struct wire_reply reply = { .magic = htobe32 (REPLY_MAGIC),
                                    .error = htobe32 (error),
                                    .cookie = cmd->cookie };

  return wait_for (s, PEER_HOLD_ANSWERS)
         && wire_transmit (s->fd, &reply, sizeof reply)
         && (cmd->type != PEER_READ || error
             || wire_transmit (s->fd, cmd->data, cmd->length));
}

void
peer_item_free (struct item *item)
{
  free (item->cmd.data);
  free (item);
}

/* --- connections ----------------------------------------------------- */

static struct item *
receive_item (struct session *s)
{
  struct wire_request request;
  struct item *item;

  if (!wire_receive (s->fd, &request, sizeof request)
      || be16toh (request.type) == TYPE_DISCONNECT)
    return NULL;
  assert (request.magic == htobe32 (REQUEST_MAGIC));
  item = calloc (1, sizeof *item);
  assert (item);
  item->cmd = (struct peer_command){
    .type = be16toh (request.type),
    .fua = be16toh (request.flags) & FLAG_FUA,
    .cookie = request.cookie,
    .offset = be64toh (request.offset),
    .length = be32toh (request.length),
  };
  assert (item->cmd.offset <= s->peer->params.size
          && item->cmd.length <= s->peer->params.size - item->cmd.offset);
  assert (item->cmd.offset % PEER_SECTOR == 0
          && item->cmd.length % PEER_SECTOR == 0);
  if (item->cmd.type == PEER_READ || item->cmd.type == PEER_WRITE) {
    item->cmd.data = malloc (item->cmd.length);
    assert (item->cmd.data);
  }
  if (item->cmd.type == PEER_WRITE
      && !wire_receive (s->fd, item->cmd.data, item->cmd.length)) {
    peer_item_free (item);
    return NULL;
  }
  return item;
}

/* Take the n-th item out of the queue. */
static struct item *
take_locked (struct session *s, unsigned n)
{
  struct item **p = &s->queue;

  while (n-- > 0)
    p = &(*p)->next;
  struct item *item = *p;
  *p = item->next;
  s->nr--;
  return item;
}

static void
put_locked (struct session *s, struct item *item)
{
  item->next = s->queue;
  s->queue = item;
  s->nr++;
  pthread_cond_broadcast (&s->peer->changed);
}

/* A write that the test wants to wait, or a flush, or the answer to one? */
static bool
is_held_locked (struct peer *peer, const struct item *item)
{
  unsigned *left = item->applied ? &peer->may_answer : &peer->may_apply;

  if (peer->hold_writes && item->cmd.type == PEER_WRITE && !item->applied)
    return true;
  if (!peer->hold_flushes || item->cmd.type != PEER_FLUSH)
    return false;
  if (*left == 0)
    return true;
  --*left;
  return false;
}

/* Take any command of the queue; NULL when the connection has ended. */
static struct item *
next_item (struct session *s, bool *later)
{
  struct peer *peer = s->peer;
  struct item *item = NULL;
  uint64_t dice;

  pthread_mutex_lock (&peer->lock);
  while (!s->ended && (s->nr == 0 || peer->hold == PEER_HOLD_ALL))
    pthread_cond_wait (&peer->changed, &peer->lock);
  dice = peer_random (&peer->random);
  if (!s->ended && s->nr < 4 && dice % 4 == 0) {
    /* Let more come, so that there is something to choose from. */
    pthread_mutex_unlock (&peer->lock);
    if (dice % 256 == 0)
      poll (NULL, 0, 1);
    else
      sched_yield ();
    pthread_mutex_lock (&peer->lock);
  }
  if (!s->ended)
    item = take_locked (s, (unsigned)(dice >> 32) % s->nr);
  while (item && is_held_locked (peer, item)) {
    put_locked (s, item);
    item = NULL;
    pthread_mutex_unlock (&peer->lock);
    poll (NULL, 0, 1);
    pthread_mutex_lock (&peer->lock);
    if (!s->ended)
      item = take_locked (s, (unsigned)dice++ % s->nr);
  }
  *later = (dice >> 8 & 1)
           || (item && peer->hold_flushes && item->cmd.type == PEER_FLUSH);
  pthread_mutex_unlock (&peer->lock);
  return item;
}

static void *
shuffler (void *opaque)
{
  struct session *s = opaque;
  struct item *item;
  bool later;

  peer_thread = true;
  while ((item = next_item (s, &later)) != NULL) {
    if (!item->applied) {
      peer_apply (s->peer, &item->cmd);
      item->applied = true;
      if (later) {
        pthread_mutex_lock (&s->peer->lock);
        put_locked (s, item);
        pthread_mutex_unlock (&s->peer->lock);
        continue;
      }
    }
    if (!answer (s, &item->cmd))
      shutdown (s->fd, SHUT_RDWR);
    peer_item_free (item);
  }
  return NULL;
}

static void
end_session (struct session *s)
{
  struct peer *peer = s->peer;
  struct session **p = &peer->sessions;

  pthread_mutex_lock (&peer->lock);
  while (s->nr > 0) {
    struct item *item = take_locked (s, 0);

    if (item->applied || !peer->keep || item->cmd.type == PEER_READ
        || item->cmd.type == PEER_FLUSH)
      peer_item_free (item);
    else {
      item->next = peer->late;
      peer->late = item;
    }
  }
  while (*p != s)
    p = &(*p)->next;
  *p = s->next;
  close (s->fd);
  pthread_cond_broadcast (&peer->changed);
  pthread_mutex_unlock (&peer->lock);
  free (s);
}

static void
serve_in_order (struct session *s)
{
  struct item *item;
  bool go = true;

  while (go && (item = receive_item (s)) != NULL) {
    go = wait_for (s, item->cmd.type == PEER_FLUSH ? PEER_HOLD_FLUSHES
                                                   : PEER_HOLD_ALL);
    if (go) {
      peer_apply (s->peer, &item->cmd);
      go = answer (s, &item->cmd);
    }
    peer_item_free (item);
  }
}

static void
serve_shuffled (struct session *s)
{
  struct peer *peer = s->peer;
  struct item *item;
  pthread_t worker;

  assert (pthread_create (&worker, NULL, shuffler, s) == 0);
  while ((item = receive_item (s)) != NULL) {
    pthread_mutex_lock (&peer->lock);
    while (s->nr == MAX_QUEUE && !s->ended)
      pthread_cond_wait (&peer->changed, &peer->lock);
    put_locked (s, item);
    pthread_mutex_unlock (&peer->lock);
  }
  pthread_mutex_lock (&peer->lock);
  s->ended = true;
  pthread_cond_broadcast (&peer->changed);
  pthread_mutex_unlock (&peer->lock);
  pthread_join (worker, NULL);
}

void *
peer_serve (void *opaque)
{
  struct session *s = opaque;

  peer_thread = true;
  if (wire_handshake_plain (s->fd, s->peer->params.size, s->peer->params.no_fua,
                            s->peer->params.no_zeroes)) {
    if (s->peer->params.shuffle)
      serve_shuffled (s);
    else
      serve_in_order (s);
  }
  end_session (s);
  return NULL;
}
