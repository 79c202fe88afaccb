/* SPDX-License-Identifier: BSD-3-Clause */

/* The executor's workers: requests that may block, on threads of their own.
 *
 * A door's thread does small writes and reads itself (lane.c).  Workers run all
 * others, and those that a lane began and could not end.  A worker may wait
 * anywhere, and ends the io when the engine's call returns.
 */

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/lock.h"
#include "base/thread.h"
#include "executor/executor.h"
#include "volume/volume.h"

#define MAX_WORKERS 128u        /* of a pool, for ios that have not begun */
#define MAX_ZEROERS 32u         /* they leave extents to the writers */
#define IDLE_NS (10 * NS_PER_S) /* and a worker ends */
#define STACK_BYTES (512u << 10)

/* --- One io -------------------------------------------------------------- */

/* A refused fast zero is an answer and no error; a volume that stops has logged
 * that itself.
 */
static const char *
words_of (int rc)
{
  const char *words;

  if (rc >= 0 || rc == -EOPNOTSUPP || rc == -ESHUTDOWN)
    return NULL;
  words = last_error ();
  return *words ? words : strerror (-rc);
}

void
io_finish (struct io *io, enum io_ender by, int rc)
{
  struct io_end end = { .by = by, .rc = rc, .words = words_of (rc) };

  io->done (io, &end);
}

static void
run_extents (struct nbdm *v, struct io *io)
{
  struct nbdm_extent found[EXECUTOR_EXTENTS];
  int nr = nbdm_extents (v, io->length, io->offset, found, io->max_extents);
  struct io_end end = { .by = IO_BY_WORKER,
                        .rc = nr < 0 ? nr : 0,
                        .words = words_of (nr),
                        .extents = found,
                        .nr_extents = nr < 0 ? 0 : (uint32_t)nr };

  io->done (io, &end);
}

static int
run_call (struct nbdm *v, struct io *io)
{
  uint32_t count = (uint32_t)io->length;

  switch (io->kind) {
  case IO_READ:
    return nbdm_pread (v, io->buf, count, io->offset);
  case IO_WRITE:
    return nbdm_pwrite (v, io->buf, count, io->offset, io->flags);
  case IO_TRIM:
    return nbdm_trim (v, io->length, io->offset, io->flags);
  case IO_ZERO:
    return nbdm_zero (v, io->length, io->offset, io->flags);
  case IO_CACHE:
    return nbdm_cache (v, io->length, io->offset);
  default:
    return nbdm_flush (v);
  }
}

static void
run (struct nbdm *v, struct io *io)
{
  struct begun *begun = io->begun;
  int rc;

  clear_error ();
  if (io->kind == IO_EXTENTS) {
    run_extents (v, io);
    return;
  }
  rc = begun ? express_complete (v, &begun->express) : run_call (v, io);
  free (begun);
  io_finish (io, IO_BY_WORKER, rc);
}

/* One flush for all of them, and one line of the log. */
static void
run_flushes (struct nbdm *v, struct ios *ios)
{
  struct io_end end = { .by = IO_BY_FLUSHER };
  struct io *io;

  clear_error ();
  end.rc = nbdm_flush (v);
  end.words = words_of (end.rc);
  while ((io = TAILQ_FIRST (ios))) {
    TAILQ_REMOVE (ios, io, entry);
    io->done (io, &end);
    end.words = NULL;
  }
}

/* --- Workers ------------------------------------------------------------- */

static struct pool *
pool_of (struct executor *ex, const struct io *io)
{
  switch (io->kind) {
  case IO_READ:
  case IO_CACHE:
  case IO_EXTENTS:
    return &ex->pools[READERS];
  case IO_TRIM:
  case IO_ZERO:
    return &ex->pools[ZEROERS];
  default:
    return &ex->pools[WRITERS];
  }
}

/* Wait for an io; NULL: this worker must end. */
static struct io *
next_io_relock (struct pool *pool)
{
  struct executor *ex = pool->executor;
  uint64_t until = now_ns () + IDLE_NS;
  struct io *io;

  pool->nr_idle++;
  while (TAILQ_EMPTY (&pool->queue) && !ex->ending) {
    if (wait_until (&pool->work, &ex->lock, until))
      continue;
    if (pool->nr_workers - pool->nr_starting > 1)
      break;
    until += IDLE_NS; /* the last one stays: a new thread may fail to start */
  }
  pool->nr_idle--;
  io = TAILQ_FIRST (&pool->queue);
  if (io)
    TAILQ_REMOVE (&pool->queue, io, entry);
  return io;
}

/* Flushes that come while one is under way share the next one: a client that
 * sends flushes between its writes has several under way, and a thread for each
 * would only wait for the others.
 */
static void
flush_all (struct executor *ex, struct io *io)
{
  struct ios flushes = TAILQ_HEAD_INITIALIZER (flushes);

  TAILQ_INSERT_HEAD (&flushes, io, entry);
  while (!TAILQ_EMPTY (&flushes)) {
    run_flushes (ex->volume, &flushes);
    pthread_mutex_lock (&ex->lock);
    TAILQ_CONCAT (&flushes, &ex->flushes, entry);
    ex->flushing = !TAILQ_EMPTY (&flushes);
    pthread_mutex_unlock (&ex->lock);
  }
}

