/* SPDX-License-Identifier: BSD-3-Clause */

/* What nbd_peer.c and nbd_peer_session.c share: see nbd_peer.h. */

#ifndef NBDM_NBD_PEER_SESSION_H
#define NBDM_NBD_PEER_SESSION_H

#include <pthread.h>
#include <stdatomic.h>
#include <sys/un.h>

#include "nbd_peer.h"

/* A command that waits in the queue of its connection, or came late. */
struct item {
  struct item *next;
  struct peer_command cmd;
  bool applied;
};

struct session {
  struct peer *peer;
  struct session *next;
  int fd;
  bool ended;
  struct item *queue;
  unsigned nr;
};

struct peer {
  struct peer_params params;
  char socket[sizeof ((struct sockaddr_un *)0)->sun_path];
  int listener;
  pthread_t acceptor;
  atomic_bool fails_reads;

  pthread_mutex_t lock; /* all below, and the images' change */
  pthread_cond_t changed;
  uint8_t *image, *flushed;
  uint8_t *unflushed; /* a byte a sector */
  enum peer_hold hold;
  bool hold_flushes, hold_writes;
  unsigned flush_ms;
  uint64_t flush_rate;
  /* How many flushes are let through although `hold_flushes` is set. */
  unsigned may_apply, may_answer;
  bool stopping, keep;
  uint64_t random;
  struct session *sessions;
  struct item *late;
};

/* Carry out a command, in the time that the disk takes. */
void peer_apply (struct peer *peer, const struct peer_command *cmd);
void peer_item_free (struct item *item);
/* Serve one connection, a struct session, until it ends: a thread's main. */
void *peer_serve (void *session);

#endif /* NBDM_NBD_PEER_SESSION_H */
