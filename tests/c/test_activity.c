/* SPDX-License-Identifier: BSD-3-Clause */

/* The activity log's set: holds and their durability, writes that overlap with
 * newcomers, going cold and coming back.
 */

#include "logs/activity.h"
#include "activity_log.h"

static void
test_activity_new_extent_waits_for_its_write (void)
{
  struct folder folder = log_make ();
  struct activity act = log_begin (&folder);
  struct seen seen;

  assert (activity_hold (&act, 7, 8) == -EINPROGRESS);
  assert (!activity_durable (&act, 7, 8));
  assert (loaded (&folder).nr == 0);
  write_changes (&act);
  assert (activity_durable (&act, 7, 8) && act.persists == 1);
  seen = loaded (&folder);
  assert (seen.nr == 2 && has (&seen, 7) && has (&seen, 8));
  assert (activity_hold (&act, 7, 8) == 0);
  activity_close (&act);
  folder_remove (&folder, FILES ("activity"));
}

static void
test_activity_nothing_changed_stages_nothing (void)
{
  struct folder folder = log_make ();
  struct activity act = log_begin (&folder);
  struct activity_batch batch;

  assert (activity_stage (&act, &batch) == 0);
  warm (&act, 1, 1, 10);
  assert (activity_stage (&act, &batch) == 0);
  activity_close (&act);
  folder_remove (&folder, FILES ("activity"));
}

/* The place is in the very sector that is being written. */
static void
test_activity_put_in_while_writing_waits_for_next_write (void)
{
  struct folder folder = log_make ();
  struct activity act = log_begin (&folder);
  struct activity_batch batch;
  struct seen seen;

  assert (activity_hold (&act, 1, 1) == -EINPROGRESS);
  assert (activity_stage (&act, &batch) == 1 && batch.count == 1);
  assert (activity_hold (&act, 2, 2) == -EINPROGRESS);
  assert (activity_hold (&act, 1, 1) == -EINPROGRESS);
  assert (activity_write (&act, &batch) == 0);
  seen = loaded (&folder);
  assert (has (&seen, 1) && !has (&seen, 2));
  activity_written (&act, &batch);
  assert (activity_durable (&act, 1, 1) && !activity_durable (&act, 2, 2));
  write_changes (&act);
  assert (activity_durable (&act, 1, 2));
  activity_close (&act);
  folder_remove (&folder, FILES ("activity"));
}

static void
test_activity_no_room_holds_nothing (void)
{
  struct folder folder = log_make ();
  struct activity act = log_begin (&folder);

  warm (&act, 0, ENTRIES - 2, 10);
  assert (activity_hold (&act, ENTRIES - 2, ENTRIES) == -EAGAIN);
  assert (activity_count (&act) == ENTRIES - 1);
  assert (activity_pick (&act, ENTRIES, 11) == ENTRIES - 1); /* no users */
  assert (activity_hold (&act, ENTRIES - 2, ENTRIES - 1) == -EINPROGRESS);
  assert (activity_hold (&act, 0, ENTRIES) == -EINVAL);
  ASSERT_SAYS ("101 activity extents");
  activity_close (&act);
  folder_remove (&folder, FILES ("activity"));
}

static void
test_activity_pick_takes_longest_unused_first (void)
{
  struct folder folder = log_make ();
  struct activity act = log_begin (&folder);
  uint64_t extents[ENTRIES];

  warm (&act, 1, 1, 10);
  warm (&act, 2, 2, 20);
  warm (&act, 3, 3, 30);
  warm (&act, 1, 1, 40);
  assert (activity_list (&act, extents, ENTRIES) == 3);
  assert (extents[0] == 1 && extents[1] == 3 && extents[2] == 2);
  assert (activity_list (&act, extents, 2) == 2);
  assert (activity_pick (&act, 1, UINT64_MAX) == 1);
  assert (activity_drop (&act) == 1);
  assert (!activity_durable (&act, 2, 2) && activity_durable (&act, 3, 3));
  assert (activity_pick (&act, 10, 40) == 1); /* not the one used at 40 */
  assert (activity_drop (&act) == 1 && activity_count (&act) == 1);
  activity_close (&act);
  folder_remove (&folder, FILES ("activity"));
}

static void
test_activity_user_calls_off_cooling (void)
{
  struct folder folder = log_make ();
  struct activity act = log_begin (&folder);

  warm (&act, 1, 3, 10);
  assert (activity_hold (&act, 1, 1) == 0);
  assert (activity_pick (&act, 10, UINT64_MAX) == 2);
  assert (activity_hold (&act, 2, 2) == 0);
  activity_release (&act, 2, 2, 11); /* a write came and went */
  assert (activity_drop (&act) == 1);
  assert (activity_durable (&act, 1, 2) && !activity_durable (&act, 3, 3));
  activity_close (&act);
  folder_remove (&folder, FILES ("activity"));
}

static void
test_activity_pick_forgets_the_one_before (void)
{
  struct folder folder = log_make ();
  struct activity act = log_begin (&folder);

  warm (&act, 1, 1, 10);
  warm (&act, 2, 2, 20);
  assert (activity_pick (&act, 10, UINT64_MAX) == 2); /* its flush failed */
  assert (activity_pick (&act, 10, 15) == 1);
  assert (activity_drop (&act) == 1);
  assert (activity_durable (&act, 2, 2));
  activity_close (&act);
  folder_remove (&folder, FILES ("activity"));
}

