/* SPDX-License-Identifier: BSD-3-Clause */

/* The local disk: a file or a block device, used as it is.
 *
 * Reads and writes go through the page cache.  As on any disk with a write
 * cache, only a flush or FUA makes data durable.  Zeroing must leave zeroes,
 * whatever the file system can do: a hole, a zeroed range or plain writes.
 *
 * The calling thread makes the system calls that may wait for the disk.  If the
 * disk has a deadline, a carrier of local_io.c makes them.  Both use the
 * functions whose names end in _here. local_calls.c has the operations other
 * than reads and writes.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/queue.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/fault.h"
#include "base/file.h"
#include "base/lock.h"
#include "volume/local.h"
#include "volume/local_io.h"
#include "volume/volume.h"

#define ZERO_WRITE (1u << 20) /* bytes of zeroes written at a time */

/* --- threads that use the disk ----------------------------------------- */

/* A thread that uses a local disk.  Only that thread writes here, so that a
 * request touches no cache line that cores share.  Other threads read it under
 * users_lock.
 */
struct user {
  _Atomic (const struct nbdm *) volume;
  unsigned depth;
  atomic_uint turns; /* odd: a system call on the disk is under way */
  unsigned seen;     /* turns when the ticker last looked, and since when */
  uint64_t seen_ns;
  LIST_ENTRY (user) link;
  bool listed;
};

static pthread_mutex_t users_lock = PTHREAD_MUTEX_INITIALIZER;
static LIST_HEAD (, user) users;
static pthread_key_t users_key;
static pthread_once_t users_once = PTHREAD_ONCE_INIT;
static _Thread_local struct user me;

static void
unlist (void *opaque)
{
  struct user *user = opaque;

  LOCK_FOR_SCOPE (&users_lock);
  LIST_REMOVE (user, link);
}

static void
make_key (void)
{
  pthread_key_create (&users_key, unlist);
}

/* Once per thread.  It allocates no memory, because a write must not fail for
 * lack of memory.
 */
static void
list (void)
{
  pthread_once (&users_once, make_key);
  pthread_setspecific (users_key, &me);
  pthread_mutex_lock (&users_lock);
  LIST_INSERT_HEAD (&users, &me, link);
  pthread_mutex_unlock (&users_lock);
  me.listed = true;
}

/* The store is ordered before what the thread then looks at: either the thread
 * sees that the disk has failed, or the thread that replaces the disk sees this
 * use.
 */
void
local_use (struct nbdm *v)
{
  if (!me.listed)
    list ();
  if (me.depth++ == 0)
    atomic_store (&me.volume, v);
}

void
local_leave (void)
{
  if (--me.depth == 0)
    atomic_store_explicit (&me.volume, NULL, memory_order_release);
}

static void
turn (void)
{
  unsigned turns = atomic_load_explicit (&me.turns, memory_order_relaxed);

  atomic_store_explicit (&me.turns, turns + 1, memory_order_release);
}

/* Around a system call that may wait for the disk. */
static void
begin (struct nbdm *v)
{
  local_use (v);
  turn ();
}

static void
finish (void)
{
  turn ();
  local_leave ();
}

/* The ticker calls this 20 times a second, so that requests need not read the
 * clock.
 */
uint64_t
local_watch (struct nbdm *v)
{
  uint64_t now, longest = 0;
  struct user *user;

  LOCK_FOR_SCOPE (&users_lock);
  now = now_ns (); /* under the lock: not earlier than seen_ns */
  LIST_FOREACH (user, &users, link) {
    unsigned turns = atomic_load (&user->turns);

    if (turns % 2 == 0 || atomic_load (&user->volume) != v)
      continue;
    if (turns != user->seen) {
      user->seen = turns;
      user->seen_ns = now;
    }
    else if (now - user->seen_ns > longest)
      longest = now - user->seen_ns;
  }
  atomic_store (&v->local.silent_ns, longest);
  return longest;
}

bool
local_in_use (const struct nbdm *v)
{
  const struct user *user;

  LOCK_FOR_SCOPE (&users_lock);
  LIST_FOREACH (user, &users, link)
    if (user != &me && atomic_load (&user->volume) == v)
      return true;
  return false;
}

/* --- its size ---------------------------------------------------------- */

