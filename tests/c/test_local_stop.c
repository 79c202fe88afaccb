/* SPDX-License-Identifier: BSD-3-Clause */

/* The local disk fails while the volume stops: a read finds a bad sector, a
 * copy back to it fails, or its flush after a copy from it.  And the policy
 * threads wait for no hold then.
 */

#define _GNU_SOURCE
#include "api.h"
#include "base/lock.h"
#include "volume/flush.h"
#include "schedules.h"

/* --- a read ----------------------------------------------------------------
 */

/* The remote that is to take local's place is lost during a flush.  The read
 * then changes the maps before the stop closes them: otherwise the next start
 * would believe neither map, and be refused.
 */
static void
stop_while_a_read_mends (void)
{
  struct job reader = { .offset = 3 * REGION }, stop = { 0 };

  bring_up (1, 1000 * SITE_DEADLINE_S * 2);
  assert (write_at (3 * REGION, 11) == 0);
  start (&reader, do_read);
  wait_at_gate ();
  peer_cut (site.peers[0], false);
  site_wait_state (&site, 0, NBDM_HOLDING);
  start (&stop, do_stop);
  /* Give a stop that does not wait for the read time to end. */
  over_soon (&stop);
  open_gate ();
  assert (end (&stop) == 0);
  end (&reader);
  open_again ();
  assert (local_status ().state == NBDM_LOCAL_OK);
  assert (site_status (&site, 0).dirty_regions == 1);
}

/* A read that finds the sector after the last request of a stop repairs
 * nothing.
 */
static void
read_after_the_last_request (void)
{
  struct job reader = { .offset = 3 * REGION }, stop = { 0 };

  bring_up (1, 300);
  assert (write_at (3 * REGION, 11) == 0);
  start (&stop, do_stop);
  wait_at ("stopped");
  start (&reader, do_read);
  /* Give a read that mends time to reach the gate or to end. */
  over_soon (&reader);
  open_at ("stopped");
  assert (end (&stop) == 0);
  open_gate ();
  assert (end (&reader) == 11);
  open_again ();
  assert (local_status ().state == NBDM_LOCAL_OK);
  assert (site_status (&site, 0).dirty_regions == 0);
}

/* --- a copy back to local --------------------------------------------------
 */

/* Have a thread copy back to local, up to the gate of its first copy.  Returns
 * the number of regions that local missed before one more write.
 */
static uint64_t
copy_back_to_the_gate (struct job *back, int (*run) (struct job *job))
{
  uint64_t missing;

  bring_up (1, 300);
  write_and_fail_local (7 * REGION, 1);
  attach_and_admit ();
  missing = local_status ().dirty_regions;
  assert (write_at (100 * REGION, 2) == 0);
  start (back, run);
  wait_at ("copy");
  return missing;
}

/* Local fails again while it is copied back, after the last request of a stop:
 * its map is about to be closed, and the next start would not believe a map in
 * which a bit was set after that.
 */
static void
copy_back_behind_a_stop (void)
{
  struct job back = { 0 }, stop = { 0 };
  uint64_t missing = copy_back_to_the_gate (&back, do_copy_back);

  start (&stop, do_stop);
  wait_at ("stopped");
  open_at ("copy");
  over_soon (&back);
  open_at ("stopped");
  assert (end (&stop) == 0);
  open_gate ();
  end (&back);
  open_again ();
  assert (local_status ().state == NBDM_LOCAL_RESYNCING);
  assert (local_status ().dirty_regions == missing);
}

static _Thread_local bool wakes_late; /* behind the last request of a stop */
static atomic_bool awaits;

int __real_pthread_cond_wait (pthread_cond_t *cond, pthread_mutex_t *mutex);
int __wrap_pthread_cond_wait (pthread_cond_t *cond, pthread_mutex_t *mutex);
int
__wrap_pthread_cond_wait (pthread_cond_t *cond, pthread_mutex_t *mutex)
{
  int rc;

  if (wakes_late)
    awaits = true;
  rc = __real_pthread_cond_wait (cond, mutex);
  if (wakes_late) {
    pthread_mutex_unlock (mutex);
    wait_at ("stopped");
    pthread_mutex_lock (mutex);
  }
  return rc;
}

static int
do_copy_back_and_wake_late (struct job *job)
{
  wakes_late = true;
  return do_copy_back (job);
}

/* The same if the copy's thread waits for another takeover, and the stop ends
 * before the thread continues.
 */
