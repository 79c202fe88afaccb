/* SPDX-License-Identifier: BSD-3-Clause */

/* The interface between resync.c, which drives a call, and resync_copy.c, which
 * does its copies.  Only the calling thread uses it; functions named `_locked`
 * need volume->lock.
 */

#ifndef NBDM_RESYNC_COPY_H
#define NBDM_RESYNC_COPY_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/queue.h>

#include "logs/rangelock.h"
#include "volume/backlog.h"
#include "volume/flush.h"
#include "volume/volume.h"
#include "wire/conn.h"

struct conn;

#define RESYNC_COPY_BYTES (1u << 20) /* of data in one copy, or one region */
#define RESYNC_COPY_COMMANDS 32      /* under way for one copy */

/* Of a hole in one copy.  The range is held until the remote has zeroed it, so
 * its length depends on how quickly the remote zeroes: a sparse image of 100
 * GiB in hundreds of commands, a disk that writes its zeroes in 32 MiB.
 */
#define RESYNC_MIN_HOLE (32u << 20)

struct copy {
  struct range range;
  pthread_cond_t granted;
  bool hole;
  bool was_late; /* before: its answer says nothing of the late command */
  int error;     /* -errno of commands already answered */
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

/* One call of nbdm_disk_resync. */
struct batch {
  struct remote *remote;
  struct conn *conn;
  uint64_t cursor; /* region */
  uint64_t max_bytes, until_ns;
  uint64_t issued_bytes, zero_bytes, cleaned_bytes;
  struct resync_pace pace; /* as it was when the last copy began */
  uint64_t burst_ns;       /* when the burst under way began */
  uint64_t hole_bytes;
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
  uint64_t flush_ended_ns; /* the last one, or the call's begin */
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