static int
size_now (const struct local_file *disk, uint64_t *size)
{
  struct stat st;

  if (disk->is_block)
    return ioctl (disk->fd, BLKGETSIZE64, size) < 0 ? -errno : 0;
  if (fstat (disk->fd, &st) < 0)
    return -errno;
  *size = (uint64_t)st.st_size;
  return 0;
}

static int
shrunk_error (const struct nbdm *v)
{
  return set_message (-EIO,
                      "the local disk has lost bytes: it is smaller than the "
                      "%llu it was opened with, and none of it is trusted",
                      (unsigned long long)v->local.file.size);
}

/* If a file was cut, a write past its new end makes it longer again, and the
 * gap reads as zeroes.  So once it was found smaller, no answer of it counts,
 * whatever its size is later.
 */
static int
check_size_here (struct nbdm *v)
{
  struct local_file *disk = &v->local.file;
  uint64_t size;

  if (!atomic_load (&disk->shrunk)
      && (size_now (disk, &size) < 0 || size >= disk->size))
    return 0;
  atomic_store (&disk->shrunk, true);
  return shrunk_error (v);
}

/* Checking the size costs a quarter of a small write where system calls are
 * expensive, and a disk is cut at most once.  So a thread that writes, or reads
 * bytes that no cut can have put there, checks the size once in 10 ms.
 */
#define LOOK_NS (10 * NS_PER_MS)

static int
look_at_size (struct nbdm *v)
{
  struct local_file *disk = &v->local.file;
  uint64_t now = now_coarse_ns ();

  if (now - atomic_load_explicit (&disk->looked_ns, memory_order_relaxed)
      < LOOK_NS)
    return atomic_load (&disk->shrunk) ? shrunk_error (v) : 0;
  atomic_store_explicit (&disk->looked_ns, now, memory_order_relaxed);
  return check_size_here (v);
}

/* Map to error codes that survive the wire and keep their meaning there.  A
 * file system in user space may answer with any code, also with one of the
 * engine's own, such as LOCAL_GIVEN_UP.
 */
static int
known_error (int err)
{
  if (err == EDQUOT || err == EFBIG)
    err = ENOSPC;
  return err == ENOSPC || err == ENOMEM ? -err : -EIO;
}

static int
local_error (int err, const char *what, uint64_t offset)
{
  return set_message (known_error (err),
                      "the local disk failed to %s at %llu: %s", what,
                      (unsigned long long)offset, strerror (err));
}

/* A disk is slow if it blocks threads, not if a call takes long.  Work that
 * only computes takes just as long in a worker thread, and waking a worker
 * takes longer on such a machine too.  Measured by the clock, the page cache of
 * an emulated CPU would be a slow disk, and every write would go to a worker.
 */
#define WATCHED_BYTES (64u << 10) /* larger ones mostly measure copying */
#define WATCH_EVERY 8u            /* measure one in so many while none blocks */
#define AWAKE_NS 1000 /* an average below this counts as not blocked */
#define QUICK_NS 60000
#define STALL_NS 500000 /* limit for one call: a stall is no trend */

struct watch {
  bool watching;
  long sleeps; /* number of times the thread has blocked so far */
  uint64_t start_ns;
};

static long
thread_sleeps (void)
{
  struct rusage usage;

  getrusage (RUSAGE_THREAD, &usage);
  return usage.ru_nvcsw;
}

/* Threads may overwrite each other's update of the average; losing one is
 * harmless.
 */
static struct watch
watch_begin (struct sleep_average *asleep, uint64_t count)
{
  if (count > WATCHED_BYTES)
    return (struct watch){ .watching = false };
  if (atomic_load_explicit (&asleep->ns, memory_order_relaxed) < AWAKE_NS
      && atomic_fetch_add_explicit (&asleep->turn, 1, memory_order_relaxed)
                 % WATCH_EVERY
             != 0)
    return (struct watch){ .watching = false };
  return (struct watch){ true, thread_sleeps (), now_ns () };
}

/* The average covers about the last sixteen measurements. */
static void
watch_end (struct sleep_average *asleep, const struct watch *watch)
{
  uint64_t before = atomic_load_explicit (&asleep->ns, memory_order_relaxed);
  uint64_t slept = 0;

  if (!watch->watching)
    return;
  if (thread_sleeps () != watch->sleeps)
    slept = now_ns () - watch->start_ns;
  slept = slept < STALL_NS ? slept : STALL_NS;
  atomic_store_explicit (&asleep->ns, before - before / 16 + slept / 16,
                         memory_order_relaxed);
}

