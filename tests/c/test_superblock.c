/* SPDX-License-Identifier: BSD-3-Clause */

/* The superblock: a store that is torn or killed leaves the one before, and
 * what cannot be believed is refused with its cause.
 */

#include "base/crc32c.h"
#include "base/fault.h"
#include "base/file.h"
#include "logs/layout.h"
#include "logs/superblock.h"
#include "test.h"

#include <endian.h>

static struct disk_nodes unused; /* these volumes have no nodes */

static struct disk_superblock
sample (void)
{
  struct disk_superblock sb = { 0 };

  strcpy (sb.name, "pg");
  memset (sb.uuid, 0x5a, sizeof sb.uuid);
  sb.size = htole64 (UINT64_C (10) << 30);
  sb.session = htole64 (1);
  sb.role = htole32 (ROLE_PRIMARY);
  return sb;
}

static int
open_file (const struct folder *folder)
{
  int fd = openat (folder->fd, "superblock", O_RDWR | O_CLOEXEC);

  assert (fd >= 0);
  return fd;
}

static int
make (struct folder *folder)
{
  struct disk_superblock sb = sample ();

  *folder = folder_make ();
  assert (superblock_create (folder->fd, &sb, &unused) == 0);
  return open_file (folder);
}

static void
drop (struct folder *folder, int fd)
{
  close (fd);
  folder_remove (folder, FILES ("superblock"));
}

static struct disk_superblock
load (int fd, bool expect_torn)
{
  struct disk_superblock sb;
  bool torn;

  assert (superblock_load (fd, &sb, &unused, &torn) == 0);
  assert (expect_torn == torn);
  return sb;
}

/* Where on disk the superblock that was loaded lies. */
static off_t
place (int fd, const struct disk_superblock *sb)
{
  struct disk_superblock slot;

  for (off_t offset = 0; offset < 2 * LAYOUT_PAGE; offset += LAYOUT_PAGE) {
    assert (full_pread (fd, &slot, sizeof slot, (uint64_t)offset) == 0);
    if (memcmp (&slot, sb, sizeof slot) == 0)
      return offset;
  }
  abort ();
}

static void
test_superblock_created_loads_with_both_slots (void)
{
  struct folder folder;
  int fd = make (&folder);
  struct disk_superblock sb = load (fd, false), expect = sample ();

  assert (file_size (&folder, "superblock") == 2 * LAYOUT_PAGE);
  assert (memcmp (sb.magic, SUPERBLOCK_MAGIC, 8) == 0);
  assert (le32toh (sb.version) == LAYOUT_VERSION);
  assert (memcmp (sb.uuid, expect.uuid, sizeof sb.uuid) == 0);
  assert (sb.size == expect.size && strcmp (sb.name, "pg") == 0);
  drop (&folder, fd);
}

static void
test_superblock_store_takes_the_older_slot (void)
{
  struct folder folder;
  int fd = make (&folder);
  struct disk_superblock sb = load (fd, false);

  for (uint64_t i = 2; i < 7; i++) {
    off_t before = place (fd, &sb);
    uint64_t sequence = le64toh (sb.sequence);

    sb.session = htole64 (i);
    assert (superblock_store (fd, &sb, &unused) == 0);
    assert (le64toh (sb.sequence) == sequence + 1);
    assert (place (fd, &sb) != before);
    struct disk_superblock again = load (fd, false);
    assert (memcmp (&again, &sb, sizeof sb) == 0);
  }
  drop (&folder, fd);
}

static void
test_superblock_torn_newest_falls_back_to_older (void)
{
  struct folder folder;
  int fd = make (&folder);
  struct disk_superblock sb = load (fd, false), old = sb;

  sb.session = htole64 (99);
  assert (superblock_store (fd, &sb, &unused) == 0);
  garble (&folder, "superblock", place (fd, &sb) + 1000);
  struct disk_superblock found = load (fd, true);
  assert (memcmp (&found, &old, sizeof old) == 0);
  /* The next store goes over the torn slot, and both are whole again. */
  assert (superblock_store (fd, &found, &unused) == 0);
  load (fd, false);
  drop (&folder, fd);
}

