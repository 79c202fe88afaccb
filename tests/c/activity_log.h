/* SPDX-License-Identifier: BSD-3-Clause */

/* What the tests of the activity log's two halves share: a log in a folder of
 * its own, smaller than its volume, and what a start would find in the file.
 */

#ifndef NBDM_ACTIVITY_LOG_H
#define NBDM_ACTIVITY_LOG_H

#include "base/clock.h"
#include "logs/activity.h"
#include "logs/layout.h"
#include "test.h"

#define ENTRIES 100u /* two sectors, the second not full */
#define EXTENT_SIZE 4096u
#define NR_EXTENTS 1000u
#define SESSION 5
#define SECTOR(index) (LAYOUT_PAGE + (index) * (off_t)LAYOUT_SECTOR)

static const uint8_t uuid[16] = "0123456789abcde";

static TEST_UNUSED struct folder
log_make (void)
{
  struct folder folder = folder_make ();

  assert (activity_create (folder.fd, uuid, SESSION, ENTRIES, EXTENT_SIZE)
          == 0);
  return folder;
}

static TEST_UNUSED int
try_open (const struct folder *folder, struct activity *act, bool *clean)
{
  return activity_open (act, folder->fd, uuid, SESSION, ENTRIES, EXTENT_SIZE,
                        NR_EXTENTS, clean);
}

static TEST_UNUSED struct activity
log_begin (const struct folder *folder)
{
  struct activity act;
  bool clean;

  assert (try_open (folder, &act, &clean) == 0);
  assert (activity_begin (&act, SESSION) == 0);
  return act;
}

static TEST_UNUSED void
write_changes (struct activity *act)
{
  struct activity_batch batch;

  assert (activity_stage (act, &batch) == 1);
  assert (activity_write (act, &batch) == 0);
  activity_written (act, &batch);
  assert (batch.sectors == NULL);
}

/* Active, without users, last used at `now_ns`. */
static TEST_UNUSED void
warm (struct activity *act, uint64_t first, uint64_t last, uint64_t now_ns)
{
  if (activity_hold (act, first, last) == -EINPROGRESS)
    write_changes (act);
  assert (activity_durable (act, first, last));
  activity_release (act, first, last, now_ns);
}

struct seen {
  unsigned nr;
  uint64_t extent[ENTRIES];
};

static TEST_UNUSED void
note (void *opaque, uint64_t extent)
{
  struct seen *seen = opaque;

  assert (seen->nr < ENTRIES);
  seen->extent[seen->nr++] = extent;
}

/* What a start after lost power finds in the file. */
static TEST_UNUSED struct seen
loaded (const struct folder *folder)
{
  struct seen seen = { 0 };
  struct activity act;
  bool clean;

  assert (try_open (folder, &act, &clean) == 0);
  assert (!clean);
  activity_visit (&act, note, &seen);
  activity_close (&act);
  return seen;
}

static TEST_UNUSED bool
has (const struct seen *seen, uint64_t extent)
{
  for (unsigned i = 0; i < seen->nr; i++)
    if (seen->extent[i] == extent)
      return true;
  return false;
}

#endif /* NBDM_ACTIVITY_LOG_H */
