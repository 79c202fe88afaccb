/* SPDX-License-Identifier: BSD-3-Clause */

/* The disks, as far as lost power is concerned.  See loss.h.
 *
 * A region's content is a hash of it, so that what is compared is what was
 * really written and copied, and a region that several contents are possible
 * for is one with several hashes.  A torn write leaves one more, but only where
 * two contents were possible before.
 */

#include "loss.h"

#define UNIT_WORDS (LOSS_UNIT / sizeof (uint64_t))
#define MAX_DISKS 3u

struct write_op {
  struct write_op *next;
  uint64_t serial, cookie;
  uint64_t ended; /* stamp; 0: under way */
  uint64_t first, count;
  const uint8_t *bytes; /* of the local disk: a copy, to be left again */
  uint64_t tag[];
};

struct modelled {
  uint64_t *base;         /* what is surely durable */
  uint64_t *now;          /* what a read sees */
  struct write_op *first; /* not surely durable; ended ones in their order */
};

static struct modelled disks[MAX_DISKS];
static uint32_t nr_disks;
static uint64_t nr_units, clock_now;
static uint8_t *durable_bytes; /* of the local disk */

static uint64_t
hash (const void *data)
{
  const uint64_t *word = data;
  uint64_t h = 0, any = 0;

  for (unsigned i = 0; i < UNIT_WORDS; i++) {
    h = (h ^ word[i]) * UINT64_C (0x9e3779b97f4a7c15);
    h ^= h >> 29;
    any |= word[i];
  }
  return any ? h | 1 : 0;
}

void
disks_init (uint64_t size, uint32_t nr)
{
  assert (nr <= MAX_DISKS && size % LOSS_UNIT == 0);
  nr_units = size / LOSS_UNIT;
  nr_disks = nr;
  for (uint32_t i = 0; i < nr; i++) {
    disks[i].base = calloc (nr_units, sizeof (uint64_t));
    disks[i].now = calloc (nr_units, sizeof (uint64_t));
    assert (disks[i].base && disks[i].now);
  }
  durable_bytes = calloc (nr_units, LOSS_UNIT);
  assert (durable_bytes);
}

static void
op_free (struct write_op *op)
{
  free ((void *)op->bytes);
  free (op);
}

static void
drop_ops (struct modelled *d)
{
  struct write_op *op, *next;

  for (op = d->first; op; op = next) {
    next = op->next;
    op_free (op);
  }
  d->first = NULL;
}

void
disks_free (void)
{
  for (uint32_t i = 0; i < nr_disks; i++) {
    drop_ops (&disks[i]);
    free (disks[i].base);
    free (disks[i].now);
  }
  free (durable_bytes);
}

static const uint8_t *
unit_bytes (int fd, const uint8_t *image, uint64_t unit, uint8_t *buf)
{
  if (image)
    return image + unit * LOSS_UNIT;
  assert (pread (fd, buf, LOSS_UNIT, (off_t)(unit * LOSS_UNIT)) == LOSS_UNIT);
  return buf;
}

void
disk_adopt_local (int fd)
{
  uint64_t buf[UNIT_WORDS];
  struct modelled *d = &disks[LOSS_LOCAL];

  drop_ops (d);
  for (uint64_t i = 0; i < nr_units; i++) {
    uint64_t tag = hash (unit_bytes (fd, NULL, i, (uint8_t *)buf));

    if (tag || d->base[i])
      memcpy (durable_bytes + i * LOSS_UNIT, buf, LOSS_UNIT);
    d->base[i] = d->now[i] = tag;
  }
}

void
disk_lost_power (uint32_t disk, const uint8_t *image)
{
  struct modelled *d = &disks[disk];
  struct write_op *op, *next;

  for (op = d->first; op; op = next) {
    next = op->next;
    if (op->ended == 0)
      continue;
    for (uint64_t i = op->first; i < op->first + op->count; i++)
      d->base[i] = d->now[i] = hash (image + i * LOSS_UNIT);
    disk_cancel (disk, op);
  }
}

