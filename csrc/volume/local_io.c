/* SPDX-License-Identifier: BSD-3-Clause */

/* What may hang at the local disk, where it has a deadline: *carriers*, threads
 * that make the system calls for the threads that ask for them.
 *
 * Nothing ends a system call that the disk keeps.  So the thread that asks does
 * not make it: it waits for its carrier, or until the disk is given up.  Then
 * it goes on as after an error of a disk that has failed, and a remote in sync
 * has the bytes.  The carrier stays in the call, with memory of its own: what
 * is written was copied into it, what is read is copied out of it by the asker
 * alone.
 *
 * What a late call does is harmless.  It is on the disk that failed, of which
 * the volume misses all that was active, and so all that a write was under way
 * to.  It counts as a use of that disk until it has returned: no disk is
 * attached before, this one least of all.  And the descriptor stays open so
 * long, the volume's end or not: its lock keeps other servers away.
 *
 * Carriers are made when they are needed, up to MAX_CARRIERS, and kept for a
 * while; one is there from the start, as there may be no thread left later.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/queue.h>

#include "api.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/lock.h"
#include "base/thread.h"
#include "volume/local.h"
#include "volume/local_io.h"
#include "volume/volume.h"
#include "volume/volume_free.h"

#define MAX_CARRIERS 128u        /* calls under way at a time */
#define CARRIED_BYTES (1u << 20) /* by one call: longer ones are several */
#define IDLE_NS (10 * NS_PER_S)  /* and a carrier ends */
#define STACK_BYTES (512u << 10)

enum stage {
  IDLE,     /* in the list */
  RESERVED, /* an asker's, which fills it in */
  AT_WORK,
  DONE /* the asker's again */
};

struct carrier {
  struct local_io *io;
  SLIST_ENTRY (carrier) link; /* of the idle ones */
  pthread_cond_t work;        /* tells the carrier */
  pthread_cond_t done;        /* tells the asker */
  enum stage stage;
  bool left; /* at work, and the asker has gone on without it */
  struct local_job job;
  int64_t result;
  int error; /* errno */
  char words[NBDM_REASON_LEN];
  uint32_t place; /* in the array of all */
  uint8_t bytes[CARRIED_BYTES];
};

struct local_io {
  struct nbdm *volume;
  pthread_mutex_t lock; /* protects all below, and the carriers */
  pthread_cond_t freed; /* a carrier is idle or has ended; or the disk failed */
  SLIST_HEAD (, carrier) idle; /* the one used last first */
  struct carrier *all[MAX_CARRIERS];
  uint32_t nr, nr_left; /* of carriers, and of those without an asker */
  bool given_up;        /* the disk: nothing begins on it */
  bool ending;          /* the volume */
  bool abandoned;       /* the last carrier is to free it */
};

static void
io_free (struct local_io *io)
{
  pthread_cond_destroy (&io->freed);
  pthread_mutex_destroy (&io->lock);
  free (io);
}

/* --- a carrier ---------------------------------------------------------- */

static void
put_idle_locked (struct carrier *c)
{
  struct local_io *io = c->io;

  c->stage = IDLE;
  SLIST_INSERT_HEAD (&io->idle, c, link);
  pthread_cond_signal (&io->freed);
  if (io->ending)
    pthread_cond_signal (&c->work);
}

/* False: this carrier is to end, and is in the list no more. */
static bool
await_work_relock (struct carrier *c)
{
  struct local_io *io = c->io;
  uint64_t until_ns = now_ns () + IDLE_NS;
  bool over = false;

  while (c->stage != AT_WORK) {
    if (c->stage == IDLE && (io->ending || (over && io->nr > 1))) {
      SLIST_REMOVE (&io->idle, c, carrier, link);
      return false;
    }
    if (over)
      until_ns = now_ns () + IDLE_NS;
    over = !wait_until (&c->work, &io->lock, until_ns);
  }
  return true;
}

/* It counts as a use before the asker may leave, so that the disk is not
 * replaced before the call.
 */
static void
work_relock (struct carrier *c)
{
  struct local_io *io = c->io;

  local_use (io->volume);
  pthread_mutex_unlock (&io->lock);
  clear_error ();
  c->result = local_carry_out (io->volume, &c->job);
  c->error = errno;
  snprintf (c->words, sizeof c->words, "%s", last_error ());
  pthread_mutex_lock (&io->lock);
  local_leave ();
}

