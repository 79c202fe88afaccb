/* SPDX-License-Identifier: BSD-3-Clause */

/* A volume with a deadline for its local disk, and a fault point inside the
 * disk's call that waits for a file: the disk keeps a call until the test opens
 * the gate.
 */

#ifndef NBDM_TEST_HUNG_DISK_H
#define NBDM_TEST_HUNG_DISK_H

#include "api.h"
#include "schedules.h"

#define DEADLINE_MS 300u

static TEST_UNUSED void
bring_up_with_deadline (uint32_t deadline_ms)
{
  make_volume (SIZE, REGION, 1, 300);
  site.params.local_deadline_ms = deadline_ms;
  open_volume ();
}

/* What a start would find in the superblock. */
static TEST_UNUSED uint32_t
durable_local_state (void)
{
  struct nbdm_disk_status disks[NBDM_MAX_DISKS];
  struct nbdm_status status;
  char name[NBDM_NAME_LEN];

  assert (nbdm_peek (site.state, name, &status, disks, NULL) == 0);
  return disks[NBDM_LOCAL].state;
}

/* --- the disk lets go --------------------------------------------------- */

static TEST_UNUSED void
assert_failed (void)
{
  struct nbdm_disk_status status = local_status ();

  assert (status.state == NBDM_LOCAL_FAILED);
  assert (strstr (status.reason, "has not answered for"));
  assert (status.local.errors == 0);
}

/* Attaching is refused until the call has ended. Then the disk is attached, and
 * the remote's content is copied to it, whatever the call wrote.
 */
static TEST_UNUSED void
copy_back_after_the_call (void)
{
  struct nbdm_resync batch = { .max_bytes = 64u << 20 };

  assert (nbdm_local_attach (site.volume, site.local, 0) == -EBUSY);
  open_gate ();
  WAIT_FOR (nbdm_local_attach (site.volume, site.local, 0) == 0);
  assert (nbdm_disk_admit (site.volume, NBDM_LOCAL) == 0);
  WAIT_FOR (nbdm_disk_resync (site.volume, NBDM_LOCAL, &batch) == 0
            && local_status ().state == NBDM_LOCAL_OK);
  assert (nbdm_flush (site.volume) == 0);
  assert (memcmp (site.image, peer_image (site.peers[0]), SIZE) == 0);
}

/* --- a call is kept ----------------------------------------------------- */

/* The client gets its answer while the disk still keeps the call. */
static TEST_UNUSED struct job
keep_and_answer (int (*run) (struct job *job), int expected)
{
  struct job kept = { .offset = 7 * REGION, .value = 9 };

  bring_up_with_deadline (DEADLINE_MS);
  assert (write_at (3 * REGION, 5) == 0 && write_at (7 * REGION, 4) == 0);
  assert (nbdm_flush (site.volume) == 0);
  start (&kept, run);
  wait_at_gate ();
  assert (end (&kept) == expected);
  assert_failed ();
  assert (durable_local_state () == NBDM_LOCAL_FAILED);
  assert (read_at (3 * REGION) == 5);
  assert (write_at (200 * REGION, 2) == 0 && read_at (200 * REGION) == 2);
  assert (nbdm_flush (site.volume) == 0);
  return kept;
}

#endif /* NBDM_TEST_HUNG_DISK_H */
