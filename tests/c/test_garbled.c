/* SPDX-License-Identifier: BSD-3-Clause */

/* Every file of the state directory garbled in every way: a start refuses,
 * naming the file, or makes more dirty, saying why; never less (rule 9).
 *
 * Each way of ending a session, times each file, times each harm: every bit of
 * what means something, and one of each byte of what does not; cut and grown;
 * zeroed, filled with ones and with noise; of another volume, remote, version,
 * session; absent, a folder, a pipe.  Harm comes to one file at a time.
 *
 * What no start can see is left out here and told in FORMAT.md: bits lost from
 * the maps, and slots zeroed, of a volume that was in use; nothing there has a
 * checksum, for a bit is set by one store.
 */

#include <stdarg.h>

#include "base/crc32c.h"
#include "base/file.h"
#include "logs/bitmap.h"
#include "logs/layout.h"
#include "logs/log_header.h"
#include "images.h"

enum ending { STOPPED, KILLED, LOST_POWER, FAILED, STARTING, NR_ENDINGS };

static const struct {
  const char *name, *fault;
  void (*session) (void *place);
} endings[NR_ENDINGS] = {
  [STOPPED] = { "stopped", NULL, session_stopped },
  [KILLED] = { "killed", "after_local:9=kill", session_killed },
  [LOST_POWER] = { "lost power", "after_local:9=kill", session_killed },
  [FAILED] = { "failed", "activity_sync:5=error", session_failed },
  [STARTING]
  = { "killed at its start", "superblock_write:1=kill", session_killed },
};

static struct scenario {
  enum ending ending;
  struct place place;
  struct image created, before, now;
  struct verdict intact;
} scenarios[NR_ENDINGS];

/* The first so many regions of one file's maps may be lost by this harm, from
 * `first` on; NULL: nothing may.
 */
struct unseen {
  const char *file;
  uint32_t first, count;
};

static struct {
  unsigned starts, refused, more, same;
} counts;
static unsigned nr_wrong;

static void __attribute__ ((format (printf, 3, 4)))
wrong (const struct scenario *s, const char *file, const char *fmt, ...)
{
  va_list args;

  fprintf (stderr, "%s, %s: ", endings[s->ending].name, file);
  va_start (args, fmt);
  vfprintf (stderr, fmt, args);
  va_end (args);
  fputc ('\n', stderr);
  if (++nr_wrong == 40)
    exit (EXIT_FAILURE);
}

/* --- the states ------------------------------------------------------ */

/* What the intact state says has to cover what truly differs. */
static void
check_covers (const struct scenario *s)
{
  uint8_t *local = malloc (VOLUME_SIZE), *remote = malloc (VOLUME_SIZE);
  unsigned differ = 0;

  for (unsigned disk = 0; disk < 2; disk++) {
    int fd = open (place_path (&s->place, disk ? "remote" : "local"), O_RDONLY);
    assert (fd >= 0);
    assert (full_pread (fd, disk ? remote : local, VOLUME_SIZE, 0) == 0);
    close (fd);
  }
  for (unsigned i = 0; i < s->intact.nr; i++) {
    if (strcmp (s->intact.map[i].name, "dirty.near") != 0)
      continue;
    for (uint64_t at = 0; at < VOLUME_SIZE; at += REGION) {
      size_t n = VOLUME_SIZE - at < REGION ? VOLUME_SIZE - at : REGION;
      if (memcmp (local + at, remote + at, n) == 0)
        continue;
      differ++;
      assert (bit_of (s->intact.map[i].dirty, (uint32_t)(at / REGION)));
    }
  }
  assert ((differ > 0) == (s->ending == KILLED || s->ending == LOST_POWER));
  free (local);
  free (remote);
}

