/* SPDX-License-Identifier: BSD-3-Clause */

/* *Carriers*: threads that make the local disk's system calls for other
 * threads, if the disk has a deadline, because these calls may hang.
 *
 * Nothing can end a system call that the disk keeps.  So the asking thread does
 * not make the call: it waits for its carrier, or until the disk is given up.
 * Then it continues as after an error of a failed disk, and a remote in sync
 * has the bytes.  The carrier stays in the call with memory of its own: bytes
 * to write were copied into that memory, and only the asker copies read bytes
 * out of it.
 *
 * A late call does no harm.  It goes to the failed disk, and the volume already
 * treats all active regions of that disk as missing, including every range with
 * a write under way.  The call counts as a use of that disk until it returns,
 * so no disk, and above all not the same one, is attached before that.  The
 * descriptor also stays open until then, even if the volume ends: its lock
 * keeps other servers away.
 *
 * Carriers are created on demand, up to MAX_CARRIERS, and end after some idle
 * time.  One exists from the start, because creating a thread may fail later.
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
#define CARRIED_BYTES (1u << 20) /* by one call; longer ones are split */
#define IDLE_NS (10 * NS_PER_S)  /* then an idle carrier ends */
#define STACK_BYTES (512u << 10)

enum stage {
  IDLE,     /* in the list */
  RESERVED, /* an asker fills it in */
  AT_WORK,
  DONE /* the asker reads the result */
};

struct carrier {
  struct local_io *io;
  SLIST_ENTRY (carrier) link; /* of the idle ones */
  pthread_cond_t work;        /* wakes the carrier */
  pthread_cond_t done;        /* wakes the asker */
  enum stage stage;
  bool left; /* at work, and the asker no longer waits */
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
  pthread_cond_t freed; /* a carrier is idle or has ended, or the disk failed */
  SLIST_HEAD (, carrier) idle; /* most recently used first */
  struct carrier *all[MAX_CARRIERS];
  uint32_t nr, nr_left; /* carriers; of these, those whose asker left */
  bool given_up;        /* the disk: no call starts on it */
  bool ending;          /* the volume is ending */
  bool abandoned;       /* the last carrier frees this struct */
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

/* False: this carrier must end, and is no longer in the list. */
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

/* The use begins before the asker may leave, so that the disk is not replaced
 * before the call.
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

/* `drop` may wait for a disk as well. */
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

/* Create one more carrier if the limit allows.  False: none was created.
 * Releases the lock.
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

/* A job with a time limit does not start while the disk still keeps a call that
 * its asker left: otherwise each job would wait for its whole limit.
 */
static int
refusal_locked (const struct local_io *io, const struct local_job *job)
{
  if (io->given_up && job->act != LOCAL_CALL)
    return LOCAL_GIVEN_UP;
  return job->wait_ms > 0 && io->nr_left > 0 ? -ETIMEDOUT : 0;
}

/* Reserve a carrier for the job, or return why the job cannot start. */
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
    /* this wake-up may belong to another asker */
    pthread_cond_signal (&io->freed);
  return rc;
}

static void
release (struct carrier *c)
{
  struct local_io *io = c->io;

  LOCK_FOR_SCOPE (&io->lock);
  put_idle_locked (c);
}

/* 0: the carrier is done.  Otherwise it no longer belongs to this thread. */
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

/* Run at most CARRIED_BYTES of a buffer. */
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

  local_use (v); /* until this thread has seen that the disk was given up */
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

/* --- start and end of the volume ------------------------------------------ */

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
