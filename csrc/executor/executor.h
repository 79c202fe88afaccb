/* SPDX-License-Identifier: BSD-3-Clause */

/* What carries out the requests of a volume's clients, whatever door they come
 * through.  A door fills a `struct io` and submits it on a lane (lane.h); it
 * hears of the end in `done`, and knows nothing of how the end came about.
 * See executor.c.
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
  IO_EXTENTS /* what is data, and what a hole */
};

/* The thread that calls `done`: the lane's own, in one of its calls, which must
 * neither block nor submit another; a worker, or the lane's own where none can
 * be made, which may block, shortly; a worker that ends several, which must not
 * block.
 */
enum io_ender { IO_BY_LANE, IO_BY_WORKER, IO_BY_FLUSHER };

struct io_end {
  enum io_ender by;
  int rc; /* 0 or -errno; -ESHUTDOWN: the volume stops, and nothing was done */
  const char *words; /* what the log is to say of an error; NULL: nothing */
  const struct nbdm_extent *extents; /* of IO_EXTENTS: `nr_extents` of them */
  uint32_t nr_extents;
};

/* A request.  It is the door's memory, and the executor's until `done`. */
struct io {
  enum io_kind kind;
  uint32_t flags; /* NBDM_* */
  uint64_t offset;
  uint64_t length;      /* of a read or write up to NBDM_MAX_REQUEST */
  void *buf;            /* `length` bytes of a read or write; must not change */
  uint32_t max_extents; /* EXECUTOR_EXTENTS at most */
  /* Called once, when the io is the door's again; `end` lives as long as the
   * call.
   */
  void (*done) (struct io *io, const struct io_end *end);

  /* The executor's own. */
  TAILQ_ENTRY (io) entry; /* of the one list it is in */
  struct begun *begun;    /* or NULL; what is left of it is express_complete */
  uint64_t ticket;        /* of its pool's queue */
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

/* Workers, and what waits for one. */
struct pool {
  struct executor *executor;
  pthread_cond_t work; /* an io, or the end */
  struct ios queue;
  uint64_t tickets; /* given to ios so far */
  uint32_t nr_workers, nr_idle;
  uint32_t nr_starting; /* of the workers: they may not come to be */
};

/* Two, as writes may wait for a remote, all of them and for long, and reads
 * come from local.
 */
enum { READERS, WRITERS, NR_POOLS };

struct executor {
  struct nbdm *volume;
  pthread_mutex_t lock; /* protects all below; none is taken under it */
  pthread_cond_t gone;  /* a worker has ended */
  struct pool pools[NR_POOLS];
  bool flushing;      /* a worker is, or is about to */
  struct ios flushes; /* that came meanwhile */
  bool ending;
};

void executor_init (struct executor *executor, struct nbdm *volume);
void executor_destroy (struct executor *executor);
/* Make the first workers.  -errno with a message: executor_end all the same. */
int executor_start (struct executor *executor);
/* All ios are done, or will be by workers: wait until these have ended. */
void executor_end (struct executor *executor);

/* Have a worker run the io.  One that has begun holds what others wait for: it
 * does not wait for a worker to be free, and is run at once, by the caller,
 * where none can be made.
 */
void executor_queue (struct executor *executor, struct io *io);
/* Tell the door of the end, with this thread's last words on an error. */
void io_finish (struct io *io, enum io_ender by, int rc);

#endif /* NBDM_EXECUTOR_H */
