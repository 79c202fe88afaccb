/* SPDX-License-Identifier: BSD-3-Clause */

/* Garbled files for a start, by libFuzzer: a target for each file, one for the
 * whole directory and one for nbdm_peek, by FUZZ_FILES.
 *
 * An input is a list of edits to a state directory that the engine itself made
 * (tests/c/images.h), so that a few bytes reach any place.  Besides crashes the
 * test looks for lost bits: with garbled files a start must refuse, or find
 * more regions dirty.  With SEAL in the first byte the edited parts get a valid
 * CRC: that is forgery and not damage, and a start only has to survive it.  The
 * fuzzer also guesses CRCs, so the test itself finds out which parts were
 * forged.
 */

#include "api.h"
#include "base/crc32c.h"
#include "base/error.h"
#include "logs/layout.h"
#include "volume/volume.h"
#include "../c/images.h"

#include <sys/resource.h>

#ifndef FUZZ_FILES
#error "-DFUZZ_FILES: the file to edit, or \"\" for all, or \"peek\""
#endif

#define NR_STATES 4
#define STATE_OF(first) ((first) % NR_STATES)
#define SEAL 0x40
#define STOP 0x80 /* after the start also stop, and start again */
#define FIELDS 0x80
#define EDIT_SIZE 6 /* of an edit, without its bytes */
#define MAX_EDITS 12
#define MAX_FILE (64u << 20)

enum op {
  OP_BYTES,
  OP_FLIP,
  OP_NUMBER,
  OP_FILL,
  OP_TRUNCATE,
  OP_OLD_FILE,
  OP_OLD_BYTES,
  OP_REMOVE,
  NR_OPS
};

static struct state {
  const char *fault;
  void (*session) (void *);
  struct place place;
  struct image before, now;
  struct verdict intact;
  bool stopped;
} states[NR_STATES] = {
  { .session = session_stopped, .stopped = true },
  { .session = session_killed, .fault = "after_local:9=kill" },
  { .session = session_killed, .fault = "after_local:9=kill" },
  { .session = session_failed, .fault = "activity_sync:5=error" },
};

int LLVMFuzzerInitialize (int *argc, char ***argv);
int LLVMFuzzerTestOneInput (const uint8_t *data, size_t size);

static void
remove_places (void)
{
  for (unsigned i = 0; i < NR_STATES; i++)
    place_remove (&states[i].place);
}

/* A superblock that is forged to be of a huge volume has logs made for it, if
 * there is room: with the machine's memory for a disk that takes half a minute,
 * and the memory.
 */
static void
limit_files (void)
{
  const struct rlimit limit = { MAX_FILE, MAX_FILE };

  /* Each time: libFuzzer takes the signal for itself after its start. */
  assert (signal (SIGXFSZ, SIG_IGN) != SIG_ERR);
  assert (setrlimit (RLIMIT_FSIZE, &limit) == 0);
}

static void
make_state (struct state *s)
{
  place_make (&s->place);
  place_serve (&s->place);
  assert (passed (in_child (NULL, session_before, &s->place)));
  image_take (&s->place, &s->before);
  in_child (s->fault, s->session, &s->place);
  place_serve_no_more (&s->place);
  image_take (&s->place, &s->now);
}

int
LLVMFuzzerInitialize (int *argc, char ***argv)
{
  (void)argc;
  (void)argv;
  for (unsigned i = 0; i < NR_STATES; i++)
    make_state (&states[i]);
  image_reboot (&states[2].before);
  image_reboot (&states[2].now);
  for (unsigned i = 0; i < NR_STATES; i++) {
    struct state *s = &states[i];

    image_put (&s->place, &s->now);
    judge (&s->place, &s->now, &s->intact);
    assert (s->intact.rc == 0 && s->intact.words[0] == '\0');
  }
  atexit (remove_places);
  return 0;
}

/* --- edits ----------------------------------------------------------- */