static void
test_superblock_torn_older_is_told (void)
{
  struct folder folder;
  int fd = make (&folder);
  struct disk_superblock sb = load (fd, false);

  garble (&folder, "superblock", LAYOUT_PAGE - place (fd, &sb) + 4095);
  struct disk_superblock found = load (fd, true);
  assert (memcmp (&found, &sb, sizeof sb) == 0);
  drop (&folder, fd);
}

static void
assert_refused (int fd, const char *words)
{
  struct disk_superblock sb;
  bool torn;

  assert (superblock_load (fd, &sb, &unused, &torn) == -EUCLEAN);
  ASSERT_SAYS (words);
}

static void
assert_not_ours (int fd, const char *words)
{
  struct disk_superblock sb;
  bool torn;

  assert (superblock_load (fd, &sb, &unused, &torn) == -EPROTONOSUPPORT);
  ASSERT_SAYS (words);
}

/* Store the superblock as another program would. */
static void
put_sealed (int fd, struct disk_superblock *sb, off_t offset)
{
  sb->crc = 0;
  sb->crc = htole32 (crc32c (0, sb, sizeof *sb));
  assert (full_pwrite (fd, sb, sizeof *sb, (uint64_t)offset) == 0);
}

static void
test_superblock_both_garbled_is_refused (void)
{
  struct folder folder;
  int fd = make (&folder);

  garble (&folder, "superblock", 17);
  garble (&folder, "superblock", 4096);
  assert_refused (fd, "superblock is garbled");
  drop (&folder, fd);
}

static void
test_superblock_every_byte_is_covered (void)
{
  struct folder folder;
  int fd = make (&folder);
  struct disk_superblock sb = load (fd, false);
  off_t newest = place (fd, &sb);

  for (off_t i = 0; i < LAYOUT_PAGE; i += 7) {
    garble (&folder, "superblock", newest + i);
    load (fd, true);
    garble (&folder, "superblock", newest + i);
  }
  load (fd, false);
  drop (&folder, fd);
}

static void
test_superblock_slots_exchanged_are_refused (void)
{
  struct folder folder;
  int fd = make (&folder);
  char slots[2][LAYOUT_PAGE];

  assert (full_pread (fd, slots, sizeof slots, 0) == 0);
  assert (full_pwrite (fd, slots[1], LAYOUT_PAGE, 0) == 0);
  assert (full_pwrite (fd, slots[0], LAYOUT_PAGE, LAYOUT_PAGE) == 0);
  assert_refused (fd, "superblock is garbled");
  drop (&folder, fd);
}

static void
test_superblock_truncated_is_refused (void)
{
  struct folder folder;
  int fd = make (&folder);

  assert (ftruncate (fd, 8191) == 0);
  assert_refused (fd, "superblock is truncated: 8191 of 8192 bytes");
  assert (ftruncate (fd, 0) == 0);
  assert_refused (fd, "superblock is truncated: 0 of 8192 bytes");
  drop (&folder, fd);
}

/* One slot of a newer program is enough: the valid one beside it is old. */
static void
test_superblock_unknown_version_is_refused (void)
{
  struct folder folder;
  int fd = make (&folder);
  struct disk_superblock sb = load (fd, false);
  off_t other = LAYOUT_PAGE - place (fd, &sb);

  sb.version = htole32 (LAYOUT_VERSION + 6);
  put_sealed (fd, &sb, other);
  assert_not_ours (fd, "version 7");
  ASSERT_SAYS ("version 1");
  drop (&folder, fd);
}

static void
test_superblock_unknown_incompatible_feature_is_refused (void)
{
  struct folder folder;
  int fd = make (&folder);
  struct disk_superblock sb = load (fd, false);
  off_t newest = place (fd, &sb);

  sb.compatible = htole64 (UINT64_C (1) << 40);
  put_sealed (fd, &sb, newest);
  load (fd, false); /* is no reason to refuse it */
  sb.incompatible = htole64 (UINT64_C (1) << 40);
  put_sealed (fd, &sb, newest);
  assert_not_ours (fd, "features that this program does not know");
  ASSERT_SAYS ("0x10000000000");
  drop (&folder, fd);
}

