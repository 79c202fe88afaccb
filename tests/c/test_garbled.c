/* SPDX-License-Identifier: BSD-3-Clause */

/* Every file of the state directory gets wrong bytes. Every bit of a field is
 * tried, and one bit of each other byte; the file is cut and grown, and zeroed
 * or filled with ones or noise.
 */

#include "logs/layout.h"
#include "logs/log_header.h"
#include "garbled.h"

/* --- bits ------------------------------------------------------------ */

/* The bytes of which every bit is tried. */
static bool
means_something (const struct state_file *file, size_t at)
{
  if (strcmp (file->name, "superblock") == 0) {
    at %= LAYOUT_PAGE;
    return at < offsetof (struct disk_superblock, reserved1)
           || (at >= offsetof (struct disk_superblock, remotes)
               && at < offsetof (struct disk_superblock, remotes)
                           + 2 * sizeof (struct disk_remote));
  }
  if (at < LAYOUT_PAGE)
    return at < offsetof (struct disk_log_header, reserved);
  at -= LAYOUT_PAGE;
  if (is_map (file->name))
    return at % bitmap_bytes (NR_REGIONS) < MAP_BYTES;
  if (strcmp (file->name, "activity") == 0)
    return at < 128 || at / LAYOUT_SECTOR == 1;
  return at < 12 * sizeof (struct disk_slot);
}

/* A map of a volume in use has no checksum: the bit that was cleared. */
static bool
unseen_bit (const struct scenario *s, const struct state_file *file, size_t at,
            unsigned bit, struct unseen *unseen)
{
  uint64_t in_map = (at - LAYOUT_PAGE) % bitmap_bytes (NR_REGIONS);

  if (s->ending == STOPPED || !is_map (file->name) || at < LAYOUT_PAGE)
    return false;
  unseen->file = file->name;
  unseen->first = (uint32_t)in_map * 8 + bit;
  unseen->count = 1;
  return true;
}

static void
flip (const struct scenario *s, const struct state_file *file, size_t at,
      unsigned bit)
{
  struct unseen unseen;
  char harm[64];

  snprintf (harm, sizeof harm, "bit %u of byte %zu", bit, at);
  image_put (&s->place, &s->now);
  file->bytes[at] ^= (uint8_t)(1u << bit);
  put_file (&s->place, file->name, file->bytes, file->size);
  file->bytes[at] ^= (uint8_t)(1u << bit);
  check (s, file->name, harm,
         unseen_bit (s, file, at, bit, &unseen) ? &unseen : NULL,
         at % 16 == 0 ? 2 : 1);
}

/* Of bytes that are always zero and under one CRC, one bit in so many
 * represents the rest.
 */
#define SPARSE 29

static void
flip_all (const struct scenario *s, const struct state_file *file)
{
  for (size_t at = 0; at < file->size; at++) {
    if (means_something (file, at)) {
      /* The ending makes no difference to a checksum: try every bit for those
       * endings that matter most to clients, and one bit of each byte for the
       * others.
       */
      bool every = s->ending == STOPPED || s->ending == KILLED;
      for (unsigned bit = 0; bit < 8; bit++)
        if (every || bit == at % 8)
          flip (s, file, at, bit);
    }
    else if (at % SPARSE == 0)
      flip (s, file, at, at / SPARSE % 8);
  }
}

/* --- sizes and contents ---------------------------------------------- */

static void
resize_all (const struct scenario *s, const struct state_file *file)
{
  const size_t lengths[] = { 0,
                             1,
                             511,
                             512,
                             LAYOUT_PAGE - 1,
                             LAYOUT_PAGE,
                             LAYOUT_PAGE + 1,
                             LAYOUT_PAGE + LAYOUT_SECTOR,
                             2 * LAYOUT_PAGE - 1,
                             2 * LAYOUT_PAGE,
                             file->size / 2,
                             file->size - LAYOUT_PAGE,
                             file->size - LAYOUT_SECTOR,
                             file->size - 1,
                             file->size + 1,
                             file->size + LAYOUT_PAGE };
  uint8_t *bytes = calloc (1, file->size + LAYOUT_PAGE);
  char harm[64];

  memcpy (bytes, file->bytes, file->size);
  for (unsigned i = 0; i < sizeof lengths / sizeof *lengths; i++) {
    snprintf (harm, sizeof harm, "%zu bytes long", lengths[i]);
    replace (s, file, harm, bytes, lengths[i], NULL);
  }
  free (bytes);
}

/* The regions that a start cannot see are lost in these bytes: see garbled.h.
 */
static const struct unseen *
unseen_range (const struct scenario *s, const struct state_file *file,
              size_t at)
{
  static struct unseen unseen;

  if (s->ending == STOPPED || at < LAYOUT_PAGE)
    return NULL;
  unseen = (struct unseen){ file->name, 0, NR_REGIONS };
  return is_map (file->name) ? &unseen : NULL;
}

/* A sector or a page at a time, and the whole. */
static void
fill_range (const struct scenario *s, const struct state_file *file, size_t at,
            size_t length)
{
  uint8_t *bytes = malloc (file->size);
  bool slots = strcmp (file->name, "inflight") == 0 && at >= LAYOUT_PAGE;
  char harm[64];

  for (unsigned with = 0; with < 3; with++) {
    unsigned seed = (unsigned)at + 1;

    if (with == 0 && slots && s->ending == KILLED)
      continue; /* see the top of the file */
    memcpy (bytes, file->bytes, file->size);
    for (size_t i = at; i < at + length; i++)
      bytes[i] = with == 0   ? 0
                 : with == 1 ? 0xff
                             : (uint8_t)(rand_r (&seed) >> 8);
    snprintf (harm, sizeof harm, "%zu bytes at %zu filled with %s", length, at,
              with == 0   ? "zeroes"
              : with == 1 ? "ones"
                          : "noise");
    replace (s, file, harm, bytes, file->size, unseen_range (s, file, at));
  }
  free (bytes);
}

static void
fill_all (const struct scenario *s, const struct state_file *file)
{
  fill_range (s, file, 0, file->size);
  for (size_t at = 0; at < file->size; at += LAYOUT_SECTOR)
    fill_range (s, file, at, LAYOUT_SECTOR);
  for (size_t at = 0; at < file->size; at += LAYOUT_PAGE)
    fill_range (s, file, at,
                file->size - at < LAYOUT_PAGE ? file->size - at : LAYOUT_PAGE);
}

int
main (void)
{
  static harm_fn *const harms[] = { resize_all, fill_all, flip_all };

  return run_harms (harms, sizeof harms / sizeof *harms, NULL);
}
