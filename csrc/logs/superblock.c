/* SPDX-License-Identifier: BSD-3-Clause */

/* The superblock: the identity and the last state of the volume.
 *
 * Two slots of a page are written in turn, so a write that is torn or lost
 * leaves the one before it.  The sequence is even in the first slot and odd in
 * the second: a store knows without a read which slot is the newest, and a slot
 * in the wrong place is not believed.
 *
 * A failed store is not retried: after a failed fdatasync the kernel may treat
 * pages as clean that never reached the disk, and a second one would succeed
 * without a write (rule 10).
 */

#define _GNU_SOURCE

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <unistd.h>

#include "base/crc32c.h"
#include "base/error.h"
#include "base/fault.h"
#include "base/file.h"
#include "logs/layout.h"
#include "logs/superblock.h"

#define FILE_NAME "superblock"
#define NR_SLOTS 2
#define FILE_SIZE (NR_SLOTS * LAYOUT_PAGE)
#define FILE_SIZE_NODES (NODES_OFFSET + NR_SLOTS * LAYOUT_PAGE)

#define BOOT_ID_FILE "/proc/sys/kernel/random/boot_id"
#define BOOT_ID_DIGITS 32

/* Linux 6.8 has mount ids that are never reused; older headers lack the flag,
 * and older kernels do not set it in stx_mask.
 */
#ifndef STATX_MNT_ID_UNIQUE
#define STATX_MNT_ID_UNIQUE 0x4000U
#endif

enum verdict { SLOT_INVALID, SLOT_VALID, SLOT_NOT_OURS };

/* Both pages of a slot.  Of a volume without nodes only the first one is on
 * disk.
 */
struct slot {
  struct disk_superblock sb;
  struct disk_nodes nodes;
};

static uint64_t
slot_offset (uint64_t sequence)
{
  return sequence % NR_SLOTS * LAYOUT_PAGE;
}

bool
superblock_has_nodes (const struct disk_superblock *sb)
{
  return (le64toh (sb->incompatible) & FEATURE_NODES) != 0;
}

static uint32_t
superblock_crc (const struct disk_superblock *sb)
{
  struct disk_superblock copy = *sb;

  copy.crc = 0;
  return crc32c (0, &copy, sizeof copy);
}

static uint32_t
nodes_crc (const struct disk_nodes *nodes)
{
  struct disk_nodes copy = *nodes;

  copy.crc = 0;
  return crc32c (0, &copy, sizeof copy);
}

static void
seal (struct slot *slot, uint64_t sequence)
{
  struct disk_superblock *sb = &slot->sb;
  struct disk_nodes *nodes = &slot->nodes;

  memcpy (sb->magic, SUPERBLOCK_MAGIC, sizeof sb->magic);
  sb->version = htole32 (LAYOUT_VERSION);
  sb->sequence = htole64 (sequence);
  sb->crc = htole32 (superblock_crc (sb));
  if (!superblock_has_nodes (sb))
    return;
  memcpy (nodes->magic, NODES_MAGIC, sizeof nodes->magic);
  nodes->version = sb->version;
  nodes->sequence = sb->sequence;
  nodes->crc = htole32 (nodes_crc (nodes));
}

static bool
is_known_role (const struct disk_superblock *sb)
{
  uint32_t role = le32toh (sb->role);

  return role == ROLE_PRIMARY
         || (role == ROLE_SECONDARY && superblock_has_nodes (sb));
}

static bool
is_torn (const struct slot *slot)
{
  const struct disk_nodes *nodes = &slot->nodes;

  return superblock_has_nodes (&slot->sb)
         && (memcmp (nodes->magic, NODES_MAGIC, sizeof nodes->magic) != 0
             || le32toh (nodes->crc) != nodes_crc (nodes)
             || nodes->sequence != slot->sb.sequence);
}

/* The version is checked after the CRC, which every version has in this place,
 * so that garbage does not look like a newer version.  In a known version the
 * features and the role are checked next.  Only a program that knows all
 * features can tell whether the page of nodes belongs to the slot.
 */
static enum verdict
judge (const struct slot *slot, uint64_t offset)
{
  const struct disk_superblock *sb = &slot->sb;

  if (memcmp (sb->magic, SUPERBLOCK_MAGIC, sizeof sb->magic) != 0
      || le32toh (sb->crc) != superblock_crc (sb))
    return SLOT_INVALID;
  if (le32toh (sb->version) != LAYOUT_VERSION)
    return SLOT_NOT_OURS;
  if (slot_offset (le64toh (sb->sequence)) != offset)
    return SLOT_INVALID;
  if (le64toh (sb->incompatible) & ~(uint64_t)FEATURES_INCOMPATIBLE
      || !is_known_role (sb))
    return SLOT_NOT_OURS;
  return is_torn (slot) ? SLOT_INVALID : SLOT_VALID;
}