/* True: a later flush covers this io. */
static bool
join_flush_locked (struct executor *ex, struct io *io)
{
  if (io->kind != IO_FLUSH)
    return false;
  if (!ex->flushing) {
    ex->flushing = true;
    return false;
  }
  TAILQ_INSERT_TAIL (&ex->flushes, io, entry);
  return true;
}

static void *
worker_main (void *opaque)
{
  struct pool *pool = opaque;
  struct executor *ex = pool->executor;
  struct io *io;

  pthread_mutex_lock (&ex->lock);
  pool->nr_starting--;
  while ((io = next_io_relock (pool))) {
    pthread_mutex_unlock (&ex->lock);
    if (io->kind == IO_FLUSH)
      flush_all (ex, io);
    else
      run (ex->volume, io);
    pthread_mutex_lock (&ex->lock);
  }
  pool->nr_workers--;
  pthread_cond_broadcast (&ex->gone);
  pthread_mutex_unlock (&ex->lock);
  return NULL;
}

static uint32_t
nr_queued_locked (const struct pool *pool)
{
  const struct io *io;
  uint32_t nr = 0;

  TAILQ_FOREACH (io, &pool->queue, entry)
    if (++nr > pool->nr_idle)
      break;
  return nr;
}

/* Take the io with this ticket out of the queue; NULL: a worker has it already.
 * By its ticket and not by its address: an io that a worker had may be freed,
 * or be another request by now.
 */
static struct io *
take_back_locked (struct pool *pool, uint64_t ticket)
{
  struct io *io;

  TAILQ_FOREACH (io, &pool->queue, entry)
    if (io->ticket == ticket) {
      TAILQ_REMOVE (&pool->queue, io, entry);
      break;
    }
  return io;
}

/* No thread could start.  An io that has not begun holds nothing and waits for
 * a worker: one always exists.  That worker may wait for an io that has begun,
 * so the caller completes such an io; this waits for no other request.
 */
static void
do_without_worker (struct pool *pool, uint64_t ticket, bool begun)
{
  struct executor *ex = pool->executor;
  struct io *ours;

  pthread_mutex_lock (&ex->lock);
  pool->nr_workers--;
  pool->nr_starting--;
  ours = begun ? take_back_locked (pool, ticket) : NULL;
  pthread_mutex_unlock (&ex->lock);
  if (ours)
    run (ex->volume, ours);
}

/* An io that has begun goes first: others may wait for its range. */
static void
enqueue_locked (struct pool *pool, struct io *io)
{
  io->ticket = ++pool->tickets;
  if (io->begun)
    TAILQ_INSERT_HEAD (&pool->queue, io, entry);
  else
    TAILQ_INSERT_TAIL (&pool->queue, io, entry);
}

void
executor_queue (struct executor *ex, struct io *io)
{
  struct pool *pool = pool_of (ex, io);
  bool missing, begun = io->begun != NULL;
  uint64_t ticket;

  pthread_mutex_lock (&ex->lock);
  if (join_flush_locked (ex, io)) {
    pthread_mutex_unlock (&ex->lock);
    return;
  }
  enqueue_locked (pool, io);
  ticket = io->ticket;
  missing = nr_queued_locked (pool) > pool->nr_idle
            && (begun || pool->nr_workers < pool->max_workers);
  if (missing) {
    pool->nr_workers++;
    pool->nr_starting++;
  }
  pthread_cond_signal (&pool->work);
  pthread_mutex_unlock (&ex->lock);
  /* From here on the io may be freed. */
  if (missing && thread_start (worker_main, pool, STACK_BYTES) < 0)
    do_without_worker (pool, ticket, begun);
}

/* --- Beginning and end --------------------------------------------------- */

void
executor_init (struct executor *ex, struct nbdm *v)
{
  memset (ex, 0, sizeof *ex);
  ex->volume = v;
  pthread_mutex_init (&ex->lock, NULL);
  pthread_cond_init (&ex->gone, NULL);
  TAILQ_INIT (&ex->flushes);
  for (int i = 0; i < NR_POOLS; i++) {
    ex->pools[i].executor = ex;
    ex->pools[i].max_workers = i == ZEROERS ? MAX_ZEROERS : MAX_WORKERS;
    TAILQ_INIT (&ex->pools[i].queue);
    cond_init (&ex->pools[i].work);
  }
}

void
executor_destroy (struct executor *ex)
{
  for (int i = 0; i < NR_POOLS; i++)
    pthread_cond_destroy (&ex->pools[i].work);
  pthread_cond_destroy (&ex->gone);
  pthread_mutex_destroy (&ex->lock);
}

/* Start the worker of each pool that always exists. */
int
executor_start (struct executor *ex)
{
  for (int i = 0; i < NR_POOLS; i++) {
    struct pool *pool = &ex->pools[i];
    int rc;

    /* No other thread knows of the pool yet. */
    pool->nr_workers = pool->nr_starting = 1;
    rc = thread_start (worker_main, pool, STACK_BYTES);
    if (rc < 0) {
      pool->nr_workers = pool->nr_starting = 0;
      return set_error (rc, "a thread for requests");
    }
  }
  return 0;
}

void
executor_end (struct executor *ex)
{
  LOCK_FOR_SCOPE (&ex->lock);
  ex->ending = true;
  for (int i = 0; i < NR_POOLS; i++)
    pthread_cond_broadcast (&ex->pools[i].work);
  for (int i = 0; i < NR_POOLS; i++)
    while (ex->pools[i].nr_workers > 0)
      pthread_cond_wait (&ex->gone, &ex->lock);
}
