/* SPDX-License-Identifier: BSD-3-Clause */

/* The interface between resync.c, which orders a remote's copies and flushes,
 * and resync_copy.c, which makes the copies.  Only the calling thread uses it.
 * Functions named `_locked` are called with volume->lock held.
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

/* The length of a hole in one copy, at least.  The range is locked until the
 * remote has zeroed it, so the length depends on how fast the remote writes
 * zeroes: a sparse image of 100 GiB takes hundreds of commands, a disk that
 * writes its zeroes gets 32 MiB at a time.
 */
#define RESYNC_MIN_HOLE (32u << 20)

struct copy {
  struct range range;
  pthread_cond_t granted;
  bool hole;
  uint64_t zero_bytes; /* bytes of the range sent as zeroes */
  bool was_late;       /* late before: this copy's answer does not end that */
  unsigned doubts;     /* local.doubts when the copy began */
  int error;           /* -errno of commands already answered */
  uint8_t *buf;
  unsigned nr;
  struct command commands[RESYNC_COPY_COMMANDS];
  uint64_t uncounted[BACKLOG_KINDS]; /* bytes sent, see backlog.c */
  struct waiter waiter;
  uint64_t sent_ns;
  TAILQ_ENTRY (copy) link; /* under way, or idle */
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
  /* Most recently used first: its buffer is in the CPU cache. */
  TAILQ_HEAD (, copy) idle;
  TAILQ_HEAD (, copy) busy; /* under way, in the order they were sent */
  uint32_t nr_busy;
  struct runs copied;   /* answered, no flush begun since */
  struct runs flushing; /* answered before `flush` began */
  struct remote_flush flush;
  bool flush_begun;
};

/* Find the next run of regions to copy, at most as long as a hole may be.
 * False: none is left.
 */
bool resync_find_run_locked (struct batch *b, struct run *run);
/* Cut the run to one copy: a hole of whole regions, or data.  Blocks while the
 * local disk reports its holes.
 */
void resync_size_copy (struct batch *b, struct copy *copy, struct run *run);
/* Take room for at most `wanted` bytes in the remote's backlog, and return how
 * much. try: returns 0 if there is no room. take: waits for room; the caller
 * may hold its copy's range, and has no command of that copy under way.
 */
uint64_t resync_try_room (struct batch *b, enum backlog_kind kind,
                          uint64_t wanted);
uint64_t resync_take_room (struct batch *b, enum backlog_kind kind,
                           uint64_t wanted);
/* 1: locked; 0: other copies or a flush are under way, end them first; -errno.
 */
int resync_lock_copy (struct batch *b, struct copy *copy);
/* Read and send the copy; its range is locked.  -EAGAIN: it is no hole any
 * more.  Another -errno: no disk can read it.  Both unlock the range.
 */
int resync_send_copy (struct batch *b, struct copy *copy);
/* Wait for the answers.  Afterwards the regions are `copied`, and the range is
 * unlocked.
 */
int resync_end_copy (struct batch *b, struct copy *copy);

#endif /* NBDM_RESYNC_COPY_H */