void
disk_check (uint32_t disk, int fd, const uint8_t *image)
{
  uint64_t buf[UNIT_WORDS];

  for (uint64_t i = 0; i < nr_units; i++)
    assert (hash (unit_bytes (fd, image, i, (uint8_t *)buf))
            == disks[disk].now[i]);
}

static void
append (struct modelled *d, struct write_op *op)
{
  struct write_op **p = &d->first;

  while (*p)
    p = &(*p)->next;
  op->next = NULL;
  *p = op;
}

static void
take_out (struct modelled *d, struct write_op *op)
{
  struct write_op **p = &d->first;

  while (*p != op)
    p = &(*p)->next;
  *p = op->next;
}

struct write_op *
disk_begin (uint32_t disk, uint64_t offset, uint64_t length, const void *data,
            uint64_t serial)
{
  uint64_t count = length / LOSS_UNIT;
  struct write_op *op = calloc (1, sizeof *op + count * sizeof op->tag[0]);

  assert (op && offset % LOSS_UNIT == 0 && length % LOSS_UNIT == 0);
  op->first = offset / LOSS_UNIT;
  op->count = count;
  op->serial = serial;
  for (uint64_t i = 0; data && i < count; i++)
    op->tag[i] = hash ((const uint8_t *)data + i * LOSS_UNIT);
  if (disk == LOSS_LOCAL && data) {
    op->bytes = malloc (length);
    assert (op->bytes);
    memcpy ((void *)op->bytes, data, length);
  }
  append (&disks[disk], op);
  return op;
}

void
disk_set_cookie (struct write_op *op, uint64_t cookie)
{
  op->cookie = cookie;
}

/* Cookies begin anew with each connection: the latest that fits. */
struct write_op *
disk_find (uint32_t disk, uint64_t cookie, uint64_t offset, uint64_t length)
{
  struct write_op *found = NULL;

  for (struct write_op *op = disks[disk].first; op; op = op->next)
    if (op->ended == 0 && op->cookie == cookie
        && op->first == offset / LOSS_UNIT && op->count == length / LOSS_UNIT)
      found = op;
  return found;
}

bool
disk_brings (const struct write_op *op, const void *data)
{
  for (uint64_t i = 0; i < op->count; i++)
    if (op->tag[i] != (data ? hash ((const uint8_t *)data + i * LOSS_UNIT) : 0))
      return false;
  return true;
}

void
disk_cancel (uint32_t disk, struct write_op *op)
{
  take_out (&disks[disk], op);
  op_free (op);
}

static void
settle (struct modelled *d, struct write_op *op)
{
  memcpy (&d->base[op->first], op->tag, op->count * sizeof op->tag[0]);
  if (d == &disks[LOSS_LOCAL]) {
    uint8_t *to = durable_bytes + op->first * LOSS_UNIT;

    if (op->bytes)
      memcpy (to, op->bytes, op->count * LOSS_UNIT);
    else
      memset (to, 0, op->count * LOSS_UNIT);
  }
  take_out (d, op);
  op_free (op);
}

/* A durable write leaves nothing of the older ones under it. */
static void
overwrite (struct modelled *d, const struct write_op *newer)
{
  for (struct write_op *op = d->first; op; op = op->next)
    for (uint64_t i = 0; op != newer && op->ended && i < op->count; i++) {
      uint64_t unit = op->first + i;

      if (unit >= newer->first && unit < newer->first + newer->count)
        op->tag[i] = newer->tag[unit - newer->first];
    }
}

void
disk_end (uint32_t disk, struct write_op *op, bool durable)
{
  struct modelled *d = &disks[disk];

  op->ended = ++clock_now;
  memcpy (&d->now[op->first], op->tag, op->count * sizeof op->tag[0]);
  take_out (d, op);
  append (d, op);
  if (durable) {
    assert (disk != LOSS_LOCAL);
    overwrite (d, op);
    settle (d, op);
  }
}

uint64_t
disk_stamp (void)
{
  return clock_now;
}

void
disk_flushed (uint32_t disk, uint64_t stamp)
{
  struct write_op *op, *next;

  for (op = disks[disk].first; op; op = next) {
    next = op->next;
    if (op->ended && op->ended <= stamp)
      settle (&disks[disk], op);
  }
}

