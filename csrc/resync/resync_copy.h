/* SPDX-License-Identifier: BSD-3-Clause */

/* The interface between resync.c, which orders a remote's copies and flushes,
 * and resync_copy.c, which does the copies.  Only the calling thread uses it;
 * functions named `_locked` need volume->lock.
 */

#ifndef NBDM_RESYNC_COPY_H
#define NBDM_RESYNC_COPY_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/queue.h>

#include "logs/rangelock.h"
#include "resync/resync_call.h"
#include "volume/backlog.h"
#include "volume/flush.h"
#include "volume/volume.h"
#include "wire/conn.h"

struct conn;

/* Of a hole in one copy.  The range is held until the remote has zeroed it, so
 * its length depends on how quickly the remote zeroes: a sparse image of 100
 * GiB in hundreds of commands, a disk that writes its zeroes in 32 MiB.
 */
#define RESYNC_MIN_HOLE (32u << 20)

struct copy {
  struct range range;
  pthread_cond_t granted;
  bool hole;
  uint64_t zero_bytes; /* of the range, sent as zeroes */
  bool was_late;       /* before: its answer says nothing of the late command */
  int error;           /* -errno of commands already answered */
  uint8_t *buf;
  unsigned nr;
  struct command commands[RESYNC_COPY_COMMANDS];
  uint64_t uncounted[BACKLOG_KINDS]; /* bytes sent, see backlog.c */
  struct waiter waiter;
  uint64_t sent_ns;
  TAILQ_ENTRY (copy) link; /* of those under way, or of the idle ones */
};

struct run {
  uint64_t first, count; /* regions */
};

struct runs {
  struct run *list;
  size_t nr, max;
};

/* A call that copies to a remote. */
struct batch {
  struct resync_call call; /* first */
  struct remote *remote;   /* the target */
  struct conn *conn;
  uint64_t hole_bytes;
  uint64_t answer_ns; /* the shortest time of a copy, data or zeroes */
  size_t buf_size;
  struct copy *copies;
  /* The one used last first: its buffer is in the cache. */
  TAILQ_HEAD (, copy) idle;
  TAILQ_HEAD (, copy) busy; /* under way, in the order they were sent */
  uint32_t nr_busy;
  struct runs copied;   /* answered, no flush begun since */
  struct runs flushing; /* answered before `flush` began */
  struct remote_flush flush;
  bool flush_begun;
};

/* The next run of regions to copy, at most as long as a hole may be; false:
 * there is none.
 */
bool resync_find_run_locked (struct batch *b, struct run *run);
/* Cut the run to one copy, a hole in whole regions, or data.  Blocks as long
 * as the local disk takes to tell holes.
 */
void resync_size_copy (struct batch *b, struct copy *copy, struct run *run);
/* Take room for `wanted` bytes or less in the remote's backlog: how much, or 0:
 * there is none.  The other one waits for it: the caller may hold its copy's
 * range, and has no command of that copy under way.
 */
uint64_t resync_try_room (struct batch *b, enum backlog_kind kind,
                          uint64_t wanted);
uint64_t resync_take_room (struct batch *b, enum backlog_kind kind,
                           uint64_t wanted);
/* 1: held; 0: others, or a flush, are under way, end them first; -errno. */
int resync_lock_copy (struct batch *b, struct copy *copy);
/* With the range held: read and send.  -EAGAIN: it is no hole any more.
 * -errno: no disk has it to read.  Either gives the range back.
 */
int resync_send_copy (struct batch *b, struct copy *copy);
/* Wait for the answers: the regions are `copied`, the range is free. */
int resync_end_copy (struct batch *b, struct copy *copy);

#endif /* NBDM_RESYNC_COPY_H */
