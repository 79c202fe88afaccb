/* SPDX-License-Identifier: BSD-3-Clause */

/* The local disk keeps a request, and there is a deadline for it.  The client
 * gets its answer while the call is still under way, and what the call does in
 * the end counts for nothing.
 */

#define _GNU_SOURCE
#include "api.h"
#include "wire/protocol.h"
#include "hung_disk.h"
#include "door.h"
#include "nbd_client.h"

/* --- a remote takes its place --------------------------------------------- */

static void
keeps_a_write (void)
{
  keep_and_answer (do_write, 0);
  assert (read_at (7 * REGION) == 9);
  copy_back_after_the_call ();
  assert (site.image[7 * REGION] == 9);
}

static void
keeps_a_write_with_fua (void)
{
  keep_and_answer (do_write_fua, 0);
  assert (read_at (7 * REGION) == 9);
  copy_back_after_the_call ();
}

static void
keeps_a_zero (void)
{
  keep_and_answer (do_zero, 0);
  assert (read_at (7 * REGION) == 0);
  copy_back_after_the_call ();
}

static void
keeps_a_read (void)
{
  keep_and_answer (do_read, 4);
  copy_back_after_the_call ();
}

static void
keeps_a_flush (void)
{
  keep_and_answer (do_flush, 0);
  copy_back_after_the_call ();
}

/* Writes that wait for the range go on, and their bytes stay: the late call
 * writes to the disk that failed, and no client reads those bytes.
 */
static void
writes_of_the_same_range (void)
{
  struct job kept = { .offset = 7 * REGION, .value = 9 };
  struct job second = { .offset = 7 * REGION, .value = 6 };

  bring_up_with_deadline (DEADLINE_MS);
  assert (write_at (3 * REGION, 5) == 0);
  start (&kept, do_write);
  wait_at_gate ();
  start (&second, do_write);
  assert (end (&kept) == 0 && end (&second) == 0);
  assert (read_at (7 * REGION) == 6);
  open_gate ();
  WAIT_FOR (site.image[7 * REGION] == 9); /* late */
  assert (read_at (7 * REGION) == 6);
  WAIT_FOR (nbdm_local_attach (site.volume, site.local, 0) == 0);
  assert (nbdm_disk_admit (site.volume, NBDM_LOCAL) == 0);
  assert (read_at (7 * REGION) == 6);
  assert (nbdm_flush (site.volume) == 0);
}

/* The slot of the log, and the range, are held until the superblock says that
 * local has failed.
 */
static void
slot_outlives_the_state (void)
{
  struct job kept = { .offset = 7 * REGION, .value = 9 };

  bring_up_with_deadline (DEADLINE_MS);
  assert (write_at (3 * REGION, 5) == 0);
  start (&kept, do_write);
  wait_at ("retire");
  assert (durable_local_state () == NBDM_LOCAL_FAILED);
  open_at ("retire");
  assert (end (&kept) == 0);
  copy_back_after_the_call ();
}

/* More writes than there may be calls under way at a time. */
static void
keeps_all (void)
{
  static struct job jobs[160];
  unsigned nr = sizeof jobs / sizeof jobs[0];

  bring_up_with_deadline (DEADLINE_MS);
  for (unsigned i = 0; i < nr; i++) {
    jobs[i] = (struct job){ .offset = i * REGION, .value = 9 };
    start (&jobs[i], do_write);
  }
  for (unsigned i = 0; i < nr; i++)
    assert (end (&jobs[i]) == 0);
  assert_failed ();
  for (unsigned i = 0; i < nr; i++)
    assert (read_at (i * REGION) == 9);
  copy_back_after_the_call ();
}

/* --- no remote may take its place -------------------------------------------
 */

/* The count of the status is 0 again once the disk has answered. */
static void
answers_late (void)
{
  struct job reader = { .offset = 3 * REGION };

  bring_up (1, 300);
  assert (local_status ().local.silent_ms == 0);
  start (&reader, do_read);
  wait_at_gate ();
  WAIT_FOR (local_status ().local.silent_ms >= DEADLINE_MS);
  open_gate ();
  assert (end (&reader) == 0);
  WAIT_FOR (local_status ().local.silent_ms == 0);
}