/* It may wait for a disk as well. */
static void
drop_relock (struct carrier *c)
{
  if (c->job.drop == NULL)
    return;
  pthread_mutex_unlock (&c->io->lock);
  c->job.drop (c->job.opaque);
  pthread_mutex_lock (&c->io->lock);
}

static void *
carry (void *opaque)
{
  struct carrier *c = opaque;
  struct local_io *io = c->io;
  struct nbdm *v = io->volume;
  bool last;

  pthread_mutex_lock (&io->lock);
  while (await_work_relock (c)) {
    if (!c->left)
      work_relock (c);
    if (c->left) {
      drop_relock (c);
      io->nr_left--;
      put_idle_locked (c);
    }
    else {
      c->stage = DONE;
      pthread_cond_signal (&c->done);
    }
  }
  io->nr--;
  io->all[c->place] = NULL;
  last = io->abandoned && io->nr == 0;
  pthread_cond_broadcast (&io->freed);
  pthread_mutex_unlock (&io->lock);
  pthread_cond_destroy (&c->work);
  pthread_cond_destroy (&c->done);
  free (c);
  if (last) {
    io_free (io);
    volume_free (v);
  }
  return NULL;
}

static int
carrier_make (struct local_io *io)
{
  struct carrier *c
      = malloc (sizeof *c); /* no page is touched before its use */
  int rc;

  if (c == NULL)
    return -ENOMEM;
  c->io = io;
  c->stage = RESERVED;
  c->left = false;
  c->place = 0;
  cond_init (&c->work);
  cond_init (&c->done);
  rc = thread_start (carry, c, STACK_BYTES);
  if (rc < 0) {
    pthread_cond_destroy (&c->work);
    pthread_cond_destroy (&c->done);
    free (c);
    return rc;
  }
  LOCK_FOR_SCOPE (&io->lock);
  while (io->all[c->place])
    c->place++;
  io->all[c->place] = c;
  put_idle_locked (c);
  return 0;
}

/* Make one more, if there may be one.  False: there is none.  Drops the lock.
 */
static bool
add_carrier_relock (struct local_io *io)
{
  bool made;

  if (io->nr == MAX_CARRIERS)
    return false;
  io->nr++;
  pthread_mutex_unlock (&io->lock);
  made = carrier_make (io) == 0;
  pthread_mutex_lock (&io->lock);
  if (!made)
    io->nr--;
  return made;
}

/* --- the asker ----------------------------------------------------------- */

/* A job with a limit is not begun while the disk keeps a call that an asker has
 * given up: else each job would wait for its whole limit.
 */
static int
refusal_locked (const struct local_io *io, const struct local_job *job)
{
  if (io->given_up && job->act != LOCAL_CALL)
    return LOCAL_GIVEN_UP;
  return job->wait_ms > 0 && io->nr_left > 0 ? -ETIMEDOUT : 0;
}

/* A carrier for the job, or why it is not begun. */
static int
reserve (struct local_io *io, const struct local_job *job, uint64_t until_ns,
         struct carrier **out)
{
  struct carrier *c;
  int rc = 0;

  LOCK_FOR_SCOPE (&io->lock);
  while (rc == 0 && (rc = refusal_locked (io, job)) == 0
         && SLIST_EMPTY (&io->idle))
    if (!add_carrier_relock (io) && SLIST_EMPTY (&io->idle)
        && refusal_locked (io, job) == 0
        && !wait_until (&io->freed, &io->lock, until_ns))
      rc = -ETIMEDOUT;
  if (rc == 0) {
    c = SLIST_FIRST (&io->idle);
    SLIST_REMOVE_HEAD (&io->idle, link);
    c->stage = RESERVED;
    *out = c;
  }
  else if (!SLIST_EMPTY (&io->idle))
    pthread_cond_signal (&io->freed); /* it may have been this thread's turn */
  return rc;
}

static void
release (struct carrier *c)
{
  struct local_io *io = c->io;

  LOCK_FOR_SCOPE (&io->lock);
  put_idle_locked (c);
}

