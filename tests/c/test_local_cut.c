/* SPDX-License-Identifier: BSD-3-Clause */

/* A local disk is cut short while the volume serves it: the bytes it lost are
 * never read as zeroes.
 */

#include "api.h"
#include "logs/bitmap.h"
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

/* The cut goes through the last bytes of a sector. */
static void
cut_in_a_sector (void)
{
  bring_up (1, 300);
  fill_regions ();
  assert (write_at (SIZE / 2 - SECTOR, 7) == 0);
  assert (read_at (0) == 7);
  assert (truncate (site.local, SIZE / 2 - 3) == 0);
  assert (write_at (SIZE / 4 * 3 + SECTOR, 9) == 0);
  assert (read_at (SIZE / 2 - SECTOR) == 7);
  assert_all_there ();
}

/* The volume is no whole number of sectors: the write that makes the file
 * longer may begin in the middle of one.  No remote has the rest.
 */
static void
cut_and_write_in_a_sector (void)
{
  uint8_t buf[SECTOR];

  make_volume (SIZE, REGION, 1, 300);
  site.params.size = SIZE - 100;
  assert (nbdm_create (&site.params, 1) == 0);
  site_open (&site);
  fill_regions ();
  assert (read_at (0) == 7);
  assert (truncate (site.local, 0) == 0);
  assert (write_at (SIZE / 2 + 100, 9) == 0);
  assert (nbdm_pread (site.volume, buf, sizeof buf, SIZE / 2) == -EIO);
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

/* --- a volume may have billions of regions ----------------------------------
 */

static atomic_uint nr_single; /* looks at a region, and marks taken away */

bool __real_bitmap_test (const struct bitmap *map, uint64_t bit);
bool __wrap_bitmap_test (const struct bitmap *map, uint64_t bit);
uint64_t __real_bitmap_clear (struct bitmap *map, uint64_t first,
                              uint64_t count);
uint64_t __wrap_bitmap_clear (struct bitmap *map, uint64_t first,
                              uint64_t count);

bool
__wrap_bitmap_test (const struct bitmap *map, uint64_t bit)
{
  nr_single++;
  return __real_bitmap_test (map, bit);
}

uint64_t
__wrap_bitmap_clear (struct bitmap *map, uint64_t first, uint64_t count)
{
  nr_single++;
  return __real_bitmap_clear (map, first, count);
}

static void
bring_up_cut (void)
{
  bring_up (1, 300);
  fill_regions ();
  assert (nbdm_set_policy (site.volume, NBDM_STOP, 0) == 0);
  assert (truncate (site.local, SIZE / 2) == 0);
  assert (read_at (SIZE / 2) == 7); /* finds the cut */
  nr_single = 0;
}

/* Local misses all of it at once, under the lock: not region by region. */
static void
cut_of_many_regions (void)
{
  bring_up_cut ();
  assert (write_at (0, 9) == -EIO);
  assert (local_status ().dirty_regions == SIZE / REGION);
  assert (nr_single < SIZE / REGION / 4);
}

/* The same if it gets all of it back, as the remote is lost. */
static void
cut_of_many_regions_taken_back (void)
{
  struct job write = { .offset = 0, .value = 9 };

  bring_up_cut ();
  peer_hold (site.peers[0], PEER_HOLD_FLUSHES);
  start (&write, do_write);
  WAIT_FOR (local_status ().dirty_regions == SIZE / REGION
            && site_status (&site, 0).remote.outstanding > 0);
  peer_cut (site.peers[0], false);
  assert (end (&write) == -EIO);
  assert (local_status ().dirty_regions == 0);
  assert (nr_single < SIZE / REGION / 4);
}

static const struct schedule schedules[] = {
  { "cut_of_many_regions", NULL, cut_of_many_regions },
  { "cut_of_many_regions_taken_back", NULL, cut_of_many_regions_taken_back },
  { "cut_in_a_sector", NULL, cut_in_a_sector },
  { "cut_and_write_in_a_sector", NULL, cut_and_write_in_a_sector },
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