/* The edited files, and what was done to them. */
struct garbled {
  struct image image; /* bytes of our own */
  size_t capacity[MAX_FILES];
  bool changed[MAX_FILES], removed[MAX_FILES];
  unsigned nr_changed;
  bool old; /* something of the session before was put back */
};

static void
copy_image (struct garbled *g, const struct image *image)
{
  memset (g, 0, sizeof *g);
  g->image = *image;
  for (unsigned i = 0; i < image->nr; i++) {
    struct state_file *file = &g->image.file[i];

    file->bytes = malloc (file->size + 1);
    assert (file->bytes);
    memcpy (file->bytes, image->file[i].bytes, file->size);
    g->capacity[i] = file->size;
  }
}

static void
old_bytes (struct garbled *g, unsigned i, const struct image *before, size_t at,
           size_t n)
{
  const struct state_file *old = image_file (before, g->image.file[i].name);

  if (at + n > old->size || at + n > g->image.file[i].size)
    return;
  memcpy (g->image.file[i].bytes + at, old->bytes + at, n);
  g->old = true;
}

static void
apply (struct garbled *g, unsigned i, const struct image *before, enum op op,
       size_t at, const uint8_t *bytes, size_t n)
{
  static const uint64_t numbers[]
      = { 0,          1,        UINT64_MAX,  UINT64_MAX - 1,    INT64_MAX,
          UINT32_MAX, 1u << 31, VOLUME_SIZE, VOLUME_SIZE - 512, NR_REGIONS,
          1024,       1u << 22 };
  struct state_file *file = &g->image.file[i];
  size_t left = file->size > at ? file->size - at : 0;

  switch (op) {
  case OP_BYTES:
    memcpy (file->bytes + at, bytes, n < left ? n : left);
    break;
  case OP_FLIP:
    if (left > 0)
      file->bytes[at] ^= (uint8_t)(1u << n % 8);
    break;
  case OP_NUMBER:
    if (left >= 8)
      memcpy (file->bytes + at,
              &numbers[n % (sizeof numbers / sizeof *numbers)], 8);
    break;
  case OP_FILL:
    memset (file->bytes + at, n & 1 ? 0xff : 0, n * 32 < left ? n * 32 : left);
    break;
  case OP_TRUNCATE:
    file->size = at;
    break;
  case OP_OLD_FILE:
    if (file->size == g->capacity[i])
      old_bytes (g, i, before, 0, file->size);
    break;
  case OP_OLD_BYTES:
    old_bytes (g, i, before, at, n * 32 < left ? n * 32 : left);
    break;
  case OP_REMOVE:
    g->removed[i] = true;
    break;
  case NR_OPS:
    abort ();
  }
}

static unsigned
pick_file (const struct image *image, uint8_t which)
{
  unsigned hits = 0;

  if (FUZZ_FILES[0] == '\0')
    return which % image->nr;
  for (;;)
    for (unsigned i = 0; i < image->nr; i++)
      if (strncmp (image->file[i].name, FUZZ_FILES, strlen (FUZZ_FILES)) == 0
          && hits++ == which % 2)
        return i;
}

/* An edit: file, operation, three bytes of place, a length, and bytes. */
static void
edit (struct garbled *g, const struct image *before, const uint8_t *data,
      size_t size)
{
  for (unsigned n = 0; n < MAX_EDITS && size >= EDIT_SIZE; n++) {
    unsigned i = pick_file (&g->image, data[0]);
    enum op op = data[1] % NR_OPS;
    size_t at = data[2] | (size_t)data[3] << 8 | (size_t)data[4] << 16;
    size_t length = data[5], bytes = 0;

    if (data[1] & FIELDS) /* where pages have their fields */
      at = (at & 0x3ff) | (at >> 10) * LAYOUT_PAGE;
    if (g->image.file[i].size > 0)
      at %= g->image.file[i].size;
    else
      at = 0;
    if (op == OP_BYTES) {
      bytes = length % 33;
      bytes = bytes < size - EDIT_SIZE ? bytes : size - EDIT_SIZE;
      length = bytes;
    }
    apply (g, i, before, op, at, data + EDIT_SIZE, length);
    data += EDIT_SIZE + bytes;
    size -= EDIT_SIZE + bytes;
  }
}

