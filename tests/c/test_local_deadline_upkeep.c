/* SPDX-License-Identifier: BSD-3-Clause */

/* The local disk keeps a call that no client asked for, and there is a deadline
 * for it: an operator attaches the disk, a keeper compares it or copies to it,
 * the volume stops.  No range stays locked, and the stop ends.
 */

#define _GNU_SOURCE
#include "api.h"
#include "logs/layout.h"
#include "hung_disk.h"

#define MAX_CALLS 128 /* under way at a time: see local_io.c */
#define SOON_S 20 /* less than a fault point waits, and the volume's limits */

static bool
exists (const char *name)
{
  return access (name, F_OK) == 0;
}

/* --- a disk that is attached ---------------------------------------------- */

/* Attaching this disk, by any name, or another disk is refused. */
static void
refused_while_a_call_is_kept (void)
{
  char link_path[100], other[100];
  int fd;

  keep_and_answer (do_write, 0);
  snprintf (link_path, sizeof link_path, "%s/link", site.dir);
  snprintf (other, sizeof other, "%s/other", site.dir);
  assert (link (site.local, link_path) == 0);
  fd = open (other, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  assert (fd >= 0 && ftruncate (fd, SIZE) == 0);
  close (fd);
  assert (nbdm_local_attach (site.volume, link_path, 0) == -EBUSY);
  ASSERT_SAYS ("a request to the failed disk has not ended yet");
  assert (nbdm_local_attach (site.volume, link_path, 1) == -EBUSY);
  assert (nbdm_local_attach (site.volume, other, 1) == -EBUSY);
  open_gate ();
  WAIT_FOR (nbdm_local_attach (site.volume, link_path, 0) == 0);
  assert (nbdm_disk_admit (site.volume, NBDM_LOCAL) == 0);
  assert (read_at (7 * REGION) == 9);
}

static int
do_compare (struct job *job)
{
  return nbdm_remote_compare (site.volume, 1, job->offset / REGION);
}

/* Wait for another serial of the local disk than `offset`, for long. */
static int
do_wait_for_local (struct job *job)
{
  return (int)nbdm_disk_wait (site.volume, NBDM_LOCAL, job->offset,
                              1000 * SITE_DEADLINE_S * 2);
}

/* The disk hangs while it is compared: the range is released, the disk is not
 * admitted, and a thread that waits for a change of the disk sees that.
 */
static void
attached_disk_hangs (void)
{
  struct job keeper = { 0 }, compare = { .offset = 100 * REGION };
  struct job write = { .offset = 100 * REGION, .value = 3 };

  bring_up_with_deadline (DEADLINE_MS);
  assert (write_at (3 * REGION, 5) == 0); /* local fails */
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  assert (nbdm_local_attach (site.volume, site.local, 0) == 0);
  keeper.offset = local_status ().serial;
  start (&keeper, do_wait_for_local);
  start (&compare, do_compare);
  wait_at_gate ();
  start (&write, do_write);
  assert (end (&compare) == -ENODATA && end (&write) == 0);
  assert (end (&keeper) == (int)local_status ().serial);
  assert (nbdm_disk_admit (site.volume, NBDM_LOCAL) == -ENODEV);
  assert (strstr (local_status ().reason, "has not answered for"));
  copy_back_after_the_call ();
}

/* No remote may take local's place: the range is let go all the same, and the
 * remote's keeper goes on.
 */
static void
compared_disk_hangs (void)
{
  struct job compare = { .offset = 100 * REGION };

  bring_up_with_deadline (DEADLINE_MS);
  assert (nbdm_set_policy (site.volume, NBDM_STOP, 0) == 0);
  start (&compare, do_compare);
  wait_at_gate ();
  assert (end (&compare) == -ENODATA);
  assert (write_at (100 * REGION, 3) == 0);
  assert (local_status ().state == NBDM_LOCAL_OK);
  assert (nbdm_remote_compare (site.volume, 1, 100) == -ENODATA);
  assert (local_status ().local.errors == 0);
  open_gate ();
  WAIT_FOR (nbdm_remote_compare (site.volume, 1, 100) == 0);
}

/* The same while the disk keeps as many calls as may be under way, and no
 * request has given one up.
 */
static void
compared_while_all_are_kept (void)
{
  static struct job writes[MAX_CALLS];
  struct job compare = { .offset = 200 * REGION };
  struct stat st;

  bring_up_with_deadline (DEADLINE_MS);
  assert (nbdm_set_policy (site.volume, NBDM_STOP, 0) == 0);
  for (unsigned i = 0; i < MAX_CALLS; i++) {
    writes[i] = (struct job){ .offset = i * REGION, .value = 9 };
    start (&writes[i], do_write);
  }
  WAIT_FOR (stat ("gate.reached", &st) == 0 && st.st_size == MAX_CALLS);
  start (&compare, do_compare);
  assert (end (&compare) == -ENODATA);
  assert (local_status ().local.errors == 0);
  open_gate ();
  for (unsigned i = 0; i < MAX_CALLS; i++)
    assert (end (&writes[i]) == 0);
  assert (nbdm_remote_compare (site.volume, 1, 200) == 0);
}

/* The disk hangs while it is copied back to: it has failed again, and no
 * request waits.
 */
static void
copy_back_hangs (void)
{
  struct job back = { 0 }, write = { .offset = 3 * REGION, .value = 8 };

  bring_up_with_deadline (DEADLINE_MS);
  assert (write_at (3 * REGION, 5) == 0); /* local fails */
  attach_and_admit ();
  start (&back, do_copy_back);
  wait_at_gate ();
  start (&write, do_write);
  assert (end (&back) == -EIO && end (&write) == 0);
  assert (strstr (local_status ().reason, "has not answered for"));
  assert (read_at (3 * REGION) == 8);
  copy_back_after_the_call ();
}

/* --- a stop --------------------------------------------------------------- */

static atomic_bool hold_samples; /* by the wrapped pread */

ssize_t __real_pread (int fd, void *buf, size_t count, off_t offset);
ssize_t __wrap_pread (int fd, void *buf, size_t count, off_t offset);
ssize_t
__wrap_pread (int fd, void *buf, size_t count, off_t offset)
{
  if (hold_samples && count == SAMPLE_BLOCK && !exists ("gate")) {
    stand_at ("gate");
  }
  return __real_pread (fd, buf, count, offset);
}

/* `kept`: a request that began before, or NULL. */
static void
stop_soon (struct job *kept)
{
  time_t until = time (NULL) + SOON_S;

  assert (nbdm_stop (site.volume) == 0);
  assert (kept == NULL || end (kept) == 0);
  nbdm_close (site.volume);
  assert (time (NULL) < until);
  assert (exists ("gate.reached") && !exists ("gate"));
}

/* An operator brings the failed disk back, and it hangs while it is opened: the
 * command ends, no other disk is taken before the disk lets go, and then this
 * one is.
 */
static void
fail_and_attach (void)
{
  struct job attach = { 0 };

  bring_up_with_deadline (DEADLINE_MS);
  assert (nbdm_local_sample (site.volume, 8) > 0);
  assert (write_at (3 * REGION, 5) == 0); /* local fails */
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  hold_samples = true;
  start (&attach, do_attach);
  wait_at_gate ();
  assert (end (&attach) == -EIO);
  assert (!local_status ().local.attached);
  assert (do_attach (NULL) == -EBUSY);
  assert (write_at (7 * REGION, 6) == 0 && read_at (3 * REGION) == 5);
}

static void
opened_disk_hangs (void)
{
  fail_and_attach ();
  copy_back_after_the_call ();
}

/* The volume ends before the disk lets go: the thread in the call has the last
 * reference to what it reads.
 */
static void
opened_disk_hangs_in_a_stop (void)
{
  fail_and_attach ();
  stop_soon (NULL);
  open_gate ();
  WAIT_FOR (nbdm_open (&site.params, &site.volume) == 0);
  assert (nbdm_start (site.volume) == 0);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  WAIT_FOR (do_attach (NULL) == 0);
}

/* The stop is clean, though the disk still has the call; a volume that opens
 * the disk next is kept away from it until the call has ended.
 */
static void
stop_after_the_takeover (void)
{
  keep_and_answer (do_write, 0);
  stop_soon (NULL);
  site_open (&site);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  site_connect (&site, 0);
  assert (site_status (&site, 0).state == NBDM_IN_SYNC);
  assert (read_at (7 * REGION) == 9 && read_at (200 * REGION) == 2);
  copy_back_after_the_call ();
}

/* The stop begins while requests wait for the disk, and its own flush may. */
static void
stop_before_the_takeover (void)
{
  struct job kept = { .offset = 7 * REGION, .value = 9 };

  bring_up_with_deadline (2 * DEADLINE_MS);
  assert (write_at (3 * REGION, 5) == 0);
  start (&kept, do_write);
  wait_at_gate ();
  stop_soon (&kept);
  assert (durable_local_state () == NBDM_LOCAL_FAILED);
  open_gate ();
  site_open (&site);
}

static void
stop_whose_flush_hangs (void)
{
  bring_up_with_deadline (DEADLINE_MS);
  assert (write_at (3 * REGION, 5) == 0);
  stop_soon (NULL);
  assert (durable_local_state () == NBDM_LOCAL_FAILED);
  open_gate ();
  site_open (&site);
}

/* Everything is flushed by then: the disk only has fewer samples. */
static void
stop_whose_samples_hang (void)
{
  bring_up_with_deadline (DEADLINE_MS);
  assert (write_at (3 * REGION, 5) == 0);
  hold_samples = true;
  stop_soon (NULL);
  assert (durable_local_state () == NBDM_LOCAL_OK);
  open_gate ();
  WAIT_FOR (nbdm_open (&site.params, &site.volume) == 0);
  assert (nbdm_start (site.volume) == 0);
  assert (read_at (3 * REGION) == 5);
}

static const struct schedule schedules[] = {
  { "refused_while_a_call_is_kept", "local_write:3=wait:gate",
    refused_while_a_call_is_kept },
  { "attached_disk_hangs", "local_write:1=error,local_read:1=wait:gate",
    attached_disk_hangs },
  { "compared_disk_hangs", "local_read:1=wait:gate", compared_disk_hangs },
  { "compared_while_all_are_kept", "local_write=wait:gate",
    compared_while_all_are_kept },
  { "opened_disk_hangs", "local_write:1=error", opened_disk_hangs },
  { "opened_disk_hangs_in_a_stop", "local_write:1=error",
    opened_disk_hangs_in_a_stop },
  { "copy_back_hangs", "local_write:1=error,local_write:2=wait:gate",
    copy_back_hangs },
  { "stop_after_the_takeover", "local_write:3=wait:gate",
    stop_after_the_takeover },
  { "stop_before_the_takeover", "local_write:2=wait:gate",
    stop_before_the_takeover },
  { "stop_whose_flush_hangs", "local_flush:2=wait:gate",
    stop_whose_flush_hangs },
  { "stop_whose_samples_hang", NULL, stop_whose_samples_hang },
};

int
main (int argc, char *argv[])
{
  return run_schedules (schedules, sizeof schedules / sizeof schedules[0], argc,
                        argv);
}
