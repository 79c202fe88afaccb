/* SPDX-License-Identifier: BSD-3-Clause */

/* A state directory in which one file is garbled: a start refuses and names the
 * file, or marks more regions dirty and says why; it never marks fewer (rule
 * 9).
 *
 * Each way of ending a session is a scenario. The tests that include this apply
 * each of their kinds of damage to each file of each scenario.
 *
 * Damage that no start can notice is left out; docs/FORMAT.md describes it: in
 * a volume that was in use, bits that are lost from the maps, and slots that
 * are zeroed. Those have no checksum, because one store sets a bit.
 */

#ifndef NBDM_GARBLED_H
#define NBDM_GARBLED_H

#include <stdarg.h>

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

/* The regions of one file's maps that this damage may lose: `count` of them,
 * from `first` on. A NULL pointer: none may be lost.
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

/* The dirty bits of the intact state must cover every region that differs. */
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

/* Call it after all scenarios were made: its start is the first in this
 * process, and the process keeps the NBDM_FAULT that it reads then.
 */
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

/* Complain of a region that was dirty in the intact state and is clean now.
 * Returns whether more regions are dirty.
 */
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

/* A superblock of another volume or session looks right by itself.  Then the
 * start names a log that does not fit it, or the local disk, whose samples are
 * of another session.
 */
static bool
names (const char *words, const char *file)
{
  if (strcmp (file, "superblock") == 0)
    return strstr (words, file) || strstr (words, "is the state of volume")
           || strstr (words, "belongs to another volume")
           || strstr (words, "is of session")
           || strstr (words, "or of the state was put back");
  return strstr (words, file);
}

/* Start from the damaged files, and start again, as after a kill in between. */
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

/* --- harm --------------------------------------------------------------------
 */

/* Put these bytes in the place of the file, and check. */
static void
replace (const struct scenario *s, const struct state_file *file,
         const char *harm, const void *bytes, size_t size,
         const struct unseen *unseen)
{
  image_put (&s->place, &s->now);
  put_file (&s->place, file->name, bytes, size);
  check (s, file->name, harm, unseen, 2);
}

/* Harm to one file; it calls `check` for each way. */
typedef void harm_fn (const struct scenario *s, const struct state_file *file);

/* Make the scenarios and have each harm done to each of their files: the exit
 * status.
 */
static int
run_harms (harm_fn *const *harms, unsigned nr,
           void (*at_end) (struct scenario *failed))
{
  for (enum ending ending = 0; ending < NR_ENDINGS; ending++)
    make_scenario (&scenarios[ending], ending);
  for (enum ending ending = 0; ending < NR_ENDINGS; ending++)
    judge_intact (&scenarios[ending]);
  for (enum ending ending = 0; ending < NR_ENDINGS; ending++) {
    struct scenario *s = &scenarios[ending];

    for (unsigned i = 0; i < s->now.nr; i++) {
      memset (&counts, 0, sizeof counts);
      for (unsigned h = 0; h < nr; h++)
        harms[h](s, &s->now.file[i]);
      printf ("%s, %s: %u starts, %u refused, %u more dirty, %u the same\n",
              endings[ending].name, s->now.file[i].name, counts.starts,
              counts.refused, counts.more, counts.same);
      fflush (stdout);
      /* While local is ok, a start needs nothing that its map says. */
      assert (counts.refused + counts.more > 0
              || strcmp (s->now.file[i].name, "dirty.local") == 0);
    }
  }
  if (at_end)
    at_end (&scenarios[FAILED]);
  for (unsigned i = 0; i < NR_ENDINGS; i++) {
    place_remove (&scenarios[i].place);
    image_free (&scenarios[i].created);
    image_free (&scenarios[i].before);
    image_free (&scenarios[i].now);
  }
  printf ("%u wrong\n", nr_wrong);
  return nr_wrong != 0;
}

#endif /* NBDM_GARBLED_H */