/* A session that ends cleanly, then the one that ends as the scenario says. */
static void
make_scenario (struct scenario *s, enum ending ending)
{
  int status;

  s->ending = ending;
  place_make (&s->place);
  image_take (&s->place, &s->created);
  place_serve (&s->place);
  assert (passed (in_child (NULL, session_before, &s->place)));
  image_take (&s->place, &s->before);
  status = in_child (endings[ending].fault, endings[ending].session, &s->place);
  assert (ending == STOPPED || ending == FAILED ? passed (status)
                                                : killed (status));
  place_serve_no_more (&s->place);
  image_take (&s->place, &s->now);
  if (ending == LOST_POWER) {
    image_reboot (&s->created);
    image_reboot (&s->before);
    image_reboot (&s->now);
  }
}

/* Not before all were made: the first start here reads NBDM_FAULT for good. */
static void
judge_intact (struct scenario *s)
{
  image_put (&s->place, &s->now);
  judge (&s->place, &s->now, &s->intact);
  assert (s->intact.rc == 0 && s->intact.nr >= 2);
  assert (s->intact.words[0] == '\0');
  /* A start that did not get far makes nothing dirty. */
  for (unsigned i = 0; i < s->intact.nr && s->ending == STARTING; i++)
    for (uint32_t r = 0; r < NR_REGIONS; r++)
      assert (strcmp (s->intact.map[i].name, "dirty.near") != 0
              || !bit_of (s->intact.map[i].dirty, r));
  check_covers (s);
}

/* --- the judgement --------------------------------------------------- */

static bool
may_be_lost (const struct unseen *unseen, const char *map, uint32_t region)
{
  return unseen && strcmp (unseen->file, map) == 0 && region >= unseen->first
         && region - unseen->first < unseen->count;
}

/* Less dirty than intact is wrong; true if it is more. */
static bool
compare (const struct scenario *s, const struct verdict *got,
         const struct unseen *unseen, const char *file, const char *harm)
{
  bool more = false;

  for (unsigned i = 0; i < got->nr; i++)
    for (uint32_t r = 0; r < NR_REGIONS; r++) {
      bool dirty = bit_of (got->map[i].dirty, r);
      bool late = bit_of (got->map[i].late, r);
      bool was_dirty = bit_of (s->intact.map[i].dirty, r);
      bool was_late = bit_of (s->intact.map[i].late, r);

      more = more || (dirty && !was_dirty);
      if (((was_dirty && !dirty) || (was_late && !late))
          && !may_be_lost (unseen, got->map[i].name, r)) {
        wrong (s, file, "%s: region %u of %s is no longer %s", harm, r,
               got->map[i].name, was_dirty && !dirty ? "dirty" : "late");
        return more;
      }
    }
  return more;
}

/* A superblock of another volume or time looks right by itself: then it is a
 * log that does not fit it, or the local disk, which an older one knows by what
 * it held then.
 */
static bool
names (const char *words, const char *file)
{
  if (strcmp (file, "superblock") == 0)
    return strstr (words, file) || strstr (words, "is the state of volume")
           || strstr (words, "belongs to another volume")
           || strstr (words, "is of another time")
           || strstr (words, "or of the state was put back");
  return strstr (words, file);
}

/* The harm is done: start, and start again, as a kill in between would. */
static void
check (const struct scenario *s, const char *file, const char *harm,
       const struct unseen *unseen, unsigned starts)
{
  struct verdict got;
  bool more;

  for (unsigned n = 0; n < starts; n++) {
    counts.starts++;
    judge (&s->place, &s->now, &got);
    if (got.rc < 0) {
      counts.refused++;
      if (!names (got.words, file))
        wrong (s, file, "%s: refused with \"%s\"", harm, got.words);
      return;
    }
    more = compare (s, &got, unseen, file, harm);
    counts.more += more;
    counts.same += !more;
    if (n == 0 && more && unseen == NULL && !names (got.words, file))
      wrong (s, file, "%s: more is dirty, and the reason is \"%s\"", harm,
             got.words);
  }
}

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

/* Of what is zero and stays so, and has one CRC over it all, a bit here and
 * there is as good as each.
 */
#define SPARSE 29