/* The request waits for the disk, and succeeds. */
static void
wait_on (void)
{
  struct job kept = { .offset = 7 * REGION, .value = 9 };

  start (&kept, do_write);
  wait_at_gate ();
  WAIT_FOR (local_status ().local.silent_ms >= 2 * DEADLINE_MS);
  assert (local_status ().state == NBDM_LOCAL_OK && !kept.over);
  open_gate ();
  assert (end (&kept) == 0 && read_at (7 * REGION) == 9);
  assert (local_status ().state == NBDM_LOCAL_OK);
}

static void
keeps_a_write_alone (void)
{
  bring_up_with_deadline (DEADLINE_MS);
  lose (0);
  wait_on ();
}

static void
keeps_a_write_under_stop (void)
{
  bring_up_with_deadline (DEADLINE_MS);
  assert (nbdm_set_policy (site.volume, NBDM_STOP, 0) == 0);
  wait_on ();
}

/* --- a connection of the direct door ------------------------------------- */

static struct door door;
static struct client client;

static void
connect_client (void)
{
  char path[96];

  snprintf (path, sizeof path, "%s/direct", site.dir);
  door_open (&door, site.volume, path);
  client = client_open (path, false);
}

static void
disconnect_client (void)
{
  client_leave (&client);
  door_close (&door);
}

static void
ask (uint16_t type, uint64_t cookie, uint64_t offset, uint8_t value)
{
  uint8_t buf[SECTOR];

  memset (buf, value, sizeof buf);
  assert (client_request (&client, type, 0, cookie, offset, SECTOR, buf));
}

/* The next answer is this one's; a read's first byte. */
static int
answered (uint64_t cookie, bool reads)
{
  uint8_t buf[SECTOR] = { 0 };
  struct answer answer;
  bool simple;

  assert (client_answer (&client, &answer, buf, sizeof buf, &simple));
  assert (answer.cookie == cookie && answer.error == 0);
  if (reads)
    assert (client_receive (&client, buf, sizeof buf));
  return buf[0];
}

/* While the disk keeps a small request all others of the connection go on. */
static void
small_write_of_a_connection (void)
{
  bring_up_with_deadline (5000);
  connect_client ();
  ask (NBD_CMD_WRITE, 1, 3 * REGION, 5);
  answered (1, false);
  ask (NBD_CMD_WRITE, 2, 7 * REGION, 9);
  wait_at_gate ();
  ask (NBD_CMD_READ, 3, 3 * REGION, 0);
  assert (answered (3, true) == 5);
  ask (NBD_CMD_WRITE, 4, 3 * REGION, 6);
  answered (4, false);
  assert (local_status ().state == NBDM_LOCAL_OK);
  answered (2, false);
  assert_failed ();
  ask (NBD_CMD_READ, 5, 7 * REGION, 0);
  assert (answered (5, true) == 9);
  disconnect_client ();
  copy_back_after_the_call ();
}

static void
small_read_of_a_connection (void)
{
  bring_up_with_deadline (5000);
  connect_client ();
  ask (NBD_CMD_WRITE, 1, 3 * REGION, 5);
  answered (1, false);
  ask (NBD_CMD_READ, 2, 3 * REGION, 0);
  wait_at_gate ();
  ask (NBD_CMD_WRITE, 3, 7 * REGION, 9);
  answered (3, false);
  ask (NBD_CMD_READ, 4, 7 * REGION, 0);
  assert (answered (4, true) == 9);
  assert (local_status ().state == NBDM_LOCAL_OK);
  assert (answered (2, true) == 5);
  assert_failed ();
  disconnect_client ();
  copy_back_after_the_call ();
}

/* --- a call that the engine can do without ------------------------------ */

static atomic_bool hold_sizes; /* by the wrapped fstat */

int __real_fstat (int fd, struct stat *st);
int __wrap_fstat (int fd, struct stat *st);
int
__wrap_fstat (int fd, struct stat *st)
{
  if (atomic_exchange (&hold_sizes, false)) {
    stand_at ("gate");
  }
  return __real_fstat (fd, st);
}

static int
do_extents (struct job *job)
{
  struct nbdm_extent extent;

  assert (nbdm_extents (site.volume, REGION, job->offset, &extent, 1) == 1);
  return extent.type == NBDM_EXTENT_HOLE;
}

/* The disk reports a hole and hangs in the query that has to follow. A keeper
 * sends this request too, and must go on.
 */
