/* SPDX-License-Identifier: BSD-3-Clause */

/* What a start believes when logs are lost, torn, or older copies. */

#include <endian.h>

#include "lone_volume.h"

static void
flip (const char *file, off_t offset)
{
  uint8_t byte;
  int fd = openat (site.fd, file, O_RDWR);

  assert (fd >= 0 && pread (fd, &byte, 1, offset) == 1);
  byte ^= 0x10;
  assert (pwrite (fd, &byte, 1, offset) == 1);
  close (fd);
}

static void
cut (const char *file, off_t length)
{
  int fd = openat (site.fd, file, O_RDWR);

  assert (fd >= 0 && ftruncate (fd, length) == 0);
  close (fd);
}

static void
drop (const char *file, off_t unused)
{
  (void)unused;
  assert (unlinkat (site.fd, file, 0) == 0);
}

static void
copy_file (const char *from, const char *to)
{
  char command[3 * PATH_MAX];

  snprintf (command, sizeof command, "cp %s/%s %s/%s", site.path, from,
            site.path, to);
  assert (system (command) == 0);
}

static void
all_dirty (struct nbdm *v)
{
  assert (remote (v).dirty_regions == NR_REGIONS);
}

/* Torn slots after lost power are no lost log: the extents cover them. */
static void
test_lost_power_ignores_torn_slots (void)
{
  make_volume (SIZE, REGION);
  killed_at ("after_log=kill", 2 * EXTENT);
  flip ("inflight", 4096 + 20);
  reboot ();
  check_in_child (one_dirty_extent);
  end_volume ();
}

/* The start that finds a log lost dies after it made a new one. */
static void
test_start_killed_after_renewing_a_log_is_still_all_dirty (void)
{
  static const char *const files[] = { "activity", "inflight" };

  for (unsigned i = 0; i < 2; i++) {
    make_volume (SIZE, REGION);
    check_in_child (no_dirty_region);
    drop (files[i], 0);
    killed_at ("log_renewed=kill", 0);
    check_in_child (all_dirty);
    end_volume ();
  }
}

/* Rule 9, for every log and every kind of loss: all is dirty, and the reason is
 * given.
 */
static void
test_lost_log_means_all_dirty (void)
{
  static const struct {
    const char *file;
    void (*harm) (const char *, off_t);
    off_t where;
  } cases[] = {
    { "activity", flip, 40 },      { "activity", flip, 4096 + 100 },
    { "activity", cut, 4096 },     { "activity", drop, 0 },
    { "inflight", flip, 40 },      { "inflight", cut, 5000 },
    { "inflight", drop, 0 },       { "dirty.dr", flip, 40 },
    { "dirty.dr", flip, 4096 },    { "dirty.dr", flip, 3 * 4096 + 17 },
    { "dirty.dr", cut, 2 * 4096 }, { "dirty.dr", drop, 0 },
  };

  for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    char bad[80];
    struct nbdm_status s;

    make_volume (SIZE, REGION);
    cases[i].harm (cases[i].file, cases[i].where);
    struct nbdm *v = open_volume ();
    assert (remote (v).dirty_regions == NR_REGIONS);
    assert (remote (v).remote.late_regions == NR_REGIONS);
    assert (!remote (v).remote.assumed);
    nbdm_get_status (v, &s);
    assert (strstr (s.reason, cases[i].file));
    assert (strstr (s.reason, "everything is copied again"));
    snprintf (bad, sizeof bad, "%s~bad", cases[i].file);
    assert ((cases[i].harm == drop) == (faccessat (site.fd, bad, F_OK, 0) < 0));
    assert (nbdm_stop (v) == 0);
    nbdm_close (v);
    end_volume ();
  }
}

/* The map of a local disk that has failed. */
static void
test_lost_map_of_local_is_kept (void)
{
  struct nbdm_status s;

  make_volume (SIZE, REGION);
  params.local_choice = NBDM_LOCAL_LOST;
  nbdm_close (open_volume ());
  params.local_choice = NBDM_LOCAL_CHECKED;
  flip ("dirty.local", 40);
  struct nbdm *v = open_volume ();
  nbdm_get_status (v, &s);
  assert (strstr (s.reason, "dirty.local"));
  assert (faccessat (site.fd, "dirty.local~bad", F_OK, 0) == 0);
  nbdm_close (v);
  end_volume ();
}