static void
test_superblock_unknown_role_is_refused (void)
{
  struct folder folder;
  int fd = make (&folder);
  struct disk_superblock sb = load (fd, false);

  sb.role = htole32 (2);
  put_sealed (fd, &sb, (off_t)(le64toh (sb.sequence) % 2) * LAYOUT_PAGE);
  assert_not_ours (fd, "in the role 2");
  drop (&folder, fd);
}

static void
store_99 (void *opaque)
{
  int fd = *(int *)opaque;
  struct disk_superblock sb = load (fd, false);

  fault_init ();
  sb.session = htole64 (99);
  _exit (superblock_store (fd, &sb, &unused) == 0 ? 0 : 1);
}

static void
test_superblock_killed_before_write_keeps_the_old (void)
{
  struct folder folder;
  int fd = make (&folder);

  assert (killed (in_child ("superblock_write=kill", store_99, &fd)));
  assert (le64toh (load (fd, false).session) == 1);
  assert (killed (in_child ("superblock_sync=kill", store_99, &fd)));
  assert (le64toh (load (fd, false).session) == 99);
  drop (&folder, fd);
}

static void
fail_store (void *opaque)
{
  int fd = *(int *)opaque;
  struct disk_superblock sb = load (fd, false);

  fault_init ();
  sb.session = htole64 (99);
  struct disk_superblock before = sb;
  assert (superblock_store (fd, &sb, &unused) == -EIO);
  ASSERT_SAYS ("superblock");
  ASSERT_SAYS ("Input/output error");
  assert (memcmp (&before, &sb, sizeof sb) == 0);
}

static void
test_superblock_failed_store_is_an_error (void)
{
  struct folder folder;
  int fd = make (&folder);

  assert (passed (in_child ("superblock_write=error", fail_store, &fd)));
  assert (le64toh (load (fd, false).session) == 1);
  assert (passed (in_child ("superblock_sync=error", fail_store, &fd)));
  drop (&folder, fd);
}

static void
test_superblock_identity_is_this_boot_and_mount (void)
{
  struct folder folder = folder_make ();
  uint8_t boot[2][16];
  uint64_t mount[2][3], proc[3];
  char text[64], hex[33];
  int fd = open ("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
  unsigned n = 0;

  assert (superblock_identity (folder.fd, boot[0], mount[0]) == 0);
  assert (superblock_identity (folder.fd, boot[1], mount[1]) == 0);
  assert (memcmp (boot[0], boot[1], sizeof boot[0]) == 0);
  assert (memcmp (mount[0], mount[1], sizeof mount[0]) == 0);

  assert (fd >= 0 && read (fd, text, sizeof text) >= 36);
  close (fd);
  for (unsigned i = 0; i < 36; i++) {
    if (text[i] != '-')
      hex[n++] = text[i];
  }
  for (unsigned i = 0; i < 16; i++) {
    char two[3];
    snprintf (two, sizeof two, "%02x", boot[0][i]);
    assert (memcmp (two, hex + 2 * i, 2) == 0);
  }

  fd = open ("/proc", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  assert (fd >= 0 && superblock_identity (fd, boot[1], proc) == 0);
  assert (proc[0] != mount[0][0] && proc[1] != mount[0][1]);
  close (fd);
  folder_remove (&folder, NO_FILES);
}

int
main (void)
{
  RUN (test_superblock_created_loads_with_both_slots);
  RUN (test_superblock_store_takes_the_older_slot);
  RUN (test_superblock_torn_newest_falls_back_to_older);
  RUN (test_superblock_torn_older_is_told);
  RUN (test_superblock_both_garbled_is_refused);
  RUN (test_superblock_every_byte_is_covered);
  RUN (test_superblock_slots_exchanged_are_refused);
  RUN (test_superblock_truncated_is_refused);
  RUN (test_superblock_unknown_version_is_refused);
  RUN (test_superblock_unknown_incompatible_feature_is_refused);
  RUN (test_superblock_unknown_role_is_refused);
  RUN (test_superblock_killed_before_write_keeps_the_old);
  RUN (test_superblock_failed_store_is_an_error);
  RUN (test_superblock_identity_is_this_boot_and_mount);
  return 0;
}