static void
flip_all (const struct scenario *s, const struct state_file *file)
{
  for (size_t at = 0; at < file->size; at++) {
    if (means_something (file, at)) {
      /* How it ended makes no difference to a checksum: every bit for those
       * that clients care for, one of each byte for the rest.
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

/* What is put in the file's place; no size: as it was. */
static void
replace (const struct scenario *s, const struct state_file *file,
         const char *harm, const void *bytes, size_t size,
         const struct unseen *unseen)
{
  image_put (&s->place, &s->now);
  put_file (&s->place, file->name, bytes, size);
  check (s, file->name, harm, unseen, 2);
}

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

/* What no start can see in these bytes: see the top of the file. */
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

/* --- well-formed files that are not this one ------------------------- */

enum field { VERSION_OLDER, VERSION_NEWER, UUID, NAME, SESSION, NR_FIELDS };
static const char *const fields[NR_FIELDS]
    = { "version 0", "version 2", "another uuid", "another name",
        "a session two later" };

static void
change_header (struct disk_log_header *h, enum field field)
{
  switch (field) {
  case VERSION_OLDER:
    h->version = htole32 (LAYOUT_VERSION - 1);
    break;
  case VERSION_NEWER:
    h->version = htole32 (LAYOUT_VERSION + 1);
    break;
  case UUID:
    h->uuid[3] ^= 0x20;
    break;
  case NAME:
    h->name[0] ^= 1;
    break;
  case SESSION:
    h->session = htole64 (le64toh (h->session) + 2);
    break;
  case NR_FIELDS:
    abort ();
  }
  log_header_seal (h);
}

static void
change_slot (struct disk_superblock *sb, enum field field)
{
  switch (field) {
  case VERSION_OLDER:
    sb->version = htole32 (LAYOUT_VERSION - 1);
    break;
  case VERSION_NEWER:
    sb->version = htole32 (LAYOUT_VERSION + 1);
    break;
  case UUID:
    sb->uuid[3] ^= 0x20;
    break;
  case NAME:
    sb->name[0] ^= 1;
    break;
  case SESSION:
    sb->session = htole64 (le64toh (sb->session) + 2);
    break;
  case NR_FIELDS:
    abort ();
  }
  sb->crc = 0;
  sb->crc = htole32 (crc32c (0, sb, sizeof *sb));
}

static void
change_all (const struct scenario *s, const struct state_file *file)
{
  uint8_t *bytes = malloc (file->size);
  bool superblock = strcmp (file->name, "superblock") == 0;

  for (unsigned field = 0; field < NR_FIELDS; field++) {
    memcpy (bytes, file->bytes, file->size);
    if (superblock)
      for (size_t at = 0; at < file->size; at += LAYOUT_PAGE)
        change_slot ((void *)(bytes + at), field);
    else
      change_header ((void *)bytes, field);
    replace (s, file, fields[field], bytes, file->size, NULL);
  }
  free (bytes);
}

/* Of an earlier session, of the other remote, of another log, of another
 * volume in the same state.
 */
static void
exchange_all (const struct scenario *s, const struct state_file *file)
{
  const struct state_file *other;

  other = image_file (&s->before, file->name);
  replace (s, file, "a copy of the session before", other->bytes, other->size,
           NULL);
  other = image_file (&s->created, file->name);
  replace (s, file, "a copy from the creation", other->bytes, other->size,
           NULL);
  for (unsigned i = 0; i < s->now.nr; i++) {
    other = &s->now.file[i];
    if (other != file)
      replace (s, file, other->name, other->bytes, other->size, NULL);
  }
  for (unsigned i = 0; i < NR_ENDINGS; i++) {
    other = image_file (&scenarios[i].now, file->name);
    if (&scenarios[i] != s)
      replace (s, file, "another volume's", other->bytes, other->size, NULL);
  }
}

/* --- not a file ------------------------------------------------------ */

static void
missing (const struct scenario *s, const char *file)
{
  (void)s;
  (void)file;
}

static void
folder (const struct scenario *s, const char *file)
{
  assert (mkdirat (s->place.fd, file, 0700) == 0);
}

static void
pipe_in_place (const struct scenario *s, const char *file)
{
  assert (mkfifoat (s->place.fd, file, 0600) == 0);
}

static void
stand_in_all (const struct scenario *s, const struct state_file *file)
{
  static const struct {
    const char *harm;
    void (*put) (const struct scenario *, const char *);
  } ways[] = { { "missing", missing },
               { "a folder", folder },
               { "a pipe", pipe_in_place } };

  for (unsigned i = 0; i < sizeof ways / sizeof *ways; i++) {
    image_put (&s->place, &s->now);
    assert (unlinkat (s->place.fd, file->name, 0) == 0);
    ways[i].put (s, file->name);
    check (s,
           strcmp (file->name, "superblock") || i > 0 ? file->name : "volume",
           ways[i].harm, NULL, 2);
    if (unlinkat (s->place.fd, file->name, 0) < 0)
      assert (errno == ENOENT
              || unlinkat (s->place.fd, file->name, AT_REMOVEDIR) == 0);
  }
}

/* Said twice, so once is enough. */
static void
failure_said_once (struct scenario *s)
{
  assert (s->now.failed);
  s->now.failed = false;
  image_put (&s->place, &s->now);
  check (s, "failed", "missing", NULL, 1);
  s->now.failed = true;
}

/* A file of another user that only that user can read: root alone can make it.
 */
static void
unreadable_all (const struct scenario *s, const struct state_file *file)
{
  const uid_t nobody = 65534;

  if (geteuid () != 0)
    return;
  image_put (&s->place, &s->now);
  assert (chmod (s->place.dir, 0755) == 0);
  assert (fchown (s->place.fd, nobody, 0) == 0);
  assert (chmod (s->place.params.local, 0666) == 0);
  unlinkat (s->place.fd, "lock", 0);
  for (unsigned i = 0; i < s->now.nr; i++)
    assert (fchownat (s->place.fd, s->now.file[i].name,
                      &s->now.file[i] == file ? 0 : nobody, 0, 0)
            == 0);
  assert (seteuid (nobody) == 0);
  check (s, file->name, "not readable", NULL, 1);
  assert (seteuid (0) == 0);
  assert (fchown (s->place.fd, 0, 0) == 0);
  unlinkat (s->place.fd, "lock", 0);
}

int
main (void)
{
  static void (*const harms[]) (const struct scenario *,
                                const struct state_file *)
      = { stand_in_all, exchange_all, change_all,    resize_all,
          fill_all,     flip_all,     unreadable_all };

  for (enum ending ending = 0; ending < NR_ENDINGS; ending++)
    make_scenario (&scenarios[ending], ending);
  for (enum ending ending = 0; ending < NR_ENDINGS; ending++)
    judge_intact (&scenarios[ending]);
  for (enum ending ending = 0; ending < NR_ENDINGS; ending++) {
    struct scenario *s = &scenarios[ending];

    for (unsigned i = 0; i < s->now.nr; i++) {
      memset (&counts, 0, sizeof counts);
      for (unsigned h = 0; h < sizeof harms / sizeof *harms; h++)
        harms[h](s, &s->now.file[i]);
      printf ("%s, %s: %u starts, %u refused, %u more dirty, %u the same\n",
              endings[ending].name, s->now.file[i].name, counts.starts,
              counts.refused, counts.more, counts.same);
      fflush (stdout);
      assert (counts.refused + counts.more > 0);
    }
  }
  failure_said_once (&scenarios[FAILED]);
  for (unsigned i = 0; i < NR_ENDINGS; i++) {
    place_remove (&scenarios[i].place);
    image_free (&scenarios[i].created);
    image_free (&scenarios[i].before);
    image_free (&scenarios[i].now);
  }
  printf ("%u wrong\n", nr_wrong);
  return nr_wrong != 0;
}
