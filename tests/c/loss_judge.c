/* SPDX-License-Identifier: BSD-3-Clause */

/* See loss_judge.h. */

#define _GNU_SOURCE

#include <endian.h>
#include <inttypes.h>

#include "api.h"
#include "base/crc32c.h"
#include "base/file.h"
#include "logs/bitmap.h"
#include "logs/layout.h"
#include "logs/superblock.h"
#include "volume/volume.h"
#include "loss_judge.h"

#define UNITS (SIZE / LOSS_UNIT)
#define WORDS ((UNITS + 63) / 64)
#define SAMPLES_JUDGED 4u

static struct nbdm_params crashed; /* where what was left is recovered */
static int crash_fd, crash_disk;
static uint64_t dice;
static unsigned event_number;

unsigned judge_recoveries, judge_samples;

void
judge_begin (const struct site *site, uint64_t seed)
{
  static char disk[96], dir[96];

  dice = seed;
  snprintf (disk, sizeof disk, "%s/crashed-disk", site->dir);
  snprintf (dir, sizeof dir, "%s/crashed", site->dir);
  assert (mkdir (dir, 0700) == 0);
  crash_disk = open (disk, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  assert (crash_disk >= 0 && ftruncate (crash_disk, (off_t)SIZE) == 0);
  crash_fd = open (dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  assert (crash_fd >= 0);
  crashed = site->params;
  crashed.local = disk;
  crashed.state_dir = dir;
}

void
judge_end (void)
{
  close (crash_disk);
  close (crash_fd);
}

static const char *const how_names[]
    = { "unsynced lost", "all survived", "any pages", "any sectors" };

static void __attribute__ ((noreturn))
condemn (const struct verdict *verdict, uint32_t remote, uint64_t unit,
         const char *what)
{
  fprintf (stderr,
           "event %u, %s, %s: remote %u, region %" PRIu64 " (extent %" PRIu64
           ") %s\n",
           event_number, verdict->lived ? "killed" : "lost power",
           how_names[verdict->how], remote, unit,
           unit * LOSS_UNIT / EXTENT_SIZE, what);
  abort ();
}

static void
all_in (const struct verdict *verdict, uint32_t remote, const uint64_t *bits,
        const uint64_t *in, const char *what)
{
  for (uint64_t w = 0; w < WORDS; w++)
    if (bits[w] & ~in[w])
      condemn (verdict, remote,
               w * 64 + (uint64_t)__builtin_ctzll (bits[w] & ~in[w]), what);
}

static void
read_file (const char *name, void *buf, size_t size)
{
  int fd = openat (crash_fd, name, O_RDONLY | O_CLOEXEC);

  assert (fd >= 0 && pread (fd, buf, size, 0) > LAYOUT_PAGE);
  close (fd);
}

static void
add_range (uint64_t *bits, uint64_t offset, uint64_t length)
{
  uint64_t end = offset + length < SIZE ? offset + length : SIZE;

  for (uint64_t u = offset / LOSS_UNIT; u * LOSS_UNIT < end; u++)
    bits[u / 64] |= UINT64_C (1) << u % 64;
}

static void
add_active_extents (uint64_t *bits)
{
  static uint8_t file[LAYOUT_PAGE + 17 * LAYOUT_SECTOR];
  const struct disk_activity_sector *sector
      = (const void *)(file + LAYOUT_PAGE);

  read_file ("activity", file, sizeof file);
  for (unsigned s = 0; s < 17; s++)
    for (unsigned i = 0; i < ACTIVITY_PER_SECTOR; i++)
      if (sector[s].extent[i])
        add_range (bits, (le64toh (sector[s].extent[i]) - 1) * EXTENT_SIZE,
                   EXTENT_SIZE);
}

static void
add_open_slots (uint64_t *bits)
{
  static uint8_t file[LAYOUT_PAGE + RING_SLOTS * sizeof (struct disk_slot)];
  const struct disk_slot *slot = (const void *)(file + LAYOUT_PAGE);

  read_file ("inflight", file, sizeof file);
  for (unsigned i = 0; i < RING_SLOTS; i++)
    if (slot[i].word)
      add_range (bits, le64toh (slot[i].offset), le64toh (slot[i].length));
}

static void
read_superblock (struct disk_superblock *sb)
{
  struct disk_nodes nodes;
  bool torn;
  int fd = openat (crash_fd, "superblock", O_RDONLY | O_CLOEXEC);

  assert (fd >= 0 && superblock_load (fd, sb, &nodes, &torn) == 0);
  close (fd);
  /* The torn slot may have said that the volume is in use. */
  if (torn)
    sb->flags &= htole32 (~(uint32_t)SUPERBLOCK_CLEAN);
}

/* What the logs that were left name, to be read before they are recovered
 * from.
 */
static void
named_by_logs (uint32_t remote, uint64_t *bits)
{
  static uint64_t file[(LAYOUT_PAGE * (1 + NR_NODE_MAPS * 2)) / 8];
  const uint64_t words = bitmap_bytes (UNITS) / 8;
  const uint64_t *map = file + LAYOUT_PAGE / 8;
  struct disk_superblock sb;
  uint8_t boot[16];
  uint64_t mount[3];

  read_superblock (&sb);
  assert (superblock_identity (crash_fd, boot, mount) == 0);
  read_file (remote ? "dirty.dr1" : "dirty.dr0", file, sizeof file);
  memcpy (bits, map + MAP_DIRTY * words, WORDS * 8);
  for (uint64_t w = 0; w < WORDS && crashed.node; w++)
    bits[w] |= map[MAP_DOUBTS * words + w];
  if (le32toh (sb.flags) & SUPERBLOCK_CLEAN)
    return;
  for (uint64_t w = 0; w < WORDS; w++)
    bits[w]
        |= map[MAP_UNFLUSHED0 * words + w] | map[MAP_UNFLUSHED1 * words + w];
  if (memcmp (boot, sb.boot_id, sizeof boot) == 0)
    add_open_slots (bits);
  if (memcmp (boot, sb.boot_id, sizeof boot) != 0 || crashed.node)
    add_active_extents (bits); /* there are three nodes */
}

static void
judge_remote (const struct verdict *verdict, const struct nbdm *v, uint32_t i,
              const uint64_t *named)
{
  static uint64_t differ[WORDS], change[WORDS];
  const uint64_t *dirty = v->remotes[i].disk.dm.map[MAP_DIRTY].words;
  const uint64_t *late = v->remotes[i].disk.dm.map[MAP_LATE].words;

  disks_may_differ (1 + i, verdict->lived, differ);
  all_in (verdict, i, differ, dirty, "may differ and is clean");
  disk_may_change (1 + i, change);
  all_in (verdict, i, change, dirty, "may change and is clean");
  if (crashed.node == NULL) /* a node fences what may come late */
    all_in (verdict, i, change, late, "may change late and is not late");
  all_in (verdict, i, dirty, named, "is dirty and no log says so");
  all_in (verdict, i, named, dirty, "is clean and a log says dirty");
}

static uint32_t
crc_of (const struct disk_superblock *sb)
{
  struct disk_superblock copy = *sb;

  copy.crc = 0;
  return htole32 (crc32c (0, &copy, sizeof copy));
}

/* This disk stands for the local one, though it is another file, so that only
 * its content counts. Of the samples a few are judged, others each time,
 * because reading the blocks of all of them takes longer than the rest of the
 * judgement.
 */
static void
thin_out_identity (void)
{
  struct disk_superblock slots[2];
  uint64_t r = peer_random (&dice);
  int fd = openat (crash_fd, "superblock", O_RDWR | O_CLOEXEC);

  assert (fd >= 0 && full_pread (fd, slots, sizeof slots, 0) == 0);
  for (unsigned i = 0; i < 2; i++) {
    if (slots[i].crc != crc_of (&slots[i]))
      continue;
    slots[i].local_device[0] = '\0';
    for (unsigned n = 0; n < NR_SAMPLES; n++)
      if ((r + n) % 64 >= SAMPLES_JUDGED)
        slots[i].samples[n].block = 0;
    slots[i].crc = crc_of (&slots[i]);
  }
  assert (full_pwrite (fd, slots, sizeof slots, 0) == 0);
  close (fd);
}

/* What the engine may read of the local disk at a start: its samples. */
static void
leave_samples (const struct verdict *verdict)
{
  struct disk_superblock sb;

  read_superblock (&sb);
  for (unsigned i = 0; i < NR_SAMPLES; i++) {
    uint64_t number = le64toh (sb.samples[i].block);

    if (number)
      disk_leave_part (crash_disk, (number - 1) * SAMPLE_BLOCK, SAMPLE_BLOCK,
                       verdict->how, &dice);
    judge_samples += number != 0;
  }
}

void
judge (const struct verdict *verdict, const char *boot, unsigned event)
{
  static uint64_t named[PEERS][WORDS];
  struct nbdm *v;

  event_number = event;
  loss_pretend_boot (boot);
  pages_leave (crash_fd, verdict->how, &dice);
  for (uint32_t i = 0; i < PEERS; i++)
    named_by_logs (i, named[i]);
  thin_out_identity ();
  leave_samples (verdict);
  if (nbdm_open (&crashed, &v) < 0) {
    fprintf (stderr, "open: %s\n", nbdm_last_error ());
    condemn (verdict, 0, 0, "cannot be recovered");
  }
  if (v->reason[0] && strstr (v->reason, "slots of superblock") == NULL)
    condemn (verdict, 0, 0, v->reason);
  if (v->local.state != NBDM_LOCAL_OK || v->local.disk.dm.map[MAP_DIRTY].nr_set)
    condemn (verdict, 0, 0, "is said to be missing on local");
  for (uint32_t i = 0; i < PEERS; i++)
    judge_remote (verdict, v, i, named[i]);
  nbdm_close (v);
  loss_pretend_boot (NULL);
  judge_recoveries++;
}
