/* SPDX-License-Identifier: BSD-3-Clause */

/* The questions of other nodes, and their answers.  See node_calls.c. */

#ifndef NBDM_NODE_CALLS_H
#define NBDM_NODE_CALLS_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/queue.h>

#include "api.h"
#include "doors/claims.h"

struct nbdm_limits;
struct session;

/* On the stack of the session's thread, which waits for the answer. */
struct node_call {
  uint32_t kind; /* enum nbdm_call_kind, and what goes with it */
  const void *words;
  uint32_t size;

  /* The answer; the bytes are the waiting thread's. */
  int rc;
  void *bytes;
  uint32_t nr_bytes;

  /* Under the lock. */
  struct session *session;
  uint64_t number;
  bool taken, answered;
  TAILQ_ENTRY (node_call) entry;
};

struct node_calls {
  pthread_mutex_t lock; /* protects all below; no other is taken under it */
  pthread_cond_t come;  /* a call, an ended session, or the end */
  pthread_cond_t left;  /* a cut connection is gone */
  TAILQ_HEAD (, node_call) waiting; /* not answered, the oldest first */
  struct claims claims, ended;
  uint64_t numbers;
  uint64_t patience_ns, silence_ns; /* set once */
  uint32_t nr_maps;
  uint32_t nr_cut; /* connections that a fence waits for */
  bool over;
};

void node_calls_init (struct node_calls *calls,
                      const struct nbdm_limits *limits);
void node_calls_destroy (struct node_calls *calls);
/* No session is left: nbdm_server_next_call ends once it has reported all. */
void node_calls_over (struct node_calls *calls);
/* Let the control thread judge, and wait for its answer: 0, with call->rc and
 * bytes that the caller frees; -ECONNRESET: the other node has left, or the
 * session was ended.  Only the session's thread calls it.
 */
int node_calls_ask (struct session *session, struct node_call *call);

/* Another map may be served; false: too many are already. */
bool node_calls_take_place (struct node_calls *calls);
void node_calls_give_place (struct node_calls *calls);

#endif /* NBDM_NODE_CALLS_H */
