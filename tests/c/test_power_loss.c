/* SPDX-License-Identifier: BSD-3-Clause */

/* Lost power and killed processes, at every prefix of what was written and
 * synced.  The model is loss.h's; here are the load, the crashes that really
 * happen between two of its lives, and the judge:
 *
 *   - recovery succeeds, whatever was left;
 *   - every region that may differ between local and a remote is dirty on it,
 *     and every region a command may still arrive for is late;
 *   - what was answered with FUA, or before a flush, is on local and on every
 *     remote that was in sync, and stays there;
 *   - nothing more is dirty than what the logs that were left name, and no log
 *     is disbelieved: whatever is torn, none of it looks garbled;
 *   - the local disk is known again by its samples, whatever was lost of it.
 *
 * The judge reads the logs by itself, by docs/FORMAT.md.
 */

#define _GNU_SOURCE

#include <endian.h>
#include <inttypes.h>
#include <poll.h>
#include <stdatomic.h>

#include "api.h"
#include "base/crc32c.h"
#include "base/file.h"
#include "logs/bitmap.h"
#include "logs/layout.h"
#include "logs/superblock.h"
#include "volume/volume.h"
#include "loss.h"

#define EXTENTS 34u /* the bits of the last two lie in a page of their own */
#define SIZE ((uint64_t)EXTENTS * EXTENT_SIZE)
#define UNITS (SIZE / LOSS_UNIT)
#define WORDS ((UNITS + 63) / 64)
#define PEERS 2u
#define WRITERS 3u
#define CYCLES 9u
#define STEPS 30u
#define SAMPLES_JUDGED 4u
#define STRIDE 13u /* of the events that are no sync, one in so many */

static struct site site;
static struct nbdm_params crashed; /* where what was left is recovered */
static int crash_fd, crash_disk;
static int caught_fd; /* what lost power leaves of a start under way */
static char caught_dir[96];
static unsigned catch_in; /* after so many events; 0: not */
static enum loss_how catch_how;
static unsigned nr_caught;
static uint64_t dice, judge_dice;
static unsigned nr_events, nr_recoveries, nr_samples;

/* The boot it is, and the one after the next loss of power. */
static char this_boot[40], next_boot[40];

static void
reboot (void)
{
  static unsigned number;

  snprintf (this_boot, sizeof this_boot, "%08x-0000-4000-8000-000000000000",
            ++number);
  snprintf (next_boot, sizeof next_boot, "%08x-0000-4000-8000-000000000000",
            number + 1);
  loss_set_boot (this_boot);
}

/* --- the judge ------------------------------------------------------- */

static const char *const how_names[]
    = { "unsynced lost", "all survived", "any pages", "any sectors" };

struct verdict {
  enum loss_how how;
  bool lived; /* the process died and the page cache lived */
};

static void __attribute__ ((noreturn))
condemn (const struct verdict *verdict, uint32_t remote, uint64_t unit,
         const char *what)
{
  fprintf (stderr,
           "event %u, %s, %s: remote %u, region %" PRIu64 " (extent %" PRIu64
           ") %s\n",
           nr_events, verdict->lived ? "killed" : "lost power",
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
  bool torn;
  int fd = openat (crash_fd, "superblock", O_RDONLY | O_CLOEXEC);

  assert (fd >= 0 && superblock_load (fd, sb, &torn) == 0);
  close (fd);
  /* What is torn may have said: in use. */
  if (torn)
    sb->flags &= htole32 (~(uint32_t)SUPERBLOCK_CLEAN);
}

/* What the logs that were left name, to be read before they are recovered
 * from.
 */
static void
named_by_logs (uint32_t remote, uint64_t *bits)
{
  static uint64_t file[(LAYOUT_PAGE * (1 + NR_MAPS * 2)) / 8];
  const uint64_t words = bitmap_bytes (UNITS) / 8;
  const uint64_t *map = file + LAYOUT_PAGE / 8;
  struct disk_superblock sb;
  uint8_t boot[16];
  uint64_t mount[3];

  read_superblock (&sb);
  assert (superblock_identity (crash_fd, boot, mount) == 0);
  read_file (remote ? "dirty.dr1" : "dirty.dr0", file, sizeof file);
  memcpy (bits, map + MAP_DIRTY * words, WORDS * 8);
  if (le32toh (sb.flags) & SUPERBLOCK_CLEAN)
    return;
  for (uint64_t w = 0; w < WORDS; w++)
    bits[w]
        |= map[MAP_UNFLUSHED0 * words + w] | map[MAP_UNFLUSHED1 * words + w];
  if (memcmp (boot, sb.boot_id, sizeof boot) == 0)
    add_open_slots (bits);
  else
    add_active_extents (bits);
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

/* The disk stands for the local one, though it is another file: only what it
 * holds is to tell.  And of the samples a few are judged, others each time, as
 * the blocks of all of them take longer than the rest of the judgement.
 */
static void
thin_out_identity (void)
{
  struct disk_superblock slots[2];
  uint64_t r = peer_random (&judge_dice);
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
                       verdict->how, &judge_dice);
    nr_samples += number != 0;
  }
}