static void
hole_whose_size_hangs (void)
{
  struct job extents = { .offset = 100 * REGION };

  bring_up_with_deadline (DEADLINE_MS);
  assert (nbdm_set_policy (site.volume, NBDM_STOP, 0) == 0);
  assert (do_extents (&extents) == 1);
  hold_sizes = true;
  start (&extents, do_extents);
  wait_at_gate ();
  assert (end (&extents) == 0);
  assert (local_status ().state == NBDM_LOCAL_OK);
  assert (local_status ().local.errors == 0);
  open_gate ();
  WAIT_FOR (do_extents (&extents) == 1);
}

/* --- a disk that is well ---------------------------------------------------
 */

/* Requests of any length, also across the end of a call's buffer. */
static void
all_kinds_and_lengths (void)
{
  static const uint32_t lengths[]
      = { SECTOR, REGION, 1u << 20, (1u << 20) + SECTOR, 5u << 20 };
  static uint8_t buf[5u << 20], back[5u << 20];
  struct nbdm_extent extents[4];

  bring_up_with_deadline (60000);
  for (unsigned i = 0; i < sizeof lengths / sizeof lengths[0]; i++)
    for (uint64_t offset = 0; offset <= 2u << 20;
         offset += (1u << 20) - SECTOR) {
      for (uint32_t at = 0; at < lengths[i]; at++)
        buf[at] = (uint8_t)(at / 251 + i + offset);
      assert (nbdm_pwrite (site.volume, buf, lengths[i], offset, i % 2) == 0);
      memset (back, 0, lengths[i]);
      assert (nbdm_pread (site.volume, back, lengths[i], offset) == 0);
      assert (memcmp (buf, back, lengths[i]) == 0);
      assert (memcmp (buf, site.image + offset, lengths[i]) == 0);
    }
  assert (nbdm_cache (site.volume, 5u << 20, 0) == 0);
  assert (nbdm_zero (site.volume, 3u << 20, SECTOR, 0) == 0);
  assert (nbdm_trim (site.volume, 1u << 20, 4u << 20, 0) == 0);
  assert (nbdm_extents (site.volume, SIZE, 0, extents, 4) > 1);
  assert (nbdm_flush (site.volume) == 0);
  assert (nbdm_local_sample (site.volume, 8) >= 0);
  assert (memcmp (site.image, peer_image (site.peers[0]), SIZE) == 0);
  assert (local_status ().local.errors == 0);
}

static void
errors_are_the_disks (void)
{
  bring_up_with_deadline (60000);
  lose (0);
  assert (write_at (3 * REGION, 5) == -ENOSPC);
  ASSERT_SAYS ("the local disk failed to write at 196608");
  assert (local_status ().local.errors == 1);
  assert (write_at (3 * REGION, 5) == 0);
}

static const struct schedule schedules[] = {
  { "keeps_a_write", "local_write:3=wait:gate", keeps_a_write },
  { "keeps_a_write_with_fua", "local_flush:3=wait:gate",
    keeps_a_write_with_fua },
  { "keeps_a_zero", "local_write:3=wait:gate", keeps_a_zero },
  { "keeps_a_read", "local_read:1=wait:gate", keeps_a_read },
  { "keeps_a_flush", "local_flush:3=wait:gate", keeps_a_flush },
  { "writes_of_the_same_range", "local_write:2=wait:gate",
    writes_of_the_same_range },
  { "slot_outlives_the_state",
    "local_write:2=wait:gate,before_retire:2=wait:retire",
    slot_outlives_the_state },
  { "keeps_all", "local_write=wait:gate", keeps_all },
  { "answers_late", "local_read:1=wait:gate", answers_late },
  { "keeps_a_write_alone", "local_write:1=wait:gate", keeps_a_write_alone },
  { "keeps_a_write_under_stop", "local_write:1=wait:gate",
    keeps_a_write_under_stop },
  { "small_write_of_a_connection", "local_write:2=wait:gate",
    small_write_of_a_connection },
  { "small_read_of_a_connection", "local_read:1=wait:gate",
    small_read_of_a_connection },
  { "hole_whose_size_hangs", NULL, hole_whose_size_hangs },
  { "all_kinds_and_lengths", NULL, all_kinds_and_lengths },
  { "errors_are_the_disks", "local_write:1=error:ENOSPC",
    errors_are_the_disks },
};

int
main (int argc, char *argv[])
{
  return run_schedules (schedules, sizeof schedules / sizeof schedules[0], argc,
                        argv);
}