static int
refuse (const struct disk_superblock *sb)
{
  uint64_t unknown
      = le64toh (sb->incompatible) & ~(uint64_t)FEATURES_INCOMPATIBLE;

  if (le32toh (sb->version) != LAYOUT_VERSION)
    return set_message (-EPROTONOSUPPORT,
                        FILE_NAME " has version %" PRIu32
                                  ", this program knows only version %d",
                        le32toh (sb->version), LAYOUT_VERSION);
  if (unknown)
    return set_message (-EPROTONOSUPPORT,
                        FILE_NAME " has features that this program does not "
                                  "know: 0x%" PRIx64,
                        unknown);
  return set_message (-EPROTONOSUPPORT,
                      FILE_NAME " is of a volume in the role %" PRIu32
                                ", which this program does not know",
                      le32toh (sb->role));
}

/* The page of nodes goes first: a write that is cut off between the two leaves
 * the slot as it was or torn, and never a new superblock with old nodes.
 */
static int
write_slot (int fd, const struct slot *slot)
{
  uint64_t offset = slot_offset (le64toh (slot->sb.sequence));
  int r = 0;

  if (superblock_has_nodes (&slot->sb))
    r = full_pwrite (fd, &slot->nodes, sizeof slot->nodes,
                     NODES_OFFSET + offset);
  if (r == 0)
    r = full_pwrite (fd, &slot->sb, sizeof slot->sb, offset);
  return r;
}

static int
fill_slots (int fd, const void *opaque)
{
  struct slot slot;
  uint64_t sequence;

  memcpy (&slot, opaque, sizeof slot);
  sequence = le64toh (slot.sb.sequence);
  for (uint64_t s = sequence; s < sequence + NR_SLOTS; s++) {
    seal (&slot, s);
    int r = write_slot (fd, &slot);
    if (r < 0)
      return r;
  }
  return 0;
}

static void
fill_slot (struct slot *slot, const struct disk_superblock *sb,
           const struct disk_nodes *nodes)
{
  memset (slot, 0, sizeof *slot);
  slot->sb = *sb;
  if (superblock_has_nodes (sb))
    slot->nodes = *nodes;
}

int
superblock_create (int dirfd, const struct disk_superblock *sb,
                   const struct disk_nodes *nodes)
{
  struct slot slot;
  uint64_t size = superblock_has_nodes (sb) ? FILE_SIZE_NODES : FILE_SIZE;

  fill_slot (&slot, sb, nodes);
  return file_make_filled (dirfd, FILE_NAME, size, fill_slots, &slot);
}

/* A page of nodes beyond the file's end reads as zeroes, so it is not valid. */
static int
read_slots (int fd, struct slot *slots)
{
  struct stat st;
  int r = 0;

  if (fstat (fd, &st) == -1)
    return set_error (-errno, FILE_NAME);
  if (st.st_size < FILE_SIZE)
    return set_message (-EUCLEAN,
                        FILE_NAME " is truncated: %" PRIu64 " of %d bytes",
                        (uint64_t)st.st_size, FILE_SIZE);
  memset (slots, 0, NR_SLOTS * sizeof slots[0]);
  for (uint64_t i = 0; i < NR_SLOTS && r == 0; i++) {
    r = full_pread (fd, &slots[i].sb, LAYOUT_PAGE, slot_offset (i));
    if (r == 0 && st.st_size >= FILE_SIZE_NODES)
      r = full_pread (fd, &slots[i].nodes, LAYOUT_PAGE,
                      NODES_OFFSET + slot_offset (i));
  }
  return r < 0 ? set_error (r, "cannot read " FILE_NAME) : 0;
}

int
superblock_load (int fd, struct disk_superblock *sb, struct disk_nodes *nodes,
                 bool *torn)
{
  struct slot slots[NR_SLOTS];
  const struct slot *newest = NULL;
  unsigned nr_valid = 0;
  int r = read_slots (fd, slots);

  if (r < 0)
    return r;
  for (unsigned i = 0; i < NR_SLOTS; i++) {
    switch (judge (&slots[i], slot_offset (i))) {
    case SLOT_INVALID:
      continue;
    case SLOT_NOT_OURS:
      /* Even beside a valid slot: the newer program wrote last, so the valid
       * slot is old.
       */
      return refuse (&slots[i].sb);
    case SLOT_VALID:
      break;
    }
    nr_valid++;
    if (newest == NULL
        || le64toh (slots[i].sb.sequence) > le64toh (newest->sb.sequence))
      newest = &slots[i];
  }
  if (newest == NULL)
    return set_message (-EUCLEAN, FILE_NAME " is garbled (both slots)");
  *sb = newest->sb;
  if (superblock_has_nodes (sb))
    *nodes = newest->nodes;
  *torn = nr_valid < NR_SLOTS;
  return 0;
}