static void
judge (const struct verdict *verdict)
{
  static uint64_t named[PEERS][WORDS];
  struct nbdm *v;

  loss_pretend_boot (verdict->lived ? this_boot : next_boot);
  pages_leave (crash_fd, verdict->how, &judge_dice);
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
  nr_recoveries++;
}

static void
at_event (bool sync)
{
  static const struct verdict verdicts[] = { { LOSS_UNSYNCED, false },
                                             { LOSS_NOTHING, false },
                                             { LOSS_PAGES, false },
                                             { LOSS_SECTORS, false },
                                             { LOSS_NOTHING, true } };

  pages_collect ();
  if (catch_in > 0 && --catch_in == 0) {
    loss_pretend_boot (this_boot); /* not recorded */
    pages_leave (caught_fd, catch_how, &judge_dice);
    loss_pretend_boot (NULL);
    nr_caught++;
  }
  if (nr_events++ % STRIDE != 0 && !sync)
    return;
  for (unsigned i = 0; i < sizeof verdicts / sizeof verdicts[0]; i++)
    judge (&verdicts[i]);
}

/* --- load ------------------------------------------------------------ */

static atomic_bool stop_writers;
static atomic_uint nr_requests;
static unsigned nr_durable; /* checks of a remote, under the lock */
static pthread_t writers[WRITERS];
static uint64_t writer_seed[WRITERS];

/* A write to a place that no other thread writes to, made durable with FUA or
 * by a flush: then it is durable on local, and on each remote that is in sync
 * all the while.
 */
static void
durable_write (uint64_t r, unsigned writer_nr)
{
  uint64_t offset = 3 * (uint64_t)EXTENT_SIZE + writer_nr * LOSS_UNIT;
  struct nbdm_disk_status old[PEERS], now[PEERS];
  uint8_t buf[LOSS_UNIT];

  memset (buf, (int)(r >> 32), sizeof buf);
  memcpy (buf, &r, sizeof r);
  for (uint32_t i = 0; i < PEERS; i++)
    old[i] = site_status (&site, i);
  assert (
      nbdm_pwrite (site.volume, buf, sizeof buf, offset, r & 1 ? NBDM_FUA : 0)
      == 0);
  if (!(r & 1))
    assert (nbdm_flush (site.volume) == 0);
  for (uint32_t i = 0; i < PEERS; i++)
    now[i] = site_status (&site, i);
  loss_lock ();
  assert (disk_holds (LOSS_LOCAL, offset, sizeof buf, buf));
  for (uint32_t i = 0; i < PEERS; i++)
    if (old[i].state == NBDM_IN_SYNC && old[i].serial == now[i].serial) {
      assert (disk_holds (1 + i, offset, sizeof buf, buf));
      nr_durable++;
    }
  loss_unlock ();
}

static int
one_request (uint64_t r, uint8_t *buf)
{
  static const uint8_t hot[] = { 0, 1, 2, 30, 31, 32, 33 };
  uint32_t count = (uint32_t)(r % 8 + 1) * LOSS_UNIT;
  uint64_t offset = hot[(r >> 8) % sizeof hot] * (uint64_t)EXTENT_SIZE;
  unsigned kind = r >> 16 & 31;

  /* Few places, so that writes meet; some cross into the next extent. */
  offset += (r >> 24) % 16 * LOSS_UNIT;
  if (r >> 32 & 1 && offset >= EXTENT_SIZE)
    offset -= 8 * LOSS_UNIT;
  for (unsigned i = 0; i < count / LOSS_UNIT; i++)
    memset (buf + i * LOSS_UNIT, (int)(r >> (40 + i)), LOSS_UNIT);
  if (kind == 0)
    return nbdm_flush (site.volume);
  if (kind < 3)
    return nbdm_trim (site.volume, count, offset, kind == 1 ? NBDM_FUA : 0);
  if (kind < 5)
    return nbdm_zero (site.volume, count, offset, kind == 3 ? NBDM_FUA : 0);
  return nbdm_pwrite (site.volume, buf, count, offset, kind < 8 ? NBDM_FUA : 0);
}