/* --- forgery --------------------------------------------------------- */

typedef bool (*unit_visit) (uint8_t *unit, const uint8_t *was, size_t size);

/* Give the unit its CRC. */
static bool
seal_unit (uint8_t *unit, const uint8_t *was, size_t size)
{
  if (memcmp (unit, was, size) == 0)
    return false;
  memset (unit + 12, 0, 4); /* in every kind in the same place */
  uint32_t crc = htole32 (crc32c (0, unit, size));
  memcpy (unit + 12, &crc, 4);
  return false;
}

/* It is another one and looks right. */
static bool
forged_unit (uint8_t *unit, const uint8_t *was, size_t size)
{
  uint8_t copy[LAYOUT_PAGE];
  uint32_t crc;

  memcpy (copy, unit, size);
  memset (copy + 12, 0, 4);
  crc = htole32 (crc32c (0, copy, size));
  return memcmp (unit, was, size) != 0 && memcmp (&crc, unit + 12, 4) == 0;
}

/* What has a CRC at byte 12: pages of the superblock, headers, sectors. */
static bool
visit_units (struct garbled *g, const struct image *now, unit_visit visit)
{
  bool any = false;

  for (unsigned i = 0; i < now->nr; i++) {
    struct state_file *file = &g->image.file[i];
    bool all = strcmp (file->name, "superblock") == 0;
    bool sectors = strcmp (file->name, "activity") == 0;

    for (size_t at = 0; at < file->size;) {
      size_t n = at == 0 || all ? LAYOUT_PAGE : LAYOUT_SECTOR;

      if (at + n <= file->size && (at == 0 || all || sectors))
        any |= visit (file->bytes + at, now->file[i].bytes + at, n);
      at += n;
    }
  }
  return any;
}

/* Bits lost from a map in use and slots that went: no start can see that
 * (docs/FORMAT.md), and that a slot's or the maps' CRC was guessed is not
 * looked into.
 */
static bool
beyond_sight (const struct state *s, const struct garbled *g)
{
  for (unsigned i = 0; i < g->image.nr; i++) {
    const struct state_file *file = &g->image.file[i];
    const struct state_file *was = &s->now.file[i];
    bool unsealed = is_map (file->name) ? !s->stopped
                                        : strcmp (file->name, "inflight") == 0;

    if (unsealed && file->size == was->size && !g->removed[i]
        && memcmp (file->bytes + LAYOUT_PAGE, was->bytes + LAYOUT_PAGE,
                   file->size - LAYOUT_PAGE)
               != 0)
      return true;
  }
  return false;
}

/* Whether the oracle can judge this. A start notices one old file; two, or one
 * beside a superblock that lost its newer slot, may fit each other.
 */
static bool
is_damage (const struct state *s, struct garbled *g)
{
  g->nr_changed = 0;
  for (unsigned i = 0; i < g->image.nr; i++) {
    const struct state_file *was = &s->now.file[i];

    g->changed[i] = g->removed[i] || g->image.file[i].size != was->size
                    || memcmp (g->image.file[i].bytes, was->bytes, was->size);
    g->nr_changed += g->changed[i];
    /* A whole file of the session before, and nothing else. */
    if (g->changed[i] && !g->removed[i] && g->image.file[i].size == was->size
        && memcmp (g->image.file[i].bytes,
                   image_file (&s->before, was->name)->bytes, was->size)
               == 0)
      g->old = true;
  }
  if (g->old && g->nr_changed == 1) {
    for (unsigned i = 0; i < g->image.nr; i++)
      if (g->changed[i])
        return g->image.file[i].size == s->now.file[i].size && !g->removed[i]
               && memcmp (g->image.file[i].bytes,
                          image_file (&s->before, s->now.file[i].name)->bytes,
                          g->image.file[i].size)
                      == 0;
  }
  return !g->old && !visit_units (g, &s->now, forged_unit)
         && !beyond_sight (s, g);
}

