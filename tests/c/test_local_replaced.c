/* SPDX-License-Identifier: BSD-3-Clause */

/* No disk takes the place of a failed one while a request or a copy is still at
 * the failed one.
 */

#include <sys/stat.h>

#include "api.h"
#include "volume/flush.h"
#include "schedules.h"

struct nbdm;

/* A disk full of 0x55 beside the volume's own. */
static const char *
make_other_disk (void)
{
  static char path[100];
  static uint8_t buf[1 << 20];
  int fd;

  snprintf (path, sizeof path, "%s/other", site.dir);
  fd = open (path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  memset (buf, 0x55, sizeof buf);
  for (unsigned at = 0; at < SIZE; at += sizeof buf)
    assert (pwrite (fd, buf, sizeof buf, at) == (ssize_t)sizeof buf);
  close (fd);
  return path;
}

static void
assert_untouched (const char *path)
{
  static uint8_t buf[1 << 20];
  int fd = open (path, O_RDONLY | O_CLOEXEC);

  for (unsigned at = 0; at < SIZE; at += sizeof buf) {
    assert (pread (fd, buf, sizeof buf, at) == (ssize_t)sizeof buf);
    for (unsigned i = 0; i < sizeof buf; i++)
      assert (buf[i] == 0x55);
  }
  close (fd);
}

/* A client's read is at the failed disk. */
static void
read_of_a_replaced_disk (void)
{
  struct job reader = { .offset = 3 * REGION };
  const char *other;

  bring_up (1, 300);
  assert (write_at (3 * REGION, 11) == 0);
  assert (nbdm_flush (site.volume) == 0);
  start (&reader, do_read);
  wait_at_gate ();
  assert (write_at (7 * REGION, 1) == 0);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  other = make_other_disk ();
  assert (nbdm_local_attach (site.volume, other, 1) == -EBUSY);
  open_gate ();
  assert (end (&reader) == 11);
  assert (nbdm_local_attach (site.volume, other, 1) == 0);
  assert (read_at (3 * REGION) == 11);
}

static atomic_bool hold_reads; /* by the wrapped local_pread */

int __real_local_pread (struct nbdm *v, void *buf, uint64_t count,
                        uint64_t offset);
int __wrap_local_pread (struct nbdm *v, void *buf, uint64_t count,
                        uint64_t offset);
int
__wrap_local_pread (struct nbdm *v, void *buf, uint64_t count, uint64_t offset)
{
  if (atomic_exchange (&hold_reads, false))
    stand_at ("gate");
  return __real_local_pread (v, buf, count, offset);
}

/* A client's read has found the disk good, and is not at it yet: it would read
 * what the disk in its place had before anything was copied to it, and find
 * that one good.
 */
static void
read_that_found_the_disk_good (void)
{
  struct job reader = { .offset = 7 * REGION };

  bring_up (1, 300);
  assert (write_at (7 * REGION, 1) == 0);
  assert (nbdm_flush (site.volume) == 0);
  hold_reads = true;
  start (&reader, do_read);
  wait_at_gate ();
  assert (write_at (7 * REGION, 2) == 0);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  assert (nbdm_local_attach (site.volume, site.local, 0) == -EBUSY);
  open_gate ();
  assert (end (&reader) == 2);
  assert (nbdm_local_attach (site.volume, site.local, 0) == 0);
}

/* A copy to the second remote reads from the failed disk. */
static void
copy_from_a_replaced_disk (void)
{
  struct job copy = { 0 };
  const char *other;

  bring_up (2, 300);
  lose (1);
  assert (write_at (5 * REGION, 7) == 0);
  site_connect (&site, 1);
  start (&copy, do_resync_second);
  wait_at_gate ();
  assert (write_at (100 * REGION, 8) == 0);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  other = make_other_disk ();
  assert (nbdm_local_attach (site.volume, other, 1) == -EBUSY);
  open_gate ();
  assert (end (&copy) == 0);
  assert (nbdm_local_attach (site.volume, other, 1) == 0);
  site_resync_to_end (&site, 1);
  assert (peer_image (site.peers[1])[5 * REGION] == 7);
}

/* A copy back has read from the remote: what it read is not written to a disk
 * that no sample has shown to be the right one.
 */
static void
copy_back_to_a_replaced_disk (void)
{
  struct job back = { 0 };
  const char *other;

  bring_up (1, 300);
  assert (write_at (7 * REGION, 1) == 0);
  attach_and_admit ();
  start (&back, do_copy_back);
  wait_at_gate ();
  assert (write_at (40 * REGION, 2) == 0);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  other = make_other_disk ();
  assert (nbdm_local_attach (site.volume, other, 0) == -EBUSY);
  open_gate ();
  end (&back);
  assert (nbdm_local_attach (site.volume, other, 0) == 0);
  assert_untouched (other);
}

static atomic_uint hold_flushes; /* of 2 the wrapped local_flush holds one */
static atomic_bool fail_flush;   /* that one, which is not carried out */

int __real_local_flush (struct nbdm *v);
int __wrap_local_flush (struct nbdm *v);
int
__wrap_local_flush (struct nbdm *v)
{
  unsigned left = hold_flushes;

  if (left > 0)
    hold_flushes = left - 1;
  if (left == 2)
    stand_at ("gate");
  if (left == 2 && fail_flush)
    return -EIO;
  return __real_local_flush (v);
}

static uint64_t
flushes_asked (void)
{
  uint64_t asked;

  pthread_mutex_lock (&site.volume->lock);
  asked = site.volume->local.disk.flush.asked;
  pthread_mutex_unlock (&site.volume->lock);
  return asked;
}

/* A client sent a flush before the disk failed, and it waited for another
 * flush: it begins nothing on the failed disk.
 */
static void
flush_that_waited_for_a_failed_disk (void)
{
  struct job first = { 0 }, second = { 0 };
  uint64_t asked;

  bring_up (1, 300);
  assert (write_at (3 * REGION, 1) == 0);
  asked = flushes_asked ();
  hold_flushes = 2;
  start (&first, do_flush);
  wait_at_gate ();
  start (&second, do_flush);
  WAIT_FOR (flushes_asked () == asked + 2);
  assert (write_at (7 * REGION, 2) == 0);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  open_gate ();
  assert (end (&first) == 0 && end (&second) == 0);
  assert (hold_flushes == 1); /* no second one came to the disk */
  attach_and_admit ();
  assert (nbdm_flush (site.volume) == 0);
  assert (local_status ().state == NBDM_LOCAL_RESYNCING);
}

static atomic_bool hold_call; /* by the wrapped local_call */

int __real_local_call (struct nbdm *v, int (*call) (struct nbdm *v, void *),
                       void (*drop) (void *), void *opaque);
int __wrap_local_call (struct nbdm *v, int (*call) (struct nbdm *v, void *),
                       void (*drop) (void *), void *opaque);
int
__wrap_local_call (struct nbdm *v, int (*call) (struct nbdm *v, void *),
                   void (*drop) (void *), void *opaque)
{
  if (atomic_exchange (&hold_call, false))
    stand_at ("attach");
  return __real_local_call (v, call, drop, opaque);
}

static int
do_flush_local (struct job *job)
{
  (void)job;
  return flush_local_group (site.volume);
}

/* A flush found the disk good, and comes to it when it has failed and an
 * operator's command has found it without users.  Were the flush to begin, its
 * error would come when the new disk is in use.
 */
static void
flush_that_comes_to_a_failed_disk (void)
{
  struct job attach = { 0 }, flush = { 0 };

  bring_up (1, 300);
  assert (write_at (7 * REGION, 1) == 0);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  hold_call = true;
  start (&attach, do_attach);
  wait_at ("attach");
  hold_flushes = 2;
  fail_flush = true;
  start (&flush, do_flush_local);
  WAIT_FOR (flush.over || access ("gate.reached", F_OK) == 0);
  open_at ("attach");
  assert (end (&attach) == 0);
  assert (nbdm_disk_admit (site.volume, NBDM_LOCAL) == 0);
  open_gate ();
  (void)end (&flush);
  hold_flushes = 0;
  assert (nbdm_flush (site.volume) == 0);
  assert (local_status ().state == NBDM_LOCAL_RESYNCING);
}

/* --- a disk that hangs when it is admitted -------------------------------- */

static atomic_bool hold_describe; /* by the wrapped device_describe */

void __real_device_describe (int fd, char *text, size_t size);
void __wrap_device_describe (int fd, char *text, size_t size);
void
__wrap_device_describe (int fd, char *text, size_t size)
{
  if (atomic_exchange (&hold_describe, false))
    stand_at ("gate");
  __real_device_describe (fd, text, size);
}

static int
do_admit (struct job *job)
{
  (void)job;
  return nbdm_disk_admit (site.volume, NBDM_LOCAL);
}

/* Threads that need the volume's lock go on. */
static void
admitted_disk_hangs (void)
{
  struct job admit = { 0 }, write = { .offset = 3 * REGION, .value = 8 };

  bring_up (1, 300);
  assert (write_at (7 * REGION, 1) == 0);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  assert (nbdm_local_attach (site.volume, site.local, 0) == 0);
  hold_describe = true;
  start (&admit, do_admit);
  wait_at_gate ();
  start (&write, do_write);
  WAIT_FOR (write.over);
  assert (end (&write) == 0 && read_at (3 * REGION) == 8);
  open_gate ();
  assert (end (&admit) == 0);
  assert (local_status ().state == NBDM_LOCAL_RESYNCING);
}

/* A flush of copied-back regions hangs, in a thread that has flushed before.
 * The status shows that the disk is silent.
 */
static void
flush_of_a_replaced_disk (void)
{
  struct job back = { 0 };
  const char *other;

  bring_up (1, 300);
  assert (write_at (7 * REGION, 1) == 0);
  attach_and_admit ();
  start (&back, do_copy_back_one);
  wait_at_gate ();
  WAIT_FOR (local_status ().local.silent_ms >= 100);
  assert (write_at (40 * REGION, 2) == 0);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  other = make_other_disk ();
  assert (nbdm_local_attach (site.volume, other, 0) == -EBUSY);
  open_gate ();
  end (&back);
  assert (nbdm_local_attach (site.volume, other, 0) == 0);
}

/* The disk was brought back, took a write that the remote missed, and cannot be
 * opened at the next start: it has the only copy, which another disk in its
 * place would give up.
 */
static void
disk_with_the_only_copy (void)
{
  const char *other;
  char away[100];

  bring_up (1, 300);
  assert (write_at (7 * REGION, 1) == 0); /* local fails */
  attach_and_admit ();
  lose (0);
  assert (write_at (200 * REGION, 5) == 0);
  assert (nbdm_stop (site.volume) == 0);
  nbdm_close (site.volume);
  snprintf (away, sizeof away, "%s/away", site.dir);
  assert (rename (site.local, away) == 0);
  site_open (&site);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  site_connect (&site, 0);
  assert (read_at (200 * REGION) == -EIO);
  other = make_other_disk ();
  assert (nbdm_local_attach (site.volume, other, 1) == -EBUSY);
  assert_untouched (other);
  ASSERT_SAYS ("has the only copy of something");
  assert (rename (away, site.local) == 0);
  attach_and_admit ();
  assert (read_at (200 * REGION) == 5 && read_at (7 * REGION) == 1);
}

static atomic_int fail_syncs; /* of the local disk; an errno, or 0 */
static atomic_bool hold_sync; /* the next one that fails */

int __real_fdatasync (int fd);
int __wrap_fdatasync (int fd);
int
__wrap_fdatasync (int fd)
{
  struct stat st, local;

  if (!fail_syncs || fstat (fd, &st) < 0 || stat (site.local, &local) < 0
      || st.st_ino != local.st_ino || st.st_dev != local.st_dev)
    return __real_fdatasync (fd);
  if (atomic_exchange (&hold_sync, false))
    stand_at ("gate");
  errno = fail_syncs;
  return -1;
}

/* The flush of a disk that is brought back fails: the kernel has dropped pages
 * of it, which no map shows, and says so once.  At the next attempt nothing of
 * the disk is believed.
 */
static void
flush_of_an_attached_disk_fails (void)
{
  bring_up (1, 300);
  assert (write_at (200 * REGION, 7) == 0);
  assert (nbdm_cool (site.volume, 0) == 0);
  assert (write_at (3 * REGION, 1) == 0); /* local fails */
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  fail_syncs = ECANCELED; /* as a file system in user space may answer */
  assert (nbdm_local_attach (site.volume, site.local, 0) == -EIO);
  punch_local (200 * REGION);
  fail_syncs = 0;
  attach_and_admit ();
  assert (read_at (200 * REGION) == 7);
  assert (do_copy_back (NULL) == 0);
  assert (local_status ().state == NBDM_LOCAL_OK);
  assert (read_at (200 * REGION) == 7);
}

/* The same while the volume stops, which does not wait for the command. */
static void
flush_of_an_attached_disk_fails_in_a_stop (void)
{
  struct job attach = { 0 };

  bring_up (1, 300);
  assert (write_at (200 * REGION, 7) == 0);
  assert (nbdm_cool (site.volume, 0) == 0);
  assert (write_at (3 * REGION, 1) == 0); /* local fails */
  fail_syncs = EIO;
  hold_sync = true;
  start (&attach, do_attach);
  wait_at_gate ();
  assert (nbdm_stop (site.volume) == 0);
  open_gate ();
  assert (end (&attach) < 0);
  nbdm_close (site.volume);
  punch_local (200 * REGION);
  fail_syncs = 0;
  site_open (&site);
  site_connect (&site, 0);
  attach_and_admit ();
  assert (read_at (200 * REGION) == 7);
}

/* A copy of the disk in the state directory, behind a link: every start would
 * refuse it, so nothing is copied to it.
 */
static void
disk_in_the_state (void)
{
  char command[600], link[200];

  bring_up (1, 300);
  assert (write_at (3 * REGION, 1) == 0); /* local fails */
  snprintf (link, sizeof link, "%s/link", site.dir);
  snprintf (command, sizeof command, "cp %s %s/disk && ln -s %s/disk %s",
            site.local, site.state, site.state, link);
  assert (system (command) == 0);
  for (int replaced = 0; replaced < 2; replaced++) {
    assert (nbdm_local_attach (site.volume, link, replaced) == -EINVAL);
    assert (strstr (nbdm_last_error (), "lies in the state directory"));
    assert (nbdm_disk_admit (site.volume, NBDM_LOCAL) == -ENODEV);
  }
  assert (unlink (link) == 0 && symlink (site.local, link) == 0);
  assert (nbdm_local_attach (site.volume, link, 0) == 0);
  assert (nbdm_disk_admit (site.volume, NBDM_LOCAL) == 0);
}

static const struct schedule schedules[] = {
  { "disk_in_the_state", "local_write:1=error", disk_in_the_state },
  { "flush_of_an_attached_disk_fails_in_a_stop", "local_write:2=error",
    flush_of_an_attached_disk_fails_in_a_stop },
  { "flush_of_an_attached_disk_fails", "local_write:2=error",
    flush_of_an_attached_disk_fails },
  { "disk_with_the_only_copy", "local_write:1=error", disk_with_the_only_copy },
  { "read_of_a_replaced_disk", "local_write:2=error,local_read:1=wait:gate",
    read_of_a_replaced_disk },
  { "read_that_found_the_disk_good", "local_write:2=error",
    read_that_found_the_disk_good },
  { "copy_from_a_replaced_disk", "local_write:2=error,local_read:1=wait:gate",
    copy_from_a_replaced_disk },
  { "copy_back_to_a_replaced_disk",
    "local_write:1=error,local_write:2=error,"
    "local_resync_after_read:1=wait:gate",
    copy_back_to_a_replaced_disk },
  { "flush_that_waited_for_a_failed_disk", "local_write:2=error",
    flush_that_waited_for_a_failed_disk },
  { "flush_that_comes_to_a_failed_disk", "local_write:1=error",
    flush_that_comes_to_a_failed_disk },
  { "admitted_disk_hangs", "local_write:1=error", admitted_disk_hangs },
  { "flush_of_a_replaced_disk",
    "local_write:1=error,local_write:3=error,local_flush:3=wait:gate",
    flush_of_a_replaced_disk },
};

int
main (int argc, char *argv[])
{
  return run_schedules (schedules, sizeof schedules / sizeof schedules[0], argc,
                        argv);
}
