/* SPDX-License-Identifier: BSD-3-Clause */

/* A value that a client has read never goes back, even where one disk takes the
 * place of another during an unanswered write that only one of the two has
 * carried out.
 */

#include "api.h"
#include "schedules.h"

/* Local has the new bytes, which are read.  It fails, and the remote, which
 * takes its place, has not carried out the write.
 */
static void
remote_takes_the_place (void)
{
  struct job writer = { .offset = 7 * REGION, .value = 2 };
  struct job reader = { .offset = 7 * REGION };

  site.peer.shuffle = true;
  bring_up (1, 300);
  assert (write_at (7 * REGION, 1) == 0);
  peer_hold_writes (site.peers[0], true);
  start (&writer, do_write);
  WAIT_FOR (read_at (7 * REGION) == 2);
  assert (nbdm_flush (site.volume) == 0);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  assert (!writer.over);
  start (&reader, do_read);
  assert (!over_soon (&reader) || reader.rc == 2);
  peer_hold_writes (site.peers[0], false);
  assert (end (&writer) == 0 && end (&reader) == 2);
}

/* The other way round: all is copied back to local, which is about to serve
 * again.  The remote has carried out a write, and local has not.
 */
static void
local_serves_again (void)
{
  struct job copy = { 0 };
  struct job writer = { .offset = 7 * REGION, .value = 2 };
  struct job reader = { .offset = 7 * REGION };
  uint64_t answered;
  int seen;

  bring_up (1, 300);
  assert (write_at (7 * REGION, 1) == 0); /* local fails */
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  attach_and_admit ();
  start (&copy, do_copy_back);
  wait_at_gate ();
  answered = site_status (&site, 0).remote.commands;
  start (&writer, do_write);
  wait_at ("write");
  WAIT_FOR (site_status (&site, 0).remote.commands > answered);
  start (&reader, do_read);
  (void)over_soon (&reader);
  open_gate ();
  assert (end (&copy) == 0);
  assert (local_status ().state == NBDM_LOCAL_OK);
  seen = reader.over ? reader.rc : 1;
  assert (read_at (7 * REGION) >= seen);
  open_at ("write");
  assert (end (&writer) == 0 && end (&reader) == 2);
  assert (read_at (7 * REGION) == 2);
}

static const struct schedule schedules[] = {
  { "remote_takes_the_place", "local_flush:2=error", remote_takes_the_place },
  { "local_serves_again",
    "local_write:1=error,local_write:3=wait:write,"
    "local_resync_before_clean:1=wait:gate",
    local_serves_again },
};

int
main (int argc, char *argv[])
{
  return run_schedules (schedules, sizeof schedules / sizeof schedules[0], argc,
                        argv);
}