static void
copy_back_waits_past_a_stop (void)
{
  struct job back = { 0 }, stop = { 0 }, reader = { .offset = 100 * REGION };
  uint64_t missing = copy_back_to_the_gate (&back, do_copy_back_and_wake_late);

  start (&reader, do_read);
  wait_at_gate ();
  open_at ("copy");
  WAIT_FOR (awaits);
  start (&stop, do_stop);
  WAIT_FOR (volume_status ().stopping);
  open_gate ();
  assert (end (&reader) == 2);
  wait_at ("stopped");
  over_soon (&back);
  open_at ("stopped");
  assert (end (&stop) == 0);
  open_at ("late");
  end (&back);
  open_again ();
  assert (local_status ().state == NBDM_LOCAL_RESYNCING);
  assert (local_status ().dirty_regions == missing + 1);
}

/* --- a copy to a remote -----------------------------------------------------
 */

/* A flush of local fails after the copy, and the remote that may take local's
 * place is on hold.  The policy threads are told to end: the copying thread
 * does not wait for the end of the hold.  The volume does not fail by that,
 * because a thread that is connecting may still admit the remote.
 */
static void
copy_beside_a_hold (void)
{
  struct job copy = { 0 };

  bring_up (2, 1000 * SITE_DEADLINE_S * 2);
  nbdm_disk_drop (site.volume, 2, "for the test");
  assert (write_at (5 * REGION, 7) == 0);
  assert (remote_flush_alone (&site.volume->remotes[0]));
  site_connect (&site, 1);
  peer_cut (site.peers[0], false);
  site_wait_state (&site, 0, NBDM_HOLDING);
  start (&copy, do_resync_second);
  WAIT_FOR (local_status ().local.errors > 0);
  nbdm_wake (site.volume);
  WAIT_FOR (copy.over);
  end (&copy);
  assert (!volume_status ().failed);
  site_connect (&site, 0);
  WAIT_FOR (local_status ().state == NBDM_LOCAL_FAILED);
  assert (nbdm_stop (site.volume) == 0);
}

/* --- extents go cold --------------------------------------------------------
 */

static int
do_cool (struct job *job)
{
  (void)job;
  return nbdm_cool (site.volume, 0);
}

static bool
waits_for_a_flush (void)
{
  struct remote *r = &site.volume->remotes[0];

  LOCK_FOR_SCOPE (&site.volume->lock);
  return r->flush_sent.sleep > 0;
}

/* The maintenance thread does not wait for the end of a hold either. */
static void
cool_beside_a_hold (void)
{
  struct job cool = { 0 };

  bring_up (1, 1000 * SITE_DEADLINE_S * 2);
  assert (write_at (5 * REGION, 7) == 0);
  peer_cut (site.peers[0], false);
  site_wait_state (&site, 0, NBDM_HOLDING);
  start (&cool, do_cool);
  WAIT_FOR (waits_for_a_flush ());
  nbdm_wake (site.volume);
  WAIT_FOR (cool.over);
  assert (end (&cool) == 0);
  open_again ();
  assert (site_status (&site, 0).dirty_regions == 1);
}

static const struct schedule schedules[] = {
  { "stop_while_a_read_mends",
    "local_read:1=error,local_read:2=error,flush_answered:3=wait:gate",
    stop_while_a_read_mends },
  { "read_after_the_last_request",
    "local_read:1=error,local_read:2=error,stop_flushed:1=wait:stopped,"
    "flush_answered:4=wait:gate",
    read_after_the_last_request },
  { "copy_back_behind_a_stop",
    "local_write:1=error,local_write:3=error,"
    "local_resync_after_read:1=wait:copy,stop_flushed:1=wait:stopped,"
    "flush_answered:6=wait:gate",
    copy_back_behind_a_stop },
  { "copy_back_waits_past_a_stop",
    "local_write:1=error,local_write:3=error,local_read:1=error,"
    "local_resync_after_read:1=wait:copy,stop_flushed:1=wait:stopped,"
    "flush_answered:5=wait:gate,flush_answered:7=wait:late",
    copy_back_waits_past_a_stop },
  { "copy_beside_a_hold", "local_flush:2=error", copy_beside_a_hold },
  { "cool_beside_a_hold", NULL, cool_beside_a_hold },
};

int
main (int argc, char *argv[])
{
  return run_schedules (schedules, sizeof schedules / sizeof schedules[0], argc,
                        argv);
}