static void *
writer (void *opaque)
{
  uintptr_t me = (uintptr_t)opaque;
  uint64_t random = writer_seed[me];
  uint8_t buf[8 * LOSS_UNIT];

  while (!stop_writers) {
    uint64_t r = peer_random (&random);

    if (r % 16 == 0)
      durable_write (r >> 8, (unsigned)me);
    assert (one_request (peer_random (&random), buf) == 0);
    nr_requests++;
    /* In bursts, so that extents go cold and resyncs come to an end. */
    if (peer_random (&random) % 8 == 0)
      poll (NULL, 0, 2);
  }
  return NULL;
}

static void
start_writers (void)
{
  stop_writers = false;
  for (uintptr_t i = 0; i < WRITERS; i++) {
    writer_seed[i] = peer_random (&dice);
    assert (pthread_create (&writers[i], NULL, writer, (void *)i) == 0);
  }
}

static void
end_writers (void)
{
  stop_writers = true;
  for (unsigned i = 0; i < WRITERS; i++)
    pthread_join (writers[i], NULL);
}

/* --- what happens to a volume ---------------------------------------- */

static void
remote_loses_power (uint32_t i)
{
  peer_lose_power (site.peers[i], PEER_LOSE_SOME);
  loss_lock ();
  disk_lost_power (1 + i, peer_image (site.peers[i]));
  loss_unlock ();
}

static void
lose_remote (uint32_t i, uint64_t r)
{
  switch (r % 4) {
  case 0:
    nbdm_disk_drop (site.volume, i + 1, "the test dropped it");
    break;
  case 1:
    peer_cut (site.peers[i], false);
    break;
  case 2:
    peer_cut (site.peers[i], true); /* what was sent may arrive later */
    break;
  default:
    remote_loses_power (i);
    break;
  }
}

static void
resync_batch (uint32_t i)
{
  struct nbdm_resync batch = { .max_bytes = 1u << 20, .pace.depth = 4 };

  /* What may have come late has come, or never will. */
  peer_apply_late (site.peers[i]);
  loss_forget_old (i);
  do
    if (site_resync (&site, i, &batch) < 0)
      return;
  while (batch.next_region != 0);
}

static void
step (void)
{
  uint64_t r = peer_random (&dice);
  uint32_t i = r >> 8 & 1;
  struct nbdm_disk_status status = site_status (&site, i);

  if (!status.remote.admitted) {
    if (r % 4 == 0)
      site_connect (&site, i);
  }
  else if (status.state == NBDM_RESYNCING && r % 4)
    resync_batch (i);
  else if (r % 32 == 4)
    assert (nbdm_remote_invalidate (site.volume, i) == 0);
  else if (r % 16 == 8)
    assert (nbdm_remote_pause (site.volume, i, r >> 9 & 1) == 0);
  else if (r % 4 == 0)
    lose_remote (i, r >> 16);
  if (r >> 24 & 1)
    assert (nbdm_cool (site.volume, 0) == 0);
  if ((r >> 25 & 7) == 0)
    assert (nbdm_local_sample (site.volume, NR_SAMPLES) >= 0);
  poll (NULL, 0, r >> 32 & 3);
}

/* No thread writes and nothing is under way: what the engine holds and what the
 * model takes for the disks must be the same as the disks.
 */
static void
check_model (void)
{
  int fd = open (site.local, O_RDONLY | O_CLOEXEC);

  loss_lock ();
  disk_check (LOSS_LOCAL, fd, NULL);
  for (uint32_t i = 0; i < PEERS; i++)
    disk_check (1 + i, -1, peer_image (site.peers[i]));
  loss_unlock ();
  close (fd);
}

