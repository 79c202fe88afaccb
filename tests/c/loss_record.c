/* SPDX-License-Identifier: BSD-3-Clause */

/* The recorded calls of files: the state directory's, and the local disk's. See
 * loss.h.
 *
 * A sync is not really made: the model says what it makes durable, and it is
 * given some time instead, in which other threads may go on, without the lock.
 * A call that writes is made under the lock where it cannot block, so that an
 * event lies before and after it.
 */

#define _GNU_SOURCE

#include <poll.h>
#include <sched.h>
#include <stdarg.h>
#include <sys/mman.h>

#include "loss_calls.h"

#define BOOT_ID_FILE "/proc/sys/kernel/random/boot_id"
#define MAX_FDS 4096
#define MAX_MAPPINGS 64

enum fd_kind { FD_OTHER, FD_DIRECTORY, FD_STATE, FD_LOCAL };

static struct {
  _Atomic enum fd_kind kind;
  struct inode *inode;
} fds[MAX_FDS];

static struct mapping {
  char *start;
  size_t size;
  struct inode *inode;
} mappings[MAX_MAPPINGS];
static unsigned nr_mappings;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static const struct site *recorded; /* NULL: nothing is */
static loss_event on_event;
static const char *boot;
static _Thread_local const char *pretended;
static _Thread_local uint64_t nap;

void
loss_lock (void)
{
  pthread_mutex_lock (&lock);
}

void
loss_unlock (void)
{
  pthread_mutex_unlock (&lock);
}

void
loss_set_boot (const char *id)
{
  boot = id;
}

void
loss_pretend_boot (const char *id)
{
  pretended = id;
}

void
loss_look (bool sync)
{
  int saved = errno;

  if (recorded)
    on_event (sync);
  errno = saved;
}

