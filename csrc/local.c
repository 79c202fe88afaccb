/* SPDX-License-Identifier: BSD-3-Clause */

/* The local disk: a file or a block device, adopted as it is.
 *
 * Reads and writes go through the page cache; what is durable is what a flush
 * or FUA made so, as with any disk that has a write cache.  Zeroing must
 * leave zeroes behind whatever the file system can do: hole, zeroed range, or
 * plain writes.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "internal.h"
#include "volume.h"

#define ZERO_WRITE (1u << 20) /* bytes of zeroes written at a time */

/* One writer a disk.  An open-file-description lock is seen by qemu, which
 * locks its images this way, as well as by another server of ours; a mounted
 * or otherwise claimed block device refuses O_EXCL.
 */
static int
lock_disk (int fd, const char *path)
{
  struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };

  if (fcntl (fd, F_OFD_SETLK, &lock) == 0)
    return 0;
  if (errno == EAGAIN || errno == EACCES)
    return set_message (-EBUSY,
                        "the local disk %s is in use by another program", path);
  return set_error (-errno, "cannot lock the local disk %s", path);
}

/* Which kinds of zeroing the file system can do, tried on a nameless file
 * beside the disk: trying on the disk would change it.
 */
static void
probe_zeroing (struct local_disk *disk, const char *path)
{
  char *copy = strdup (path);
  int fd
      = copy ? open (dirname (copy), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600) : -1;

  disk->can_punch = disk->can_zero_range = false;
  if (fd >= 0 && ftruncate (fd, 4096) == 0) {
    disk->can_punch
        = fallocate (fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096)
          == 0;
    disk->can_zero_range
        = fallocate (fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, 0, 4096)
          == 0;
  }
  if (fd >= 0)
    close (fd);
  free (copy);
}

static int
check_kind (struct local_disk *disk, const char *path)
{
  struct stat st;

  if (stat (path, &st) < 0)
    return errno == ENOENT
               ? set_message (-ENOENT,
                              "the local disk %s does not exist; if it was "
                              "lost, an empty one in its place would read as "
                              "zeroes",
                              path)
               : set_error (-errno, "cannot look at the local disk %s", path);
  if (!S_ISREG (st.st_mode) && !S_ISBLK (st.st_mode))
    return set_message (-EINVAL,
                        "the local disk %s is neither a file nor a block "
                        "device",
                        path);
  disk->is_block = S_ISBLK (st.st_mode);
  return 0;
}

int
local_open (struct local_disk *disk, const char *path, uint64_t *size)
{
  off_t end;
  int rc = check_kind (disk, path);

  if (rc < 0)
    return rc;
  disk->fd = open (path, O_RDWR | O_CLOEXEC | (disk->is_block ? O_EXCL : 0));
  if (disk->fd < 0)
    return errno == EBUSY
               ? set_message (-EBUSY,
                              "the local disk %s is in use (mounted, or part "
                              "of another device)",
                              path)
               : set_error (-errno, "cannot open the local disk %s", path);
  rc = lock_disk (disk->fd, path);
  if (rc < 0)
    return rc;
  end = lseek (disk->fd, 0, SEEK_END);
  if (end < 0)
    return set_error (-errno, "cannot tell the size of %s", path);
  *size = (uint64_t)end;
  if (!disk->is_block)
    probe_zeroing (disk, path);
  return 0;
}

/* Only what survives the wire and means the same there. */
static int
local_error (int err, const char *what, uint64_t offset)
{
  if (err == EDQUOT || err == EFBIG)
    err = ENOSPC;
  if (err != ENOSPC && err != ENOMEM)
    return set_message (-EIO, "the local disk failed to %s at %llu: %s", what,
                        (unsigned long long)offset, strerror (err));
  return set_error (-err, "the local disk failed to %s at %llu", what,
                    (unsigned long long)offset);
}

/* A disk is slow that keeps threads asleep, not one that takes long: what only
 * computes takes a worker as long, and waking one takes longer on such a
 * machine too.  By the clock the page cache was a slow disk where the CPU is
 * emulated, and every write went the long way.
 */
#define WATCHED_BYTES (64u << 10) /* larger ones tell of copying */
#define WATCH_EVERY 8u            /* so many go by unseen, while none sleeps */
#define AWAKE_NS 1000             /* what is left of an average then */
#define QUICK_NS 60000
#define STALL_NS 500000 /* at most: one stall says nothing of the next */