/* The disk still has it, so it needs no write, and a start after lost power
 * finds it.
 */
static void
test_activity_cold_extent_comes_back_durable (void)
{
  struct folder folder = log_make ();
  struct activity act = log_begin (&folder);
  struct seen seen;

  warm (&act, 1, 2, 10);
  assert (activity_pick (&act, 10, UINT64_MAX) == 2);
  assert (activity_drop (&act) == 2 && activity_count (&act) == 0);
  seen = loaded (&folder);
  assert (has (&seen, 1) && has (&seen, 2));
  assert (activity_hold (&act, 2, 2) == 0);
  assert (activity_count (&act) == 1 && act.persists == 1);
  activity_close (&act);
  folder_remove (&folder, FILES ("activity"));
}

static void
test_activity_place_taken_removes_cold_extent (void)
{
  struct folder folder = log_make ();
  struct activity act = log_begin (&folder);
  struct seen seen;

  warm (&act, 0, ENTRIES - 1, 10);
  assert (activity_pick (&act, 1, UINT64_MAX) == 1);
  assert (activity_drop (&act) == 1);
  assert (activity_hold (&act, 500, 500) == -EINPROGRESS);
  write_changes (&act);
  seen = loaded (&folder);
  assert (seen.nr == ENTRIES && has (&seen, 500) && !has (&seen, 0));
  assert (!activity_durable (&act, 0, 0));
  assert (activity_hold (&act, 0, 0) == -EAGAIN);
  assert (activity_pick (&act, 1, UINT64_MAX) == 1); /* 1 */
  assert (activity_drop (&act) == 1);
  assert (activity_hold (&act, 0, 0) == -EINPROGRESS);
  assert (activity_hold (&act, 0, 0) == -EINPROGRESS);
  activity_close (&act);
  folder_remove (&folder, FILES ("activity"));
}

/* A range of which one is cold and one is new: the new one must not take the
 * place of the cold one.
 */
static void
test_activity_range_keeps_its_own_cold_extent (void)
{
  struct folder folder = log_make ();
  struct activity act = log_begin (&folder);

  warm (&act, 10, 9 + ENTRIES, 10);
  assert (activity_pick (&act, 2, UINT64_MAX) == 2);
  assert (activity_drop (&act) == 2);
  assert (activity_hold (&act, 9, 10) == -EINPROGRESS);
  assert (activity_durable (&act, 10, 10) && !activity_durable (&act, 9, 9));
  activity_close (&act);
  folder_remove (&folder, FILES ("activity"));
}

/* Places in both sectors change hands before either is written: extent 0
 * loses its place in sector 0 and gets one in sector 1.
 */
static struct activity_batch
stage_a_move (struct activity *act)
{
  struct activity_batch batch;

  warm (act, 0, ENTRIES - 1, 10);
  warm (act, 99, 99, 20);
  warm (act, 0, 0, 5);
  assert (activity_pick (act, 1, 6) == 1); /* 0, in sector 0 */
  assert (activity_drop (act) == 1);
  for (unsigned i = 1; i < 99; i++)
    assert (activity_hold (act, i, i) == 0);
  assert (activity_pick (act, 1, UINT64_MAX) == 1); /* 99, in sector 1 */
  assert (activity_drop (act) == 1);
  assert (activity_hold (act, 500, 500) == -EINPROGRESS);
  assert (activity_hold (act, 0, 0) == -EINPROGRESS);
  assert (activity_stage (act, &batch) == 1);
  assert (batch.count == 2 && batch.index[1] == 1);
  return batch;
}

static void
test_activity_power_lost_between_sectors_is_no_damage (void)
{
  struct folder folder = log_make ();
  struct activity act = log_begin (&folder);
  struct activity_batch batch = stage_a_move (&act);
  struct activity_batch half = { &batch.sectors[1], &batch.index[1], 1 };
  struct seen seen;

  assert (activity_write (&act, &half) == 0);
  activity_discard (&batch);
  activity_close (&act);
  seen = loaded (&folder); /* 0 stands in both sectors */
  assert (seen.nr == ENTRIES - 1);
  for (unsigned i = 0; i < 99; i++)
    assert (has (&seen, i));

  act = log_begin (&folder); /* tidies */
  assert (activity_stage (&act, &batch) == 0);
  assert (activity_count (&act) == ENTRIES - 1);
  warm (&act, 600, 600, 10);
  activity_close (&act);
  seen = loaded (&folder);
  assert (seen.nr == ENTRIES && has (&seen, 600));
  folder_remove (&folder, FILES ("activity"));
}

int
main (void)
{
  RUN (test_activity_new_extent_waits_for_its_write);
  RUN (test_activity_nothing_changed_stages_nothing);
  RUN (test_activity_put_in_while_writing_waits_for_next_write);
  RUN (test_activity_no_room_holds_nothing);
  RUN (test_activity_pick_takes_longest_unused_first);
  RUN (test_activity_user_calls_off_cooling);
  RUN (test_activity_pick_forgets_the_one_before);
  RUN (test_activity_cold_extent_comes_back_durable);
  RUN (test_activity_place_taken_removes_cold_extent);
  RUN (test_activity_range_keeps_its_own_cold_extent);
  RUN (test_activity_power_lost_between_sectors_is_no_damage);
  return 0;
}