static void
test_old_copy_of_a_log_means_all_dirty (void)
{
  static const char *const files[] = { "activity", "inflight", "dirty.dr" };

  for (unsigned i = 0; i < 3; i++) {
    make_volume (SIZE, REGION);
    copy_file (files[i], "old");
    for (unsigned session = 0; session < 2; session++) {
      struct nbdm *v = open_volume ();
      assert (nbdm_stop (v) == 0);
      nbdm_close (v);
    }
    copy_file ("old", files[i]);
    struct nbdm *v = open_volume ();
    assert (remote (v).dirty_regions == NR_REGIONS);
    nbdm_close (v);
    end_volume ();
  }
}

/* A copy taken while the volume was in use, put back after a clean stop of
 * the same session.
 */
static void
test_log_in_use_under_a_clean_superblock_means_all_dirty (void)
{
  make_volume (SIZE, REGION);
  struct nbdm *v = open_volume ();
  copy_file ("dirty.dr", "old");
  assert (nbdm_stop (v) == 0);
  nbdm_close (v);
  copy_file ("old", "dirty.dr");
  v = open_volume ();
  assert (remote (v).dirty_regions == NR_REGIONS);
  nbdm_close (v);
  end_volume ();
}

static void
test_one_torn_superblock_slot_goes_on (void)
{
  make_volume (SIZE, REGION);
  struct nbdm *v = open_volume ();
  assert (nbdm_start (v) == 0);
  write_at (v, 0);
  nbdm_close (v);
  /* Each slot alone must be enough, whichever is the newer. */
  for (off_t slot = 0; slot < 2; slot++) {
    copy_file ("superblock", "kept");
    flip ("superblock", slot * 4096 + 300);
    v = open_volume ();
    assert (remote (v).dirty_regions >= 1);
    nbdm_close (v);
    copy_file ("kept", "superblock");
  }
  flip ("superblock", 300);
  flip ("superblock", 4096 + 300);
  assert (nbdm_open (&params, &v) == -EUCLEAN);
  end_volume ();
}

/* The local disk's file system was mounted again since the last session.  Gives
 * the place of the superblock's older slot.
 */
static off_t
mount_again (void)
{
  struct disk_superblock sb;
  struct disk_nodes nodes;
  bool torn;
  int fd = openat (site.fd, "superblock", O_RDWR);

  assert (fd >= 0 && superblock_load (fd, &sb, &nodes, &torn) == 0);
  sb.local_instance[0] ^= 1;
  assert (superblock_store (fd, &sb, &nodes) == 0);
  close (fd);
  return le64toh (sb.sequence) % 2 == 0 ? 4096 : 0;
}

/* The cache of the local disk is lost, and so is a slot of the superblock,
 * whose samples prove nothing then: the other slot still tells the mount.
 */
static void
test_one_torn_superblock_slot_and_a_new_mount (void)
{
  off_t older;

  for (int torn = 0; torn < 2; torn++) {
    make_volume (SIZE, REGION);
    killed_at ("after_log=kill", 2 * EXTENT);
    older = mount_again ();
    if (torn)
      flip ("superblock", older + 300);
    check_in_child (one_dirty_extent);
    end_volume ();
  }
}

int
main (void)
{
  alarm (100); /* nothing here may hang */
  RUN (test_one_torn_superblock_slot_and_a_new_mount);
  RUN (test_lost_power_ignores_torn_slots);
  RUN (test_start_killed_after_renewing_a_log_is_still_all_dirty);
  RUN (test_lost_log_means_all_dirty);
  RUN (test_lost_map_of_local_is_kept);
  RUN (test_old_copy_of_a_log_means_all_dirty);
  RUN (test_log_in_use_under_a_clean_superblock_means_all_dirty);
  RUN (test_one_torn_superblock_slot_goes_on);
  return 0;
}