/* After a failed fdatasync the slot may exist only in the page cache.  A start
 * must not continue from a state that disappears with the power, so it stores
 * the slot again.  The same bytes in the same place cannot tear.
 */
int
superblock_settle (int fd, const struct disk_superblock *sb,
                   const struct disk_nodes *nodes)
{
  struct slot slot;
  int r = fault_point ("superblock_settle");

  fill_slot (&slot, sb, nodes);
  if (r == 0)
    r = write_slot (fd, &slot);
  if (r == 0 && fdatasync (fd) == -1)
    r = -errno;
  if (r < 0)
    return set_error (r, "cannot make " FILE_NAME " durable");
  fault_point ("superblock_settled");
  return 0;
}

int
superblock_store (int fd, struct disk_superblock *sb, struct disk_nodes *nodes)
{
  struct slot next;
  int r;

  fill_slot (&next, sb, nodes);
  seal (&next, le64toh (sb->sequence) + 1);
  r = fault_point ("superblock_write");
  if (r == 0)
    r = write_slot (fd, &next);
  if (r < 0)
    return set_error (r, "cannot write " FILE_NAME);

  r = fault_point ("superblock_sync");
  if (r == 0 && fdatasync (fd) == -1)
    r = -errno;
  if (r < 0)
    return set_error (r, "cannot make " FILE_NAME " durable");
  fault_point ("superblock_synced");
  *sb = next.sb;
  if (superblock_has_nodes (sb))
    *nodes = next.nodes;
  return 0;
}

static int
hex_digit (char c)
{
  if (c >= '0' && c <= '9')
    return c - '0';
  if (c >= 'a' && c <= 'f')
    return c - 'a' + 10;
  return -1;
}

static int
read_boot_id (uint8_t *boot_id)
{
  uint8_t id[BOOT_ID_DIGITS / 2] = { 0 };
  unsigned digits = 0;
  FILE *file = fopen (BOOT_ID_FILE, "re");
  int c;

  if (file == NULL)
    return set_error (-errno, "cannot open " BOOT_ID_FILE);
  while ((c = fgetc (file)) != EOF && digits < BOOT_ID_DIGITS) {
    int digit = hex_digit ((char)c);

    if (digit == -1) /* the hyphens of a uuid */
      continue;
    id[digits / 2] = (uint8_t)(id[digits / 2] << 4 | digit);
    digits++;
  }
  fclose (file);
  if (digits < BOOT_ID_DIGITS)
    return set_message (-EIO, BOOT_ID_FILE " holds no boot id");
  memcpy (boot_id, id, sizeof id);
  return 0;
}

/* The mount's id alone is not enough, as old kernels reuse ids; nor is the
 * device, as a file system can be mounted again.  If any of the three changed,
 * the page cache may be another one.
 */
int
file_mount_id (int fd, uint64_t *mount_id)
{
  struct statx stx;
  struct stat st;
  struct statfs fs;
  uint32_t fsid[2];

  if (statx (fd, "", AT_EMPTY_PATH, STATX_MNT_ID | STATX_MNT_ID_UNIQUE, &stx)
          == -1
      || fstat (fd, &st) == -1 || fstatfs (fd, &fs) == -1)
    return -errno;
  _Static_assert(sizeof fsid == sizeof fs.f_fsid, "fsid");
  memcpy (fsid, &fs.f_fsid, sizeof fsid);
  mount_id[0] = 0;
  if (stx.stx_mask & (STATX_MNT_ID | STATX_MNT_ID_UNIQUE))
    mount_id[0] = stx.stx_mnt_id;
  mount_id[1] = st.st_dev;
  mount_id[2] = (uint64_t)fsid[1] << 32 | fsid[0];
  return 0;
}

int
superblock_identity (int dirfd, uint8_t *boot_id, uint64_t *mount_id)
{
  uint8_t boot[BOOT_ID_DIGITS / 2] = { 0 };
  int r;

  r = read_boot_id (boot);
  if (r < 0)
    return r;
  r = file_mount_id (dirfd, mount_id);
  if (r < 0)
    return set_error (r, "cannot tell the mount of the state directory");
  memcpy (boot_id, boot, sizeof boot);
  return 0;
}