/* The next life begins with what lost power left of this one. */
static void
lose_power (uint64_t r)
{
  static const enum loss_how hows[]
      = { LOSS_UNSYNCED, LOSS_NOTHING, LOSS_PAGES, LOSS_SECTORS };
  enum loss_how how = hows[r % 4];
  int dirfd, fd;

  for (uint32_t i = 0; i < PEERS; i++)
    if (r >> (8 + i) & 1)
      remote_loses_power (i);
    else
      peer_cut (site.peers[i], false);
  loss_pretend_boot (this_boot); /* not recorded */
  dirfd = open (site.state, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  fd = open (site.local, O_RDWR | O_CLOEXEC);
  assert (dirfd >= 0 && fd >= 0);
  loss_lock ();
  pages_leave (dirfd, how, &dice);
  disk_leave_local (fd, r >> 16 & 1 ? LOSS_UNSYNCED : LOSS_PAGES, &dice);
  loss_unlock ();
  close (fd);
  close (dirfd);
  loss_pretend_boot (NULL);
  loss_stop_recording ();
  reboot ();
  loss_record (&site, at_event);
}

/* A start that lost power ends at any event of it: the next one begins with
 * what that left.  Its own events are judged as all are, so what is tried is
 * two losses within starts, or three, one after the other.
 */
static void
start_that_does_not_end (uint64_t r)
{
  static const enum loss_how hows[]
      = { LOSS_UNSYNCED, LOSS_NOTHING, LOSS_PAGES, LOSS_SECTORS };
  char command[300];
  int fd;

  loss_lock ();
  catch_how = hows[r % 4];
  catch_in = 1 + (unsigned)(r >> 8) % 70;
  loss_unlock ();
  assert (nbdm_open (&site.params, &site.volume) == 0);
  nbdm_close (site.volume);
  loss_lock ();
  r = catch_in;
  catch_in = 0;
  loss_unlock ();
  if (r > 0)
    return; /* it came to its end, and was killed then */
  loss_pretend_boot (this_boot);
  snprintf (command, sizeof command, "rm -f %s/* && cp %s/* %s", site.state,
            caught_dir, site.state);
  assert (system (command) == 0);
  fd = open (site.local, O_RDWR | O_CLOEXEC);
  assert (fd >= 0);
  loss_lock ();
  disk_leave_local (fd, LOSS_PAGES, &dice);
  loss_unlock ();
  close (fd);
  loss_pretend_boot (NULL);
  loss_stop_recording ();
  reboot ();
  loss_record (&site, at_event);
}

static void
live (unsigned cycle)
{
  uint64_t r = peer_random (&dice);

  /* What a remote had not flushed when the primary went may be lost later. */
  for (uint32_t i = 0; i < PEERS; i++)
    if (r >> (8 + i) & 1)
      remote_loses_power (i);
  for (unsigned n = cycle == 0 ? 0 : r >> 16 & 3; n > 0; n--)
    start_that_does_not_end (peer_random (&dice));
  site_open (&site);
  for (uint32_t i = 0; i < PEERS; i++)
    if (cycle == 0 || r >> i & 1)
      site_connect (&site, i);
  start_writers ();
  for (unsigned i = 0; i < STEPS; i++)
    step ();
  end_writers ();
  check_model ();
}

static void
make_crash_directory (void)
{
  static char disk[96], dir[96];
  int fd;

  snprintf (disk, sizeof disk, "%s/crashed-disk", site.dir);
  snprintf (dir, sizeof dir, "%s/crashed", site.dir);
  assert (mkdir (dir, 0700) == 0);
  fd = open (disk, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  assert (fd >= 0 && ftruncate (fd, (off_t)SIZE) == 0);
  crash_disk = fd;
  crash_fd = open (dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  assert (crash_fd >= 0);
  snprintf (caught_dir, sizeof caught_dir, "%s/caught", site.dir);
  assert (mkdir (caught_dir, 0700) == 0);
  caught_fd = open (caught_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  assert (caught_fd >= 0);
  crashed = site.params;
  crashed.local = disk;
  crashed.state_dir = dir;
}

int
main (void)
{
  alarm (190); /* nothing here may hang */
  site.seed = dice = site_seed (1);
  judge_dice = dice + 1;
  site.size = SIZE;
  site.region_size = LOSS_UNIT;
  site.hold_ms = 20;
  site.nr_peers = PEERS;
  site.peer.shuffle = true;
  site.peer.enter = loss_enter;
  site.peer.applied = loss_applied;
  site.peer.leave = loss_leave;
  disks_init (SIZE, 1 + PEERS);
  reboot ();
  site_make (&site);
  make_crash_directory ();
  loss_record (&site, at_event);
  for (unsigned cycle = 0; cycle < CYCLES; cycle++) {
    live (cycle);
    switch (cycle % 3) {
    case 0:
      nbdm_close (site.volume);
      lose_power (peer_random (&dice));
      break;
    case 1: /* killed: the page cache lives */
      nbdm_close (site.volume);
      break;
    default:
      assert (nbdm_stop (site.volume) == 0);
      nbdm_close (site.volume);
      break;
    }
    printf ("cycle %u: %u requests, %u events, %u recoveries, %u starts that "
            "lost power, %u samples\n",
            cycle, nr_requests, nr_events, nr_recoveries, nr_caught,
            nr_samples);
    fflush (stdout);
  }
  assert (nr_durable > 0 && nr_caught > 0 && nr_samples > 0);
  loss_stop_recording ();
  disks_free ();
  close (crash_disk);
  close (crash_fd);
  close (caught_fd);
  site_remove (&site);
  return 0;
}
