/* SPDX-License-Identifier: BSD-3-Clause */

/* A read that finds a bad sector of local while the volume stops. */

#include "api.h"
#include "schedules.h"

static void
open_again (void)
{
  nbdm_close (site.volume);
  site_open (&site);
}

/* The remote that is to take local's place is lost over a flush.  What the read
 * then does to the maps is done before the stop closes them: else the next
 * start would believe neither map, and be refused.
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

/* A read that finds the sector after the last request of a stop mends nothing.
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

static const struct schedule schedules[] = {
  { "stop_while_a_read_mends",
    "local_read:1=error,local_read:2=error,flush_answered:3=wait:gate",
    stop_while_a_read_mends },
  { "read_after_the_last_request",
    "local_read:1=error,local_read:2=error,stop_flushed:1=wait:stopped,"
    "flush_answered:4=wait:gate",
    read_after_the_last_request },
};

int
main (int argc, char *argv[])
{
  return run_schedules (schedules, sizeof schedules / sizeof schedules[0], argc,
                        argv);
}
