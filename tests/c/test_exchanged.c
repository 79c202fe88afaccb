/* SPDX-License-Identifier: BSD-3-Clause */

/* Every file of the state directory is exchanged for one of another volume,
 * remote, version or session, or for no file, a folder, a pipe, or a file that
 * cannot be read.
 */

#include "base/crc32c.h"
#include "logs/layout.h"
#include "logs/log_header.h"
#include "garbled.h"

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

/* The file comes from an earlier session, the other remote, another log, or
 * another volume in the same state.
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

/* Two files say that the volume failed, so one of them is enough. */
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
  static harm_fn *const harms[]
      = { stand_in_all, exchange_all, change_all, unreadable_all };

  return run_harms (harms, sizeof harms / sizeof *harms, failure_said_once);
}
