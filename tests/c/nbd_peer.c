/* SPDX-License-Identifier: BSD-3-Clause */

/* What a test has the server do: see nbd_peer.h. */

#define _GNU_SOURCE

#undef NDEBUG
#include <assert.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "nbd_peer_session.h"

_Thread_local bool peer_thread;

uint64_t
peer_random (uint64_t *state)
{
  *state ^= *state >> 12;
  *state ^= *state << 25;
  *state ^= *state >> 27;
  return *state * UINT64_C (0x2545f4914f6cdd1d);
}

static void *
acceptor (void *opaque)
{
  struct peer *peer = opaque;
  int fd;

  peer_thread = true;
  while ((fd = accept4 (peer->listener, NULL, NULL, SOCK_CLOEXEC)) >= 0) {
    struct session *s = calloc (1, sizeof *s);
    pthread_t thread;

    assert (s);
    s->peer = peer;
    s->fd = fd;
    pthread_mutex_lock (&peer->lock);
    s->next = peer->sessions;
    peer->sessions = s;
    s->ended = peer->stopping;
    pthread_mutex_unlock (&peer->lock);
    assert (pthread_create (&thread, NULL, peer_serve, s) == 0);
    pthread_detach (thread);
  }
  return NULL;
}

static uint8_t *
zeroes (uint64_t size)
{
  void *p = mmap (NULL, size, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

  assert (p != MAP_FAILED);
  return p;
}

struct peer *
peer_start (const struct peer_params *params)
{
  struct sockaddr_un address = { .sun_family = AF_UNIX };
  struct peer *peer = calloc (1, sizeof *peer);

  assert (peer && params->size % PEER_SECTOR == 0);
  peer->params = *params;
  peer->random = params->seed | 1;
  snprintf (peer->socket, sizeof peer->socket, "%s", params->socket);
  peer->params.socket = peer->socket;
  pthread_mutex_init (&peer->lock, NULL);
  pthread_cond_init (&peer->changed, NULL);
  peer->image = zeroes (params->size);
  peer->flushed = zeroes (params->size);
  peer->unflushed = zeroes (params->size / PEER_SECTOR);
  memcpy (address.sun_path, peer->socket, sizeof address.sun_path);
  peer->listener = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  assert (peer->listener >= 0);
  assert (bind (peer->listener, (struct sockaddr *)&address, sizeof address)
          == 0);
  assert (listen (peer->listener, 8) == 0);
  assert (pthread_create (&peer->acceptor, NULL, acceptor, peer) == 0);
  return peer;
}

uint8_t *
peer_image (struct peer *peer)
{
  return peer->image;
}

void
peer_put (struct peer *peer, const uint8_t *bytes)
{
  pthread_mutex_lock (&peer->lock);
  memcpy (peer->image, bytes, peer->params.size);
  memcpy (peer->flushed, bytes, peer->params.size);
  memset (peer->unflushed, 0, peer->params.size / PEER_SECTOR);
  pthread_mutex_unlock (&peer->lock);
}

void
peer_cut (struct peer *peer, bool keep)
{
  pthread_mutex_lock (&peer->lock);
  peer->keep = keep;
  for (struct session *s = peer->sessions; s; s = s->next) {
    s->ended = true;
    shutdown (s->fd, SHUT_RDWR);
  }
  pthread_cond_broadcast (&peer->changed);
  while (peer->sessions)
    pthread_cond_wait (&peer->changed, &peer->lock);
  peer->keep = false;
  pthread_mutex_unlock (&peer->lock);
}

unsigned
peer_apply_late (struct peer *peer)
{
  struct item *item;
  unsigned n = 0;

  pthread_mutex_lock (&peer->lock);
  while (peer->sessions && peer->sessions->next)
    pthread_cond_wait (&peer->changed, &peer->lock);
  pthread_mutex_unlock (&peer->lock);
  for (;;) {
    pthread_mutex_lock (&peer->lock);
    struct item **p = &peer->late;
    while (*p && (*p)->next && peer_random (&peer->random) % 2)
      p = &(*p)->next;
    item = *p;
    if (item)
      *p = item->next;
    pthread_mutex_unlock (&peer->lock);
    if (item == NULL)
      return n;
    peer_apply (peer, &item->cmd);
    peer_item_free (item);
    n++;
  }
}

static void
forget_late (struct peer *peer)
{
  while (peer->late) {
    struct item *item = peer->late;
    peer->late = item->next;
    peer_item_free (item);
  }
}

void
peer_lose_power (struct peer *peer, enum peer_loss loss)
{
  peer_cut (peer, false);
  pthread_mutex_lock (&peer->lock);
  forget_late (peer);
  for (uint64_t s = 0; s < peer->params.size / PEER_SECTOR; s++) {
    if (!peer->unflushed[s])
      continue;
    if (loss == PEER_LOSE_ALL
        || (loss == PEER_LOSE_SOME && peer_random (&peer->random) % 2))
      memcpy (peer->image + s * PEER_SECTOR, peer->flushed + s * PEER_SECTOR,
              PEER_SECTOR);
    else
      memcpy (peer->flushed + s * PEER_SECTOR, peer->image + s * PEER_SECTOR,
              PEER_SECTOR);
    peer->unflushed[s] = 0;
  }
  pthread_mutex_unlock (&peer->lock);
}

void
peer_hold (struct peer *peer, enum peer_hold hold)
{
  pthread_mutex_lock (&peer->lock);
  peer->hold = hold;
  pthread_cond_broadcast (&peer->changed);
  pthread_mutex_unlock (&peer->lock);
}

void
peer_hold_flushes (struct peer *peer, bool hold)
{
  pthread_mutex_lock (&peer->lock);
  peer->hold_flushes = hold;
  peer->may_apply = 1;
  peer->may_answer = 0;
  pthread_mutex_unlock (&peer->lock);
}

void
peer_hold_writes (struct peer *peer, bool hold)
{
  pthread_mutex_lock (&peer->lock);
  peer->hold_writes = hold;
  pthread_mutex_unlock (&peer->lock);
}

void
peer_fail_reads (struct peer *peer)
{
  atomic_store (&peer->fails_reads, true);
}

void
peer_answer_flush (struct peer *peer)
{
  pthread_mutex_lock (&peer->lock);
  peer->may_answer++;
  pthread_mutex_unlock (&peer->lock);
}

void
peer_slow_flushes (struct peer *peer, unsigned ms, uint64_t bytes_per_s)
{
  pthread_mutex_lock (&peer->lock);
  peer->flush_ms = ms;
  peer->flush_rate = bytes_per_s;
  pthread_mutex_unlock (&peer->lock);
}

void
peer_stop (struct peer *peer)
{
  pthread_mutex_lock (&peer->lock);
  peer->stopping = true;
  pthread_mutex_unlock (&peer->lock);
  shutdown (peer->listener, SHUT_RDWR);
  pthread_join (peer->acceptor, NULL);
  close (peer->listener);
  peer_cut (peer, false);
  forget_late (peer);
  unlink (peer->socket);
  munmap (peer->image, peer->params.size);
  munmap (peer->flushed, peer->params.size);
  munmap (peer->unflushed, peer->params.size / PEER_SECTOR);
  pthread_mutex_destroy (&peer->lock);
  pthread_cond_destroy (&peer->changed);
  free (peer);
}
