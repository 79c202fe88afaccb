/* SPDX-License-Identifier: BSD-3-Clause */

/* The identity of the local disk: samples of its content.
 *
 * A path proves nothing: a symbolic link may lead to another disk, devices
 * change names, and an operator may put an older copy in a disk's place.  So
 * the superblock keeps the CRC of up to 64 blocks, and a start compares them
 * before it serves or writes anything (identity_check.c).  The device's own
 * name (device_id.c) counts only if there is no content to compare.
 *
 * A difference must be a proof at every instant, also after lost power.  This
 * rule ensures it:
 *
 *   The block of a durable sample was not written since, or its extent is in
 *   the durable activity set, or a region of it is durably dirty in
 *   dirty.local.  A start skips samples of the last two kinds.
 *
 * The rule costs a write nothing, because its extent is in the set anyway.
 * These functions keep the rule where a block leaves the set or the map:
 *
 *   extents go cold          identity_cool_locked
 *   copied back to local     identity_copied_back_locked
 *   a clean stop             identity_stop
 *
 * New samples replace void ones.  A clean stop takes all of them, when
 * everything is flushed.  Otherwise the maintenance thread takes samples of
 * extents that are cold, and therefore flushed.  A sampler holds the block's
 * range, so the block's next write comes either before the sample or when the
 * sample is already in the list that going cold looks at.
 *
 * An older program that does not know of samples keeps their bytes but not the
 * rule.  So samples carry their session, which such a program changes.
 */

#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#include "api.h"
#include "base/clock.h"
#include "base/crc64.h"
#include "base/error.h"
#include "base/fault.h"
#include "base/file.h"
#include "logs/activity.h"
#include "logs/bitmap.h"
#include "logs/inflight.h"
#include "logs/layout.h"
#include "logs/rangelock.h"
#include "volume/device_id.h"
#include "volume/identity.h"
#include "volume/local.h"
#include "volume/state.h"
#include "volume/volume.h"

/* Places in the list, by their purpose: the ends of the disk, where partition
 * tables and superblocks are; the latest writes, which an older copy lacks; and
 * blocks spread over the disk.
 */
#define PLACE_FIRST 0u
#define PLACE_LAST 1u
#define PLACE_RECENT 2u
#define PLACE_SPREAD 32u
#define NR_SPREAD (NR_SAMPLES - PLACE_SPREAD)

#define MAX_RECENT 256u /* latest writes looked at */
#define TRIES 4u        /* attempts to find a block for a place */

struct taker {
  struct nbdm *v;
  uint8_t *buf;
  uint64_t random; /* state of the generator */
  bool quiet;      /* a clean stop: active extents too */
  uint32_t taken;
  uint32_t next_recent, nr_recent;
  uint64_t recent[MAX_RECENT]; /* blocks written last, each once */
};

static uint64_t
nr_blocks (const struct nbdm *v)
{
  return (v->size - 1) / SAMPLE_BLOCK + 1;
}

uint64_t
sample_length (const struct nbdm *v, uint64_t block)
{
  uint64_t left = v->size - block * SAMPLE_BLOCK;

  return left < SAMPLE_BLOCK ? left : SAMPLE_BLOCK;
}

uint64_t
sample_crc (const uint8_t *buf, uint64_t length)
{
  uint64_t crc;

  if (all_zero (buf, length))
    return 0;
  crc = crc64 (buf, length);
  return crc ? crc : 1;
}

static bool
missing_on_local_locked (const struct nbdm *v, uint64_t block)
{
  const struct bitmap *missing = &v->local.disk.dm.map[MAP_DIRTY];
  uint64_t first, count;

  if (missing->nr_set == 0)
    return false;
  region_span (v, block * SAMPLE_BLOCK, sample_length (v, block), &first,
               &count);
  return bitmap_next_set (missing, first, first + count) < first + count;
}

static uint64_t
extent_of (uint64_t block)
{
  return block * SAMPLE_BLOCK / EXTENT_SIZE;
}