bool
local_is_quick (const struct nbdm *v, bool writing)
{
  return v->local.io == NULL
         && atomic_load_explicit (&v->local.asleep[writing].ns,
                                  memory_order_relaxed)
                < QUICK_NS;
}

/* Can these bytes be in the gap of a file that was cut and that a write made
 * longer again?  The gap ends where that write begins, at the end of a sector,
 * so it holds the last byte of one.  Writes to a volume that is no whole number
 * of sectors begin anywhere.
 */
static bool
may_be_gap (const struct nbdm *v, const void *buf, uint64_t count)
{
  const char *bytes = buf;

  if (v->size % NBDM_SECTOR != 0 || count % NBDM_SECTOR != 0)
    return true;
  for (uint64_t end = NBDM_SECTOR; end <= count; end += NBDM_SECTOR)
    if (bytes[end - 1] == 0)
      return true;
  return false;
}

static int
pread_here (struct nbdm *v, void *buf, uint64_t count, uint64_t offset)
{
  struct watch watch = watch_begin (&v->local.asleep[false], count);
  int rc;

  begin (v);
  rc = fault_point ("local_read");
  if (rc == 0 && atomic_load (&v->local.file.shrunk))
    rc = -EIO;
  if (rc == 0)
    rc = full_pread (v->local.file.fd, buf, count, offset);
  if (rc == 0 && !v->local.file.is_block)
    rc = may_be_gap (v, buf, count) ? check_size_here (v) : look_at_size (v);
  watch_end (&v->local.asleep[false], &watch);
  /* A read past the end of a file that was cut is no bad sector. */
  if (rc < 0 && check_size_here (v) == 0)
    rc = local_error (-rc, "read", offset);
  finish ();
  return rc < 0 ? -EIO : 0;
}

/* A write past the end of a file that was cut makes it longer without an error.
 * If the write does not reach the old end, a check afterwards finds the cut;
 * otherwise the check must come first.
 */
static int
pwrite_inside (struct nbdm *v, const void *buf, uint64_t count, uint64_t offset)
{
  const struct local_file *disk = &v->local.file;
  int rc = 0;

  if (atomic_load (&disk->shrunk)
      || (!disk->is_block && offset + count >= disk->size
          && check_size_here (v) < 0))
    return -EIO;
  rc = full_pwrite (disk->fd, buf, count, offset);
  if (rc == 0 && !disk->is_block)
    rc = look_at_size (v);
  return rc;
}

/* The disk's error, unless the disk has lost bytes. */
static int
write_error (struct nbdm *v, int rc, const char *what, uint64_t offset)
{
  return check_size_here (v) < 0 ? -EIO : local_error (-rc, what, offset);
}

static int
pwrite_here (struct nbdm *v, const void *buf, uint64_t count, uint64_t offset)
{
  struct watch watch = watch_begin (&v->local.asleep[true], count);
  int rc;

  begin (v);
  rc = fault_point ("local_write");
  if (rc == 0)
    rc = pwrite_inside (v, buf, count, offset);
  watch_end (&v->local.asleep[true], &watch);
  if (rc < 0)
    rc = write_error (v, rc, "write", offset);
  finish ();
  return rc;
}

/* 0: done; 1: the disk does not support this kind of zeroing; -errno. */
static int
zero_by_fallocate (struct nbdm *v, int mode, uint64_t count, uint64_t offset)
{
  while (fallocate (v->local.file.fd, mode | FALLOC_FL_KEEP_SIZE, (off_t)offset,
                    (off_t)count)
         < 0) {
    if (errno == EINTR)
      continue;
    if (errno == EOPNOTSUPP || errno == ENOSYS
        || (errno == EINVAL && v->local.file.is_block))
      return 1;
    return -errno;
  }
  return 0;
}

static int
zero_by_writing (struct nbdm *v, uint64_t count, uint64_t offset)
{
  static const uint8_t zeroes[ZERO_WRITE];

  while (count > 0) {
    uint64_t n = count < ZERO_WRITE ? count : ZERO_WRITE;
    int rc = pwrite_inside (v, zeroes, n, offset);

    if (rc < 0)
      return rc;
    offset += n;
    count -= n;
  }
  return 0;
}

