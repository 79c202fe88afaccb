/* SPDX-License-Identifier: BSD-3-Clause */

/* A local disk is cut short while the volume serves it: the bytes it lost are
 * never read as zeroes.
 */

#include "api.h"
#include "schedules.h"

static void
fill_regions (void)
{
  for (unsigned region = 0; region < SIZE / REGION; region += 16)
    assert (write_at (region * REGION, 7) == 0);
  assert (nbdm_flush (site.volume) == 0);
}

static void
assert_all_there (void)
{
  /* A read looks at the disk's size if 10 ms are over since the last look. */
  poll (NULL, 0, 30);
  for (unsigned region = 0; region < SIZE / REGION; region += 16)
    assert (read_at (region * REGION) == 7);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  assert (strstr (local_status ().reason, "lost bytes"));
  /* Inactive extents count too: nothing shows which bytes the disk lost. */
  assert (local_status ().dirty_regions == SIZE / REGION);
  assert (nbdm_local_attach (site.volume, site.local, 0) == -ENOMEDIUM);
}

static void
cut_and_read (void)
{
  bring_up (1, 300);
  fill_regions ();
  assert (truncate (site.local, SIZE / 2) == 0);
  assert_all_there ();
}

/* A write past the new end makes the file longer again, without an error. */
static void
cut_and_write (void)
{
  bring_up (1, 300);
  fill_regions ();
  assert (truncate (site.local, SIZE / 2) == 0);
  assert (write_at (SIZE / 4 * 3 + SECTOR, 9) == 0);
  assert_all_there ();
}

/* A write made the file longer again, and no time passes until the read: the
 * size was looked at a moment before the cut.
 */
static void
cut_and_write_and_read_at_once (void)
{
  bring_up (1, 300);
  fill_regions ();
  assert (read_at (0) == 7);
  assert (truncate (site.local, 0) == 0);
  assert (write_at (SIZE / 4 * 3 + SECTOR, 9) == 0);
  assert (read_at (SIZE / 2) == 7);
  assert_all_there ();
}

/* A write makes the file as long as before: its size alone proves nothing then.
 */
static void
cut_and_write_the_end (void)
{
  bring_up (1, 300);
  fill_regions ();
  assert (truncate (site.local, SIZE / 2) == 0);
  assert (write_at (SIZE - SECTOR, 9) == 0);
  assert_all_there ();
  assert (read_at (SIZE - SECTOR) == 9);
}

/* No client sends a request. */
static void
cut_and_nothing (void)
{
  bring_up (1, 300);
  fill_regions ();
  assert (truncate (site.local, SIZE / 2) == 0);
  assert (nbdm_cool (site.volume, 60000) == 0);
  assert_all_there ();
}

/* No remote can take its place: an error, and never zeroes. */
static void
cut_and_alone (void)
{
  bring_up (1, 300);
  fill_regions ();
  lose (0);
  assert (write_at (SECTOR, 1) == 0);
  assert (truncate (site.local, SIZE / 2) == 0);
  assert (read_at (SIZE / 4 * 3) == -EIO);
  assert (write_at (SIZE / 4 * 3 + SECTOR, 9) == -EIO);
  assert (read_at (SIZE / 4 * 3) == -EIO);
  assert (local_status ().dirty_regions == 0);
  assert (local_status ().local.repaired == 0);
}

/* An operator's create looked at the state before the disk failed, and comes to
 * the lock when the server has ended.  It would make local the source of all.
 */
static void
cut_and_create (void)
{
  bring_up (1, 300);
  fill_regions ();
  assert (truncate (site.local, SIZE / 2) == 0);
  assert_all_there ();
  assert (nbdm_stop (site.volume) == 0);
  nbdm_close (site.volume);
  assert (truncate (site.local, SIZE) == 0);
  assert (nbdm_create (&site.params, 1) == -EEXIST);
  ASSERT_SAYS ("only the remotes have");
  site_open (&site);
  site_connect (&site, 0);
  for (unsigned region = 0; region < SIZE / REGION; region += 16)
    assert (read_at (region * REGION) == 7);
  assert (nbdm_stop (site.volume) == 0);
}

static const struct schedule schedules[] = {
  { "cut_and_read", NULL, cut_and_read },
  { "cut_and_write", NULL, cut_and_write },
  { "cut_and_write_and_read_at_once", NULL, cut_and_write_and_read_at_once },
  { "cut_and_write_the_end", NULL, cut_and_write_the_end },
  { "cut_and_nothing", NULL, cut_and_nothing },
  { "cut_and_alone", NULL, cut_and_alone },
  { "cut_and_create", NULL, cut_and_create },
};

int
main (int argc, char *argv[])
{
  return run_schedules (schedules, sizeof schedules / sizeof schedules[0], argc,
                        argv);
}