bool
sample_in_flux_locked (const struct nbdm *v, uint64_t block)
{
  return activity_in_set (&v->activity, extent_of (block))
         || missing_on_local_locked (v, block);
}

/* --- void samples ------------------------------------------------------ */

void
identity_void_outside (struct nbdm *v)
{
  for (uint32_t i = 0; i < NR_SAMPLES; i++)
    if (le64toh (v->sb.samples[i].block) > nr_blocks (v))
      v->sb.samples[i] = (struct disk_sample){ 0 };
}

static uint32_t
void_where_locked (struct nbdm *v,
                   bool (*changes) (const struct nbdm *v, uint64_t block))
{
  uint32_t nr = 0;

  for (uint32_t i = 0; i < NR_SAMPLES; i++) {
    struct disk_sample *sample = &v->sb.samples[i];

    if (sample->block == 0 || !changes (v, le64toh (sample->block) - 1))
      continue;
    *sample = (struct disk_sample){ 0 };
    nr++;
  }
  return nr;
}

static bool
cools_locked (const struct nbdm *v, uint64_t block)
{
  return activity_is_cooling (&v->activity, extent_of (block));
}

int
identity_cool_locked (struct nbdm *v)
{
  int rc = 0;

  if (void_where_locked (v, cools_locked) > 0)
    rc = volume_persist_locked (v);
  fault_point ("cool_voided");
  return rc;
}

int
identity_copied_back_locked (struct nbdm *v)
{
  return void_where_locked (v, missing_on_local_locked) > 0
             ? volume_persist_locked (v)
             : 0;
}

void
identity_forget_locked (struct nbdm *v)
{
  memset (v->sb.samples, 0, sizeof v->sb.samples);
  memset (v->sb.local_device, 0, sizeof v->sb.local_device);
  memset (v->sb.local_instance, 0, sizeof v->sb.local_instance);
  v->sb.local_size = 0;
}

/* --- take samples ------------------------------------------------------ */

static uint64_t
random_below (struct taker *t, uint64_t end)
{
  t->random ^= t->random << 13;
  t->random ^= t->random >> 7;
  t->random ^= t->random << 17;
  return t->random % end;
}

static bool
sampled_locked (const struct nbdm *v, uint64_t block)
{
  for (uint32_t i = 0; i < NR_SAMPLES; i++)
    if (le64toh (v->sb.samples[i].block) == block + 1)
      return true;
  return false;
}

static bool
may_take_locked (const struct taker *t, uint64_t block)
{
  const struct nbdm *v = t->v;

  return v->local.state != NBDM_LOCAL_FAILED && !v->failed
         && (t->quiet || !v->stopping) && !missing_on_local_locked (v, block)
         && (t->quiet || !activity_in_set (&v->activity, extent_of (block)));
}

/* The extent may become active during the read.  That does no harm: this thread
 * holds the block's range, and going cold will find the sample.
 */
static bool
take_in_use (struct taker *t, uint32_t place, uint64_t block)
{
  struct nbdm *v = t->v;
  struct range range
      = { .offset = block * SAMPLE_BLOCK, .length = sample_length (v, block) };
  unsigned failures;
  bool free;
  int rc;

  pthread_mutex_lock (&v->lock);
  failures = v->local.failures;
  free = may_take_locked (t, block) && !sampled_locked (v, block)
         && rangelock_try (&v->ranges, &range);
  pthread_mutex_unlock (&v->lock);
  if (!free)
    return false;
  /* Not local_pread: no request asked for this read, so its error does not
   * count.
   */
  rc = local_sample (v, t->buf, range.length, range.offset);
  fault_point ("sample_read");
  pthread_mutex_lock (&v->lock);
  if (rc == 0 && v->local.state != NBDM_LOCAL_FAILED
      && v->local.failures == failures) {
    v->sb.samples[place].block = htole64 (block + 1);
    v->sb.samples[place].crc = htole64 (sample_crc (t->buf, range.length));
    t->taken++;
  }
  rangelock_remove (&v->ranges, &range);
  pthread_mutex_unlock (&v->lock);
  return rc == 0;
}