struct watch {
  bool watching;
  long sleeps; /* of the thread, in its life */
  uint64_t start_ns;
};

static long
thread_sleeps (void)
{
  struct rusage usage;

  getrusage (RUSAGE_THREAD, &usage);
  return usage.ru_nvcsw;
}

/* Threads may overtake each other in the average, and a sample be lost. */
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

/* The average is over the last sixteen or so. */
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
  return atomic_load_explicit (&v->local.asleep[writing].ns,
                               memory_order_relaxed)
         < QUICK_NS;
}

int
local_pread (struct nbdm *v, void *buf, uint64_t count, uint64_t offset)
{
  struct watch watch = watch_begin (&v->local.asleep[false], count);
  int rc = fault_point ("local_read");

  if (rc == 0)
    rc = full_pread (v->local.disk.fd, buf, count, offset);
  watch_end (&v->local.asleep[false], &watch);
  return rc < 0 ? local_error (-rc, "read", offset) : 0;
}

int
local_pwrite (struct nbdm *v, const void *buf, uint64_t count, uint64_t offset)
{
  struct watch watch = watch_begin (&v->local.asleep[true], count);
  int rc = fault_point ("local_write");

  if (rc == 0)
    rc = full_pwrite (v->local.disk.fd, buf, count, offset);
  watch_end (&v->local.asleep[true], &watch);
  return rc < 0 ? local_error (-rc, "write", offset) : 0;
}

/* 0: done; 1: this kind of zeroing is not to be had here; -errno. */
static int
zero_by_fallocate (struct nbdm *v, int mode, uint64_t count, uint64_t offset)
{
  while (fallocate (v->local.disk.fd, mode | FALLOC_FL_KEEP_SIZE, (off_t)offset,
                    (off_t)count)
         < 0) {
    if (errno == EINTR)
      continue;
    if (errno == EOPNOTSUPP || errno == ENOSYS
        || (errno == EINVAL && v->local.disk.is_block))
      return 1;
    return local_error (errno, "zero", offset);
  }
  return 0;
}

static int
zero_by_writing (struct nbdm *v, uint64_t count, uint64_t offset)
{
  static const uint8_t zeroes[ZERO_WRITE];

  while (count > 0) {
    uint64_t n = count < ZERO_WRITE ? count : ZERO_WRITE;
    int rc = full_pwrite (v->local.disk.fd, zeroes, n, offset);

    if (rc < 0)
      return local_error (-rc, "zero", offset);
    offset += n;
    count -= n;
  }
  return 0;
}

int
local_zero (struct nbdm *v, uint64_t count, uint64_t offset, bool may_trim)
{
  int rc = fault_point ("local_write");

  if (rc < 0)
    return local_error (-rc, "zero", offset);
  rc = 1;
  if (may_trim)
    rc = zero_by_fallocate (v, FALLOC_FL_PUNCH_HOLE, count, offset);
  if (rc == 1)
    rc = zero_by_fallocate (v, FALLOC_FL_ZERO_RANGE, count, offset);
  if (rc == 1)
    rc = zero_by_writing (v, count, offset);
  return rc;
}

bool
local_fast_zero (const struct nbdm *v, bool may_trim)
{
  return v->local.disk.can_zero_range || (may_trim && v->local.disk.can_punch);
}

int
local_flush (struct nbdm *v)
{
  int rc = fault_point ("local_flush");

  if (rc == 0 && fdatasync (v->local.disk.fd) < 0)
    rc = -errno;
  if (rc < 0)
    return set_error (rc, "the local disk failed to flush");
  fault_point ("local_flushed");
  return 0;
}

uint64_t
local_hole_end (struct nbdm *v, uint64_t offset, uint64_t end)
{
  off_t data = lseek (v->local.disk.fd, (off_t)offset, SEEK_DATA);

  if (data < 0)
    return errno == ENXIO && !v->local.disk.is_block ? end : offset;
  return (uint64_t)data < end ? (uint64_t)data : end;
}

uint64_t
local_data_end (struct nbdm *v, uint64_t offset, uint64_t end)
{
  off_t hole = lseek (v->local.disk.fd, (off_t)offset, SEEK_HOLE);

  if (hole < 0 || (uint64_t)hole <= offset || (uint64_t)hole > end)
    return end;
  return (uint64_t)hole;
}