/* --- the start ------------------------------------------------------- */

static void
put_garbled (const struct state *s, const struct garbled *g)
{
  image_put (&s->place, &g->image);
  for (unsigned i = 0; i < g->image.nr; i++)
    if (g->removed[i])
      unlinkat (s->place.fd, g->image.file[i].name, 0);
}

static void
peek (const struct state *s)
{
  struct nbdm_disk_status disks[NBDM_MAX_DISKS];
  struct nbdm_status status;
  struct nbdm_node node;
  char name[NBDM_NAME_LEN];

  if (nbdm_peek (s->place.params.state_dir, name, &status, disks, &node) < 0) {
    assert (last_error ()[0]);
    return;
  }
  assert (memchr (name, 0, sizeof name));
  assert (status.nr_remotes <= NBDM_MAX_REMOTES);
  assert (memchr (node.name, 0, sizeof node.name));
  assert (node.nr_peers <= NBDM_MAX_REMOTES);
  for (unsigned i = 0; i <= status.nr_remotes; i++) {
    assert (memchr (disks[i].name, 0, sizeof disks[i].name));
    assert (memchr (disks[i].reason, 0, sizeof disks[i].reason));
  }
}

static void
compare (const struct state *s, const struct verdict *got)
{
  for (unsigned i = 0; i < got->nr; i++)
    for (uint32_t r = 0; r < NR_REGIONS; r++) {
      bool lost_dirty = bit_of (s->intact.map[i].dirty, r)
                        && !bit_of (got->map[i].dirty, r);
      bool lost_late
          = bit_of (s->intact.map[i].late, r) && !bit_of (got->map[i].late, r);

      if (lost_dirty || lost_late) {
        fprintf (stderr, "state %td: region %u of %s is no longer %s\n",
                 s - states, r, got->map[i].name,
                 lost_dirty ? "dirty" : "late");
        abort ();
      }
    }
}

static void
look (struct nbdm *v)
{
  struct nbdm_disk_status remote;
  uint64_t some[64];

  for (uint32_t i = 0; i < 2; i++)
    assert (nbdm_get_disk_status (v, i + 1, &remote) == 0);
  assert (nbdm_get_active_extents (v, some, 64) <= 64);
  assert (nbdm_get_recent_regions (v, some, 64) <= 64);
}

/* Start; with `stop` stop cleanly.  False: it was refused. */
static bool
start (const struct state *s, bool damage, bool stop)
{
  struct verdict got = { .nr = 0 };
  struct nbdm *v;
  int rc = nbdm_open (&s->place.params, &v);

  if (rc < 0) {
    assert (last_error ()[0]);
    return false;
  }
  look (v);
  if (damage) {
    read_maps (&s->place, &s->now, &got);
    compare (s, &got);
  }
  if (stop)
    assert (nbdm_stop (v) == 0);
  nbdm_close (v);
  return true;
}

int
LLVMFuzzerTestOneInput (const uint8_t *data, size_t size)
{
  struct garbled g;
  const struct state *s;
  bool damage;

  if (size < 1 + EDIT_SIZE)
    return 0;
  limit_files ();
  s = &states[STATE_OF (data[0])];
  copy_image (&g, &s->now);
  edit (&g, &s->before, data + 1, size - 1);
  if (data[0] & SEAL)
    visit_units (&g, &s->now, seal_unit);
  damage = is_damage (s, &g);
  put_garbled (s, &g);
  peek (s);
#ifndef FUZZ_PEEK
  if (start (s, damage, data[0] & STOP))
    start (s, damage, false);
#else
  (void)start;
  (void)damage;
#endif
  image_free (&g.image);
  return 0;
}