void
disk_forget (uint32_t disk, uint64_t before_serial)
{
  struct write_op *op, *next;

  for (op = disks[disk].first; op; op = next) {
    next = op->next;
    if (op->ended == 0 && op->serial < before_serial)
      disk_cancel (disk, op);
  }
}

static void
set_bit (uint64_t *bits, uint64_t unit)
{
  bits[unit / 64] |= UINT64_C (1) << unit % 64;
}

void
disks_may_differ (uint32_t disk, bool lived, uint64_t *bits)
{
  const struct modelled *local = &disks[LOSS_LOCAL], *remote = &disks[disk];
  const uint64_t *ours = lived ? local->now : local->base;

  memset (bits, 0, (nr_units + 63) / 64 * sizeof *bits);
  for (uint64_t i = 0; i < nr_units; i++)
    if (ours[i] != remote->base[i])
      set_bit (bits, i);
  for (int side = 0; side < 2; side++) {
    const struct write_op *op = side ? remote->first : local->first;

    for (; op; op = op->next) {
      if (!side && lived && op->ended)
        continue; /* in `now`, and the page cache lives */
      for (uint64_t i = 0; i < op->count; i++)
        if (op->tag[i] != ours[op->first + i]
            || op->tag[i] != remote->base[op->first + i])
          set_bit (bits, op->first + i);
    }
  }
}

void
disk_may_change (uint32_t disk, uint64_t *bits)
{
  memset (bits, 0, (nr_units + 63) / 64 * sizeof *bits);
  for (const struct write_op *op = disks[disk].first; op; op = op->next)
    for (uint64_t i = 0; op->ended == 0 && i < op->count; i++)
      set_bit (bits, op->first + i);
}

bool
disk_holds (uint32_t disk, uint64_t offset, uint64_t length, const void *data)
{
  const struct modelled *d = &disks[disk];
  uint64_t first = offset / LOSS_UNIT, end = first + length / LOSS_UNIT;

  for (const struct write_op *op = d->first; op; op = op->next)
    if (op->first < end && first < op->first + op->count)
      return false;
  for (uint64_t i = first; i < end; i++)
    if (d->base[i] != hash ((const uint8_t *)data + (i - first) * LOSS_UNIT))
      return false;
  return true;
}

/* What lost power may leave of a unit of the local disk; `*other`: it is not
 * sure to be what a flush left.
 */
static const uint8_t *
left_bytes (uint64_t unit, enum loss_how how, uint64_t *random, bool *other)
{
  static const uint8_t zeroes[LOSS_UNIT];
  const uint8_t *bytes = durable_bytes + unit * LOSS_UNIT;

  *other = false;
  for (const struct write_op *op = disks[LOSS_LOCAL].first; op; op = op->next) {
    if (unit < op->first || unit >= op->first + op->count)
      continue;
    *other = true;
    if (how == LOSS_NOTHING
        || (how != LOSS_UNSYNCED && peer_random (random) % 2))
      bytes = op->bytes ? op->bytes + (unit - op->first) * LOSS_UNIT : zeroes;
  }
  return bytes;
}

void
disk_leave_local (int fd, enum loss_how how, uint64_t *random)
{
  for (uint64_t i = 0; i < nr_units; i++) {
    bool other;
    const uint8_t *bytes = left_bytes (i, how, random, &other);

    if (other)
      assert (pwrite (fd, bytes, LOSS_UNIT, (off_t)(i * LOSS_UNIT))
              == LOSS_UNIT);
  }
}

void
disk_leave_part (int fd, uint64_t offset, uint64_t length, enum loss_how how,
                 uint64_t *random)
{
  for (uint64_t at = offset; at < offset + length; at += LOSS_UNIT) {
    bool other;
    const uint8_t *bytes = left_bytes (at / LOSS_UNIT, how, random, &other);

    assert (pwrite (fd, bytes, LOSS_UNIT, (off_t)at) == LOSS_UNIT);
  }
}