/* 0: it has done what it was asked for.  Else it is not ours any more. */
static int
await (struct carrier *c, uint64_t until_ns)
{
  struct local_io *io = c->io;
  bool gives_up = c->job.act != LOCAL_CALL, in_time = true;
  int err = 0;

  LOCK_FOR_SCOPE (&io->lock);
  c->stage = AT_WORK;
  pthread_cond_signal (&c->work);
  while (c->stage != DONE && !(gives_up && io->given_up) && in_time)
    in_time = wait_until (&c->done, &io->lock, until_ns);
  if (c->stage != DONE) {
    err = gives_up && io->given_up ? LOCAL_GIVEN_UP : -ETIMEDOUT;
    c->left = true;
    io->nr_left++;
  }
  return err;
}

static int64_t
not_answered (int err)
{
  errno = -err;
  return set_message (err, "the local disk did not answer before it was given "
                           "up");
}

/* At most CARRIED_BYTES of a buffer. */
static int64_t
run_part (struct local_io *io, const struct local_job *job)
{
  uint64_t until_ns
      = job->wait_ms > 0 ? now_ns () + job->wait_ms * NS_PER_MS : NEVER;
  struct carrier *c = NULL;
  int64_t result;
  int err = reserve (io, job, until_ns, &c);

  if (err < 0 && job->drop)
    job->drop (job->opaque);
  if (err < 0)
    return not_answered (err);
  c->left = false;
  c->job = *job;
  c->job.buf = c->bytes;
  if (job->act == LOCAL_WRITE)
    memcpy (c->bytes, job->buf, job->count);
  err = await (c, until_ns);
  if (err < 0)
    return not_answered (err);
  result = c->result;
  err = c->error;
  if (result < 0 && c->words[0])
    set_message ((int)result, "%s", c->words);
  if (result >= 0 && job->buf && job->act != LOCAL_WRITE)
    memcpy (job->buf, c->bytes, job->count);
  release (c);
  errno = err;
  return result;
}

int64_t
local_io_run (struct nbdm *v, const struct local_job *job)
{
  struct local_job part = *job;
  uint64_t left = job->count;
  int64_t rc;

  local_use (v); /* also until this thread has seen that it was given up */
  do {
    if (job->buf && left > CARRIED_BYTES - part.offset % CARRIED_BYTES)
      part.count = CARRIED_BYTES - part.offset % CARRIED_BYTES;
    else
      part.count = left;
    rc = run_part (v->local.io, &part);
    part.offset += part.count;
    if (part.buf)
      part.buf = (uint8_t *)part.buf + part.count;
    left -= part.count;
  } while (rc == 0 && left > 0);
  local_leave ();
  return rc;
}

void
local_io_give_up (struct nbdm *v)
{
  struct local_io *io = v->local.io;

  if (io == NULL)
    return;
  LOCK_FOR_SCOPE (&io->lock);
  io->given_up = true;
  pthread_cond_broadcast (&io->freed);
  for (uint32_t i = 0; i < MAX_CARRIERS; i++)
    if (io->all[i])
      pthread_cond_signal (&io->all[i]->done);
}

void
local_io_renew (struct nbdm *v)
{
  struct local_io *io = v->local.io;

  if (io == NULL)
    return;
  LOCK_FOR_SCOPE (&io->lock);
  io->given_up = false;
}

/* --- the volume begins and ends ------------------------------------------ */

int
local_io_start (struct nbdm *v)
{
  struct local_io *io = calloc (1, sizeof *io);
  bool made;

  if (io == NULL)
    return set_error (-ENOMEM, "the local disk's threads");
  io->volume = v;
  io->given_up = v->local.state == NBDM_LOCAL_FAILED;
  pthread_mutex_init (&io->lock, NULL);
  cond_init (&io->freed);
  pthread_mutex_lock (&io->lock);
  made = add_carrier_relock (io);
  pthread_mutex_unlock (&io->lock);
  if (made) {
    v->local.io = io;
    return 0;
  }
  io_free (io);
  return set_error (-EAGAIN, "cannot start a thread for the local disk");
}

bool
local_io_end (struct nbdm *v)
{
  struct local_io *io = v->local.io;
  struct carrier *c;
  bool over;

  if (io == NULL)
    return true;
  pthread_mutex_lock (&io->lock);
  io->ending = true;
  SLIST_FOREACH (c, &io->idle, link)
    pthread_cond_signal (&c->work);
  while (io->nr > io->nr_left)
    pthread_cond_wait (&io->freed, &io->lock);
  over = io->nr == 0;
  io->abandoned = !over;
  pthread_mutex_unlock (&io->lock);
  if (over)
    io_free (io);
  return over;
}
