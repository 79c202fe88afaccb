/* SPDX-License-Identifier: BSD-3-Clause */

/* No thread waits for a remote's flush whose answer only that thread would
 * receive: any thread that waits for the flush receives its answer.
 */

#include "api.h"
#include "schedules.h"

/* A copy's read of local fails while the copying thread has a flush under way.
 * Local is made to miss the region, and that waits for this very flush.
 */
static void
copier_waits_for_its_flush (void)
{
  struct job copy = { 0 }, other = { .offset = 200 * REGION, .value = 3 };

  make_volume (SIZE, REGION, 2, 100);
  site.params.flush_bytes = REGION;
  open_volume ();
  lose (1);
  for (unsigned i = 0; i < 20; i += 2)
    assert (write_at (i * REGION, 7) == 0);
  site_connect (&site, 1);
  start (&copy, do_resync_second);
  start (&other, do_write);
  assert (end (&copy) == 0);
  assert (end (&other) == 0);
  for (unsigned i = 0; i < 20; i += 2)
    assert (read_at (i * REGION) == 7
            && peer_image (site.peers[1])[i * REGION] == 7);
}

/* The thread that began a remote's flush is held up at the local disk: another
 * thread that waits for that flush takes its answer in.
 */
static void
flush_while_local_is_slow (void)
{
  struct job slow = { 0 };
  struct nbdm_resync batch = { .max_bytes = REGION, .pace.depth = 1 };

  bring_up (1, 100);
  assert (write_at (0, 7) == 0);
  start (&slow, do_flush);
  wait_at_gate ();
  /* What is copied needs a flush of the remote; only the resync's end needs one
   * of local.
   */
  assert (nbdm_remote_invalidate (site.volume, 1) == 0);
  assert (nbdm_disk_resync (site.volume, 1, &batch) == 0);
  assert (batch.copied_bytes > 0);
  assert (!slow.over);
  open_gate ();
  assert (end (&slow) == 0);
  site_resync_to_end (&site, 0);
}

static const struct schedule schedules[] = {
  { "copier_waits_for_its_flush", "local_read:3=error,local_read:4=error",
    copier_waits_for_its_flush },
  { "flush_while_local_is_slow", "local_flush:2=wait:gate",
    flush_while_local_is_slow },
};

int
main (int argc, char *argv[])
{
  return run_schedules (schedules, sizeof schedules / sizeof schedules[0], argc,
                        argv);
}