/* Keep the disk from being replaced: the sample would be of the new one. */
static bool
take (struct taker *t, uint32_t place, uint64_t block)
{
  bool taken;

  local_use (t->v);
  taken = take_in_use (t, place, block);
  local_leave ();
  return taken;
}

/* Prefer a block with data in the place's part of the disk, because all holes
 * look the same.
 */
static uint64_t
spread_block (struct taker *t, uint32_t place)
{
  struct nbdm *v = t->v;
  uint64_t part = place % NR_SPREAD, nr = nr_blocks (v);
  uint64_t first = nr * part / NR_SPREAD, end = nr * (part + 1) / NR_SPREAD;
  uint64_t block, data;

  if (end == first)
    end = first + 1;
  block = first + random_below (t, end - first);
  data = local_hole_end (v, block * SAMPLE_BLOCK, v->size) / SAMPLE_BLOCK;
  if (data >= end)
    data = local_hole_end (v, first * SAMPLE_BLOCK, v->size) / SAMPLE_BLOCK;
  return data > block && data < end ? data : block;
}

static void
fill_place (struct taker *t, uint32_t place)
{
  bool done = false;

  if (place == PLACE_FIRST)
    done = take (t, place, 0);
  else if (place == PLACE_LAST)
    done = take (t, place, nr_blocks (t->v) - 1);
  else if (place < PLACE_SPREAD)
    while (!done && t->next_recent < t->nr_recent)
      done = take (t, place, t->recent[t->next_recent++]);
  if (place < PLACE_RECENT)
    return;
  for (unsigned i = 0; i < TRIES && !done; i++)
    done = take (t, place, spread_block (t, place));
}

static bool
contains (const uint64_t *blocks, uint32_t nr, uint64_t block)
{
  for (uint32_t i = 0; i < nr; i++)
    if (blocks[i] == block)
      return true;
  return false;
}

/* List the blocks of the latest writes, latest first, as many as there are
 * places.
 */
static void
find_recent_locked (struct taker *t)
{
  uint64_t offsets[MAX_RECENT];
  uint32_t nr = inflight_recent (&t->v->inflight, offsets, MAX_RECENT);

  for (uint32_t i = 0; i < nr; i++) {
    uint64_t block = offsets[i] / SAMPLE_BLOCK;

    if (block < nr_blocks (t->v) && !contains (t->recent, t->nr_recent, block))
      t->recent[t->nr_recent++] = block;
  }
  if (t->quiet && t->nr_recent > PLACE_SPREAD - PLACE_RECENT)
    t->nr_recent = PLACE_SPREAD - PLACE_RECENT;
}

/* At a clean stop: drop samples of active extents, because their content is
 * old, and drop samples of old writes to make room for the latest ones.
 */
static void
make_places_locked (struct taker *t)
{
  struct nbdm *v = t->v;
  uint32_t room = 0;

  void_where_locked (v, sample_in_flux_locked);
  for (uint32_t i = 0; i < t->nr_recent; i++)
    room += !sampled_locked (v, t->recent[i]);
  for (uint32_t i = PLACE_RECENT; i < PLACE_SPREAD && room > 0; i++) {
    struct disk_sample *sample = &v->sb.samples[i];

    if (sample->block
        && contains (t->recent, t->nr_recent, le64toh (sample->block) - 1))
      continue;
    *sample = (struct disk_sample){ 0 };
    room--;
  }
}

static int
taker_init (struct taker *t)
{
  t->buf = malloc (SAMPLE_BLOCK);
  if (t->buf == NULL)
    return set_error (-ENOMEM, "samples of the local disk");
  if (getrandom (&t->random, sizeof t->random, 0) != (ssize_t)sizeof t->random)
    t->random = now_ns ();
  t->random |= 1;
  return 0;
}