static int
zero_somehow (struct nbdm *v, uint64_t count, uint64_t offset, bool may_trim)
{
  int rc = 1;

  if (check_size_here (v) < 0)
    return -EIO;
  if (may_trim)
    rc = zero_by_fallocate (v, FALLOC_FL_PUNCH_HOLE, count, offset);
  if (rc == 1)
    rc = zero_by_fallocate (v, FALLOC_FL_ZERO_RANGE, count, offset);
  if (rc == 1)
    rc = zero_by_writing (v, count, offset);
  return rc;
}

static int
zero_here (struct nbdm *v, uint64_t count, uint64_t offset, bool may_trim)
{
  int rc;

  begin (v);
  rc = fault_point ("local_write");
  if (rc == 0)
    rc = zero_somehow (v, count, offset, may_trim);
  if (rc < 0)
    rc = write_error (v, rc, "zero", offset);
  finish ();
  return rc;
}

static int
flush_here (struct nbdm *v)
{
  int rc;

  begin (v);
  rc = fault_point ("local_flush");
  if (rc == 0 && fdatasync (v->local.file.fd) < 0)
    rc = -errno;
  if (rc < 0) {
    set_error (rc, "the local disk failed to flush");
    rc = known_error (-rc);
  }
  else
    rc = check_size_here (v);
  finish ();
  if (rc == 0)
    fault_point ("local_flushed");
  return rc;
}

static off_t
seek_here (struct nbdm *v, uint64_t offset, int whence)
{
  off_t found;

  begin (v);
  found = lseek (v->local.file.fd, (off_t)offset, whence);
  finish ();
  return found;
}

static int
sample_here (struct nbdm *v, void *buf, uint64_t count, uint64_t offset)
{
  int rc;

  begin (v);
  rc = full_pread (v->local.file.fd, buf, count, offset);
  finish ();
  return rc;
}

static int
advise_here (struct nbdm *v, uint64_t count, uint64_t offset)
{
  int rc;

  begin (v);
  rc = -posix_fadvise (v->local.file.fd, (off_t)offset, (off_t)count,
                       POSIX_FADV_WILLNEED);
  finish ();
  return rc;
}

static int
size_here (struct nbdm *v)
{
  int rc;

  begin (v);
  rc = check_size_here (v);
  finish ();
  return rc;
}

int64_t
local_carry_out (struct nbdm *v, const struct local_job *job)
{
  switch (job->act) {
  case LOCAL_READ:
    return pread_here (v, job->buf, job->count, job->offset);
  case LOCAL_SAMPLE:
    return sample_here (v, job->buf, job->count, job->offset);
  case LOCAL_WRITE:
    return pwrite_here (v, job->buf, job->count, job->offset);
  case LOCAL_ZERO:
    return zero_here (v, job->count, job->offset, job->may_trim);
  case LOCAL_FLUSH:
    return flush_here (v);
  case LOCAL_SEEK:
    return seek_here (v, job->offset, job->whence);
  case LOCAL_SIZE:
    return size_here (v);
  case LOCAL_ADVISE:
    return advise_here (v, job->count, job->offset);
  case LOCAL_CALL:
    return job->call (v, job->opaque);
  }
  return -EINVAL;
}

/* --- functions for the engine -------------------------------------------- */

/* A function of its own, so that a disk without a deadline pays nothing for it.
 */
static int __attribute__ ((noinline))
carried (struct nbdm *v, enum local_act act, void *buf, uint64_t count,
         uint64_t offset)
{
  const struct local_job job
      = { .act = act, .buf = buf, .count = count, .offset = offset };

  return (int)local_io_run (v, &job);
}

int
local_pread (struct nbdm *v, void *buf, uint64_t count, uint64_t offset)
{
  if (__builtin_expect (v->local.io != NULL, 0))
    return carried (v, LOCAL_READ, buf, count, offset);
  return pread_here (v, buf, count, offset);
}

int
local_pwrite (struct nbdm *v, const void *buf, uint64_t count, uint64_t offset)
{
  if (__builtin_expect (v->local.io != NULL, 0))
    return carried (v, LOCAL_WRITE, (void *)(uintptr_t)buf, count, offset);
  return pwrite_here (v, buf, count, offset);
}
