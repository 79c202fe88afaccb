/* SPDX-License-Identifier: BSD-3-Clause */

/* What the two halves of the plain transport share: plain_send.c, and
 * transport_plain.c, which receives the answers and explains both.
 */

#ifndef NBDM_PLAIN_H
#define NBDM_PLAIN_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "wire/conn.h"
#include "wire/protocol.h"

#define BATCH_COMMANDS 32u     /* at most, in one sendmsg */
#define INBOX_SIZE (64u << 10) /* bytes received with one recv */

/* A command that a sendmsg carries. */
struct batched {
  struct command *cmd;
  size_t size; /* its bytes that this sendmsg is to send */
};

struct plain {
  /* Under conn->lock. */
  struct command *unsent; /* the first not wholly sent; the rest are newer */
  size_t head_sent;       /* its bytes that have left */
  bool sending;           /* a thread is in sendmsg or enters it */
  uint64_t cookie;        /* the last one given */
  struct batched batch[BATCH_COMMANDS];
  unsigned nr_batched;

  atomic_bool full; /* the socket did not take all; written under conn->lock */
  atomic_uint
      nr_early; /* answers kept for later; only the poller adds to them */

  struct nbd_request requests[BATCH_COMMANDS]; /* of the thread that sends */

  /* The poller's. */
  struct command *filling; /* a read whose payload comes next */
  uint64_t filled;         /* bytes of it */
  size_t start, end;       /* of the bytes in the inbox */
  uint8_t inbox[INBOX_SIZE];
};

/* Members of plain_transport. */
int plain_issue (struct conn *conn, struct command *cmd, struct waiter *waiter);
void plain_push (struct conn *conn, const struct waiter *waiter);
uint64_t plain_unsent_of_oldest (const struct conn *conn);
bool plain_has_unsent (const struct conn *conn);
/* Why a call on the socket failed, for conn_kill. */
void plain_describe_loss (int err, char *why, size_t max);

#endif /* NBDM_PLAIN_H */