static void
fill_places (struct taker *t)
{
  for (uint32_t i = 0; i < NR_SAMPLES; i++) {
    bool void_place;

    pthread_mutex_lock (&t->v->lock);
    void_place = t->v->sb.samples[i].block == 0;
    pthread_mutex_unlock (&t->v->lock);
    if (void_place)
      fill_place (t, i);
  }
}

/* Count the samples that a start could compare if the process died now. */
static uint32_t
count_still_locked (const struct nbdm *v)
{
  uint32_t nr = 0;

  for (uint32_t i = 0; i < NR_SAMPLES; i++)
    if (v->sb.samples[i].block
        && !sample_in_flux_locked (v, le64toh (v->sb.samples[i].block) - 1))
      nr++;
  return nr;
}

/* Reuse places whose sample is in flux, because it will be void soon.  This
 * changes memory only; the old sample stays if no other block can be taken.
 */
static void
replace_in_flux (struct taker *t)
{
  struct nbdm *v = t->v;

  for (uint32_t i = PLACE_RECENT; i < NR_SAMPLES; i++) {
    struct disk_sample old;
    bool in_flux;

    pthread_mutex_lock (&v->lock);
    old = v->sb.samples[i];
    in_flux = old.block && sample_in_flux_locked (v, le64toh (old.block) - 1);
    pthread_mutex_unlock (&v->lock);
    if (in_flux)
      fill_place (t, i);
  }
}

int
nbdm_local_sample (struct nbdm *v, uint32_t least)
{
  struct taker *t = calloc (1, sizeof *t);
  bool enough;
  int rc;

  if (t == NULL)
    return set_error (-ENOMEM, "samples of the local disk");
  t->v = v;
  pthread_mutex_lock (&v->lock);
  enough = v->failed || v->stopping || v->local.state == NBDM_LOCAL_FAILED
           || count_still_locked (v) >= least;
  if (!enough)
    find_recent_locked (t);
  pthread_mutex_unlock (&v->lock);
  rc = enough ? 0 : taker_init (t);
  if (!enough && rc == 0) {
    fill_places (t);
    replace_in_flux (t);
    pthread_mutex_lock (&v->lock);
    if (t->taken > 0 && !v->stopping)
      rc = volume_persist_locked (v);
    pthread_mutex_unlock (&v->lock);
  }
  if (rc == 0)
    rc = (int)t->taken;
  free (t->buf);
  free (t);
  return rc;
}

int
identity_stop (struct nbdm *v)
{
  struct taker *t = calloc (1, sizeof *t);
  int rc = t ? taker_init (t) : -ENOMEM;

  pthread_mutex_lock (&v->lock);
  if (rc == 0) {
    t->v = v;
    t->quiet = true;
    find_recent_locked (t);
    make_places_locked (t);
  }
  else
    void_where_locked (v, sample_in_flux_locked);
  pthread_mutex_unlock (&v->lock);
  if (rc == 0)
    fill_places (t);
  pthread_mutex_lock (&v->lock);
  rc = volume_persist_locked (v);
  pthread_mutex_unlock (&v->lock);
  fault_point ("stop_sampled");
  if (t)
    free (t->buf);
  free (t);
  return rc;
}

void
identity_describe (const struct nbdm *v, struct described_disk *disk)
{
  int fd = v->local.file.fd;
  off_t end = lseek (fd, 0, SEEK_END);

  *disk = (struct described_disk){ .size = end > 0 ? (uint64_t)end : 0 };
  device_describe (fd, disk->device, sizeof disk->device);
  device_instance (fd, disk->instance);
}

void
identity_adopt_locked (struct nbdm *v, const struct described_disk *disk)
{
  v->sb.local_size = htole64 (disk->size);
  memcpy (v->sb.local_device, disk->device, sizeof v->sb.local_device);
  for (unsigned i = 0; i < 3; i++)
    v->sb.local_instance[i] = htole64 (disk->instance[i]);
}