void
loss_record (const struct site *site, loss_event what)
{
  int dirfd = open (site->state, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  int fd = open (site->local, O_RDONLY | O_CLOEXEC);

  assert (dirfd >= 0 && fd >= 0);
  loss_lock ();
  pages_adopt (dirfd);
  disk_adopt_local (fd);
  recorded = site;
  on_event = what;
  loss_unlock ();
  close (fd);
  close (dirfd);
}

void
loss_stop_recording (void)
{
  loss_lock ();
  recorded = NULL;
  nr_mappings = 0;
  pages_drop ();
  loss_unlock ();
}

/* --- descriptors ----------------------------------------------------- */

static enum fd_kind
kind_of (int fd)
{
  if (fd < 0 || fd >= MAX_FDS || recorded == NULL || pretended)
    return FD_OTHER;
  return fds[fd].kind;
}

static void
note_fd (int fd, enum fd_kind kind, struct inode *inode)
{
  if (fd < 0)
    return;
  assert (fd < MAX_FDS);
  fds[fd].inode = inode;
  fds[fd].kind = kind;
}

int __real_open (const char *path, int flags, ...);
int __wrap_open (const char *path, int flags, ...);
int
__wrap_open (const char *path, int flags, ...)
{
  va_list args;
  mode_t mode;
  int fd;

  va_start (args, flags);
  mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg (args, mode_t) : 0;
  va_end (args);
  fd = __real_open (path, flags, mode);
  if (recorded && !pretended && strcmp (path, recorded->state) == 0)
    note_fd (fd, FD_DIRECTORY, NULL);
  else if (recorded && !pretended && strcmp (path, recorded->local) == 0)
    note_fd (fd, FD_LOCAL, NULL);
  return fd;
}

int __real_openat (int dirfd, const char *path, int flags, ...);
int __wrap_openat (int dirfd, const char *path, int flags, ...);
int
__wrap_openat (int dirfd, const char *path, int flags, ...)
{
  va_list args;
  mode_t mode;
  int fd;

  va_start (args, flags);
  mode = flags & O_CREAT ? va_arg (args, mode_t) : 0;
  va_end (args);
  if (kind_of (dirfd) != FD_DIRECTORY || strcmp (path, "lock") == 0)
    return __real_openat (dirfd, path, flags, mode);
  loss_lock ();
  fd = __real_openat (dirfd, path, flags, mode);
  if (fd >= 0)
    note_fd (fd, FD_STATE, pages_open (path, fd));
  loss_look (false);
  loss_unlock ();
  return fd;
}

WRAPPED (int, close, int fd)
{
  if (fd >= 0 && fd < MAX_FDS && !pretended)
    fds[fd].kind = FD_OTHER;
  return __real_close (fd);
}

WRAPPED (FILE *, fopen, const char *path, const char *mode)
{
  const char *id = pretended ? pretended : boot;

  if (strcmp (path, BOOT_ID_FILE) != 0 || id == NULL)
    return __real_fopen (path, mode);
  return fmemopen ((char *)id, strlen (id), "r");
}

/* --- names ----------------------------------------------------------- */

WRAPPED (int, renameat, int from_fd, const char *from, int to_fd,
         const char *to)
{
  int r;

  if (kind_of (from_fd) != FD_DIRECTORY)
    return __real_renameat (from_fd, from, to_fd, to);
  loss_lock ();
  r = __real_renameat (from_fd, from, to_fd, to);
  if (r == 0)
    pages_rename (from, to);
  loss_look (false);
  loss_unlock ();
  return r;
}

WRAPPED (int, unlinkat, int dirfd, const char *path, int flags)
{
  int r;

  if (kind_of (dirfd) != FD_DIRECTORY)
    return __real_unlinkat (dirfd, path, flags);
  loss_lock ();
  r = __real_unlinkat (dirfd, path, flags);
  if (r == 0)
    pages_unlink (path);
  loss_look (false);
  loss_unlock ();
  return r;
}

/* --- writes ---------------------------------------------------------- */

/* The caller does not hold the lock: a disk takes its time, and other threads
 * run.
 */
static void
take_time (void)
{
  if (nap == 0)
    nap = (uintptr_t)&nap | 1;
  if (peer_random (&nap) % 16 == 0)
    poll (NULL, 0, 1);
  else
    sched_yield ();
}

static struct write_op *
begin_local (uint64_t offset, uint64_t length, const void *data)
{
  struct write_op *op;

  loss_lock ();
  op = disk_begin (LOSS_LOCAL, offset, length, data, 0);
  loss_look (false);
  loss_unlock ();
  take_time ();
  return op;
}

static void
end_local (struct write_op *op, bool done)
{
  loss_lock ();
  if (done)
    disk_end (LOSS_LOCAL, op, false);
  else
    disk_cancel (LOSS_LOCAL, op);
  loss_look (false);
  loss_unlock ();
}

WRAPPED (ssize_t, pwrite, int fd, const void *buf, size_t count, off_t offset)
{
  enum fd_kind kind = kind_of (fd);
  struct write_op *op;
  ssize_t n;

  if (kind == FD_LOCAL) {
    op = begin_local ((uint64_t)offset, count, buf);
    n = __real_pwrite (fd, buf, count, offset);
    assert (n == (ssize_t)count);
    end_local (op, true);
    return n;
  }
  if (kind != FD_STATE)
    return __real_pwrite (fd, buf, count, offset);
  loss_lock ();
  n = __real_pwrite (fd, buf, count, offset);
  loss_look (false);
  loss_unlock ();
  return n;
}

WRAPPED (int, fallocate, int fd, int mode, off_t offset, off_t length)
{
  struct write_op *op;
  int r;

  if (kind_of (fd) != FD_LOCAL)
    return __real_fallocate (fd, mode, offset, length);
  op = begin_local ((uint64_t)offset, (uint64_t)length, NULL);
  r = __real_fallocate (fd, mode, offset, length);
  end_local (op, r == 0);
  return r;
}

/* --- syncs ----------------------------------------------------------- */

static void
sync_pages (struct inode *inode, uint64_t offset, uint64_t length)
{
  uint64_t stamp;

  loss_lock ();
  loss_look (true);
  stamp = pages_stamp (inode);
  loss_unlock ();
  take_time ();
  loss_lock ();
  pages_synced (inode, stamp, offset, length);
  loss_look (true);
  loss_unlock ();
}

static void
sync_local (void)
{
  uint64_t stamp;

  loss_lock ();
  loss_look (true);
  stamp = disk_stamp ();
  loss_unlock ();
  take_time ();
  loss_lock ();
  disk_flushed (LOSS_LOCAL, stamp);
  loss_look (true);
  loss_unlock ();
}

static int
sync_fd (int fd)
{
  switch (kind_of (fd)) {
  case FD_STATE:
    sync_pages (fds[fd].inode, 0, UINT64_MAX);
    break;
  case FD_DIRECTORY:
    sync_pages (NULL, 0, 0);
    break;
  case FD_LOCAL:
    sync_local ();
    break;
  case FD_OTHER: /* of a recovery that is thrown away */
    break;
  }
  return 0;
}

int __wrap_fdatasync (int fd);
int
__wrap_fdatasync (int fd)
{
  return sync_fd (fd);
}

int __wrap_fsync (int fd);
int
__wrap_fsync (int fd)
{
  return sync_fd (fd);
}

WRAPPED (void *, mmap, void *address, size_t size, int protection, int flags,
         int fd, off_t offset)
{
  void *p = __real_mmap (address, size, protection, flags, fd, offset);

  if (p == MAP_FAILED || kind_of (fd) != FD_STATE)
    return p;
  loss_lock ();
  assert (nr_mappings < MAX_MAPPINGS);
  mappings[nr_mappings++] = (struct mapping){ p, size, fds[fd].inode };
  loss_unlock ();
  return p;
}

WRAPPED (int, munmap, void *address, size_t size)
{
  if (!pretended) {
    loss_lock ();
    for (unsigned i = 0; i < nr_mappings; i++)
      if (mappings[i].start == address)
        mappings[i] = mappings[--nr_mappings];
    loss_unlock ();
  }
  return __real_munmap (address, size);
}

int __wrap_msync (void *address, size_t length, int flags);
int
__wrap_msync (void *address, size_t length, int flags TEST_UNUSED)
{
  struct mapping found = { 0 };

  if (pretended)
    return 0;
  loss_lock ();
  for (unsigned i = 0; recorded && i < nr_mappings; i++)
    if (mappings[i].start <= (char *)address
        && (char *)address < mappings[i].start + mappings[i].size)
      found = mappings[i];
  loss_unlock ();
  if (found.inode)
    sync_pages (found.inode, (uint64_t)((char *)address - found.start), length);
  return 0;
}
