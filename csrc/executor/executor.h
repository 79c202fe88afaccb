/* SPDX-License-Identifier: BSD-3-Clause */

/* Carries out the requests of a volume's clients, for any door.  A door fills a
 * `struct io` and submits it on a lane (lane.h); the executor calls `done` at
 * the end.  See executor.c.
 */

#ifndef NBDM_EXECUTOR_H
#define NBDM_EXECUTOR_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/queue.h>

#include "api.h"
#include "request/express.h"

#define EXECUTOR_EXTENTS                                                       \
  512u /* in one answer; a client asks again for more                          \
        */

enum io_kind {
  IO_READ,
  IO_WRITE,
  IO_TRIM,
  IO_ZERO,
  IO_CACHE,
  IO_FLUSH,
  IO_EXTENTS /* which ranges are data and which are holes */
};

/* The thread that calls `done`.  IO_BY_LANE: the lane's own, inside a lane
 * call; `done` must neither block nor submit an io.  IO_BY_WORKER: a worker, or
 * the lane's own thread if no worker can start; `done` may block shortly.
 * IO_BY_FLUSHER: a worker that ends several ios; `done` must not block.
 */
enum io_ender { IO_BY_LANE, IO_BY_WORKER, IO_BY_FLUSHER };

struct io_end {
  enum io_ender by;
  int rc; /* 0 or -errno; -ESHUTDOWN: the volume stops, and nothing was done */
  const char *words; /* the message to log for an error; NULL: none */
  const struct nbdm_extent *extents; /* of IO_EXTENTS: `nr_extents` of them */
  uint32_t nr_extents;
};

/* A request.  The door owns its memory; the executor uses it until `done`. */
struct io {
  enum io_kind kind;
  uint32_t flags; /* NBDM_* */
  uint64_t offset;
  uint64_t length;      /* of a read or write up to NBDM_MAX_REQUEST */
  void *buf;            /* `length` bytes of a read or write; must not change */
  uint32_t max_extents; /* EXECUTOR_EXTENTS at most */
  /* Called once, when the io belongs to the door again; `end` is valid during
   * the call.
   */
  void (*done) (struct io *io, const struct io_end *end);

  /* The executor's own. */
  TAILQ_ENTRY (io) entry; /* of the one list it is in */
  struct begun *begun; /* or NULL; a worker finishes it with express_complete */
  uint64_t ticket;     /* of its pool's queue */
};

/* A write that a lane has begun.  Not a part of its io: it is large, and is no
 * longer needed while the answer waits for the client.
 */
struct begun {
  struct express express;
  struct io *io;
  struct begun *next; /* of those kept */
};

TAILQ_HEAD (ios, io);

/* A pool of workers, and the ios that wait for one. */
struct pool {
  struct executor *executor;
  pthread_cond_t work; /* an io, or the end */
  struct ios queue;
  uint64_t tickets; /* given to ios so far */
  uint32_t nr_workers, nr_idle, max_workers;
  uint32_t nr_starting; /* of the workers, those whose thread may not start */
};

/* Three pools: all writers may wait long for a remote, while reads come from
 * local; and a trim or zeroes of 4 GiB take long on some disks, but no more
 * bytes of a client than a small one, so it may have many under way.
 */
enum { READERS, WRITERS, ZEROERS, NR_POOLS };

struct executor {
  struct nbdm *volume;
  pthread_mutex_t lock; /* protects all below; none is taken under it */
  pthread_cond_t gone;  /* a worker has ended */
  struct pool pools[NR_POOLS];
  bool flushing;      /* a worker flushes, or begins to */
  struct ios flushes; /* that came during that flush */
  bool ending;
};

void executor_init (struct executor *executor, struct nbdm *volume);
void executor_destroy (struct executor *executor);
/* Start the first workers.  -errno with a message: the caller still calls
 * executor_end.
 */
int executor_start (struct executor *executor);
/* All ios are done, or workers will end them: wait until all workers have
 * ended.
 */
void executor_end (struct executor *executor);

/* Let a worker run the io.  A write that has begun holds a range for which
 * others may wait: it does not wait for a free worker, and the caller runs it
 * at once if no worker can start.
 */
void executor_queue (struct executor *executor, struct io *io);
/* Tell the door about the end, with this thread's message for an error. */
void io_finish (struct io *io, enum io_ender by, int rc);

#endif /* NBDM_EXECUTOR_H */
