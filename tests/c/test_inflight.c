/* SPDX-License-Identifier: BSD-3-Clause */

/* The in-flight log: its life from create to clean stop, what a killed
 * process leaves, and what is not believed.
 */

#include "base/atomics.h"
#include "base/crc32c.h"
#include "logs/inflight.h"
#include "logs/layout.h"
#include "test.h"

#include <sys/mman.h>
#include <time.h>

#define SLOTS 8u
#define SIZE UINT64_C (1000000)
#define SESSION 5
#define WORD(slot) (LAYOUT_PAGE + (slot) * (off_t)sizeof (struct disk_slot))

static const uint8_t uuid[16] = "0123456789abcde";

/* What replay showed. */
struct seen {
  unsigned nr;
  struct slot_view view[SLOTS];
};

static void
note (void *opaque, const struct slot_view *view)
{
  struct seen *seen = opaque;

  assert (seen->nr < SLOTS);
  seen->view[seen->nr++] = *view;
}

static struct folder
log_make (void)
{
  struct folder folder = folder_make ();

  assert (inflight_create (folder.fd, uuid, SESSION, SLOTS) == 0);
  return folder;
}

static int
try_open (const struct folder *folder, struct inflight *log)
{
  bool clean;

  return inflight_open (log, folder->fd, uuid, SESSION, SLOTS, &clean);
}

static struct inflight
log_begin (const struct folder *folder)
{
  struct inflight log;

  assert (try_open (folder, &log) == 0);
  assert (inflight_begin (&log, SESSION) == 0);
  return log;
}

static void
test_inflight_created_opens_clean_and_empty (void)
{
  struct folder folder = log_make ();
  struct inflight log;
  bool clean = false;

  assert (inflight_open (&log, folder.fd, uuid, SESSION, SLOTS, &clean) == 0);
  assert (clean && log.nr_open == 0 && log.sequence == 0);
  assert (file_size (&folder, "inflight") == 2 * LAYOUT_PAGE);
  inflight_close (&log);
  inflight_close (&log); /* no effect */
  folder_remove (&folder, FILES ("inflight"));
}

static void
test_inflight_missing_is_enoent (void)
{
  struct folder folder = folder_make ();
  struct inflight log;

  assert (try_open (&folder, &log) == -ENOENT);
  ASSERT_SAYS ("cannot open inflight");
  folder_remove (&folder, NO_FILES);
}

/* The bytes as FORMAT.md describes them, with the checksum made by hand. */
static void
test_inflight_slot_on_disk_is_as_laid_out (void)
{
  struct folder folder = log_make ();
  struct inflight log = log_begin (&folder);
  uint8_t bytes[64], sum[26];
  int slot, fd;

  slot = inflight_reserve (&log, 0x1234, 0x2000, SLOT_ZERO, 0x81);
  inflight_issued (&log, slot, 1);
  inflight_issued (&log, slot, 4);
  inflight_done (&log, slot, 4);
  fd = openat (folder.fd, "inflight", O_RDONLY | O_CLOEXEC);
  assert (pread (fd, bytes, sizeof bytes, WORD (slot)) == sizeof bytes);
  close (fd);

  const uint8_t fields[24]
      = { 1, 0, 0, 0, 0, 0, 0, 0, 0x34, 0x12, 0, 0, 0, 0, 0, 0, 0, 0x20 };
  assert (memcmp (bytes + 8, fields, sizeof fields) == 0);
  memcpy (sum, fields, sizeof fields);
  sum[24] = SLOT_ZERO;
  sum[25] = 0x81;
  uint32_t crc = crc32c (0, sum, sizeof sum);
  for (unsigned i = 0; i < 4; i++)
    assert (bytes[i] == (uint8_t)(crc >> 8 * i));
  assert (bytes[4] == SLOT_ZERO && bytes[5] == 0x81);
  assert (bytes[6] == 0 && bytes[7] == 0);
  assert (bytes[32] == 5 && bytes[36] == 4);

  inflight_retire (&log, slot);
  inflight_close (&log);
  folder_remove (&folder, FILES ("inflight"));
}

static void
test_inflight_full_is_eagain_until_one_retires (void)
{
  struct folder folder = log_make ();
  struct inflight log = log_begin (&folder);

  for (unsigned i = 0; i < SLOTS; i++)
    assert (inflight_reserve (&log, i, 1, SLOT_WRITE, 0) == (int)i);
  assert (inflight_reserve (&log, 0, 1, SLOT_WRITE, 0) == -EAGAIN);
  inflight_retire (&log, 3);
  assert (inflight_reserve (&log, 0, 1, SLOT_WRITE, 0) == 3);
  assert (inflight_reserve (&log, 0, 1, SLOT_WRITE, 0) == -EAGAIN);
  inflight_close (&log);
  folder_remove (&folder, FILES ("inflight"));
}

static void
test_inflight_slow_slot_is_passed_over (void)
{
  struct folder folder = log_make ();
  struct inflight log = log_begin (&folder);
  const int slow = inflight_reserve (&log, 77, 1, SLOT_TRIM, 0);
  struct seen seen = { 0 };

  for (unsigned i = 0; i < 5 * SLOTS; i++) {
    int slot = inflight_reserve (&log, i, 1, SLOT_WRITE, 0);

    assert (slot >= 0 && slot != slow);
    inflight_retire (&log, slot);
  }
  assert (inflight_replay (&log, SIZE, note, &seen) == 0);
  assert (seen.nr == 1 && seen.view[0].offset == 77);
  inflight_close (&log);
  folder_remove (&folder, FILES ("inflight"));
}

static void
test_inflight_unmapped_with_open_slots_replays_them (void)
{
  struct folder folder = log_make ();
  struct inflight log = log_begin (&folder);
  struct seen seen = { 0 };
  bool clean = true;

  inflight_reserve (&log, 1000, 10, SLOT_WRITE, 1);
  inflight_reserve (&log, 2000, 20, SLOT_TRIM, 0);
  inflight_retire (&log, inflight_reserve (&log, 3000, 30, SLOT_WRITE, 0));
  inflight_close (&log);

  assert (inflight_open (&log, folder.fd, uuid, SESSION, SLOTS, &clean) == 0);
  assert (!clean && log.nr_open == 2 && log.sequence == 3);
  assert (inflight_replay (&log, SIZE, note, &seen) == 0);
  assert (seen.nr == 2 && log.nr_open == 0);
  assert (seen.view[0].sequence == 1 && seen.view[0].offset == 1000);
  assert (seen.view[0].length == 10 && seen.view[0].flags == 1);
  assert (seen.view[0].kind == SLOT_WRITE);
  assert (seen.view[1].sequence == 2 && seen.view[1].kind == SLOT_TRIM);

  seen.nr = 0;
  assert (inflight_replay (&log, SIZE, note, &seen) == 0 && seen.nr == 0);
  inflight_reserve (&log, 0, 1, SLOT_WRITE, 0);
  assert (log.sequence == 4);
  inflight_close (&log);
  folder_remove (&folder, FILES ("inflight"));
}

static void
test_inflight_garbled_slot_is_refused_before_any_visit (void)
{
  struct folder folder = log_make ();
  struct inflight log = log_begin (&folder);
  struct seen seen = { 0 };

  inflight_reserve (&log, 1000, 10, SLOT_WRITE, 0);
  inflight_reserve (&log, 2000, 10, SLOT_WRITE, 0);
  garble (&folder, "inflight", WORD (1) + 16); /* offset, low byte */
  assert (inflight_replay (&log, SIZE, note, &seen) == -EUCLEAN);
  ASSERT_SAYS ("inflight is garbled: slot 1");
  assert (seen.nr == 0 && log.nr_open == 2);
  inflight_close (&log);
  folder_remove (&folder, FILES ("inflight"));
}

/* Bits 48 to 63 of the word are no part of the sum, and are zero. */
static void
test_inflight_unknown_bit_in_word_is_refused (void)
{
  struct folder folder = log_make ();
  struct inflight log = log_begin (&folder);
  struct seen seen = { 0 };

  inflight_reserve (&log, 1000, 10, SLOT_WRITE, 0);
  garble (&folder, "inflight", WORD (0) + 6);
  assert (inflight_replay (&log, SIZE, note, &seen) == -EUCLEAN);
  inflight_close (&log);
  folder_remove (&folder, FILES ("inflight"));
}

static void
assert_range_refused (uint64_t offset, uint64_t length, enum slot_kind kind)
{
  struct folder folder = log_make ();
  struct inflight log = log_begin (&folder);
  struct seen seen = { 0 };

  inflight_reserve (&log, offset, length, kind, 0);
  assert (inflight_replay (&log, SIZE, note, &seen) == -EUCLEAN);
  assert (seen.nr == 0);
  inflight_close (&log);
  folder_remove (&folder, FILES ("inflight"));
}

static void
test_inflight_impossible_slot_with_good_crc_is_refused (void)
{
  assert_range_refused (SIZE - 10, 11, SLOT_WRITE);
  assert_range_refused (0, SIZE + 1, SLOT_WRITE);
  assert_range_refused (UINT64_MAX - 5, 6, SLOT_WRITE);
  assert_range_refused (10, 0, SLOT_WRITE);
  assert_range_refused (10, 10, (enum slot_kind)0);
  assert_range_refused (10, 10, (enum slot_kind)4);
}

static void
test_inflight_last_byte_of_volume_is_accepted (void)
{
  struct folder folder = log_make ();
  struct inflight log = log_begin (&folder);
  struct seen seen = { 0 };

  inflight_reserve (&log, SIZE - 1, 1, SLOT_WRITE, 0);
  inflight_reserve (&log, 0, SIZE, SLOT_ZERO, 0);
  assert (inflight_replay (&log, SIZE, note, &seen) == 0 && seen.nr == 2);
  inflight_close (&log);
  folder_remove (&folder, FILES ("inflight"));
}

static void
test_inflight_session_is_this_or_the_next_only (void)
{
  struct folder folder = log_make ();
  struct inflight log = log_begin (&folder);

  assert (inflight_begin (&log, SESSION + 1) == 0);
  inflight_close (&log);
  assert (try_open (&folder, &log) == 0);
  assert (inflight_begin (&log, SESSION + 2) == 0);
  inflight_close (&log);
  assert (try_open (&folder, &log) == -EUCLEAN);
  ASSERT_SAYS ("session 7");
  log = (struct inflight){ 0 };
  bool clean;
  assert (inflight_open (&log, folder.fd, uuid, SESSION + 3, SLOTS, &clean)
          == -EUCLEAN);
  folder_remove (&folder, FILES ("inflight"));
}

static void
test_inflight_of_another_size_is_refused (void)
{
  struct folder folder = log_make ();
  struct inflight log;
  bool clean;

  assert (inflight_open (&log, folder.fd, uuid, SESSION, SLOTS + 1, &clean)
          == -EUCLEAN);
  int fd = openat (folder.fd, "inflight", O_RDWR | O_CLOEXEC);
  assert (ftruncate (fd, 2 * LAYOUT_PAGE - 1) == 0);
  close (fd);
  assert (try_open (&folder, &log) == -EUCLEAN);
  ASSERT_SAYS ("truncated");
  folder_remove (&folder, FILES ("inflight"));
}

static void
test_inflight_finish_with_open_slot_is_ebusy (void)
{
  struct folder folder = log_make ();
  struct inflight log = log_begin (&folder);
  bool clean;
  int slot = inflight_reserve (&log, 0, 1, SLOT_WRITE, 0);

  assert (inflight_finish (&log) == -EBUSY);
  inflight_retire (&log, slot);
  assert (inflight_finish (&log) == 0);
  inflight_close (&log);
  assert (inflight_open (&log, folder.fd, uuid, SESSION, SLOTS, &clean) == 0);
  assert (clean && log.nr_open == 0);
  inflight_close (&log);
  folder_remove (&folder, FILES ("inflight"));
}

static void
test_inflight_clean_with_open_slot_is_refused (void)
{
  struct folder folder = log_make ();
  struct inflight log = log_begin (&folder);

  assert (inflight_finish (&log) == 0);
  inflight_close (&log);
  garble (&folder, "inflight", WORD (2));
  assert (try_open (&folder, &log) == -EUCLEAN);
  ASSERT_SAYS ("closed cleanly");
  folder_remove (&folder, FILES ("inflight"));
}

/* --- Killed at any instruction ---------------------------------------- */

struct race {
  const struct folder *folder;
  atomic_u64 rounds; /* in memory shared with the child */
};

/* One slot stays open; the others are opened, recorded and freed in an endless
 * loop.
 */
static void
reserve_and_retire (void *opaque)
{
  struct race *race = opaque;
  struct inflight log = log_begin (race->folder);

  inflight_reserve (&log, 4711, 11, SLOT_WRITE, 3);
  for (;;) {
    int slot = inflight_reserve (&log, atomic_load (&race->rounds), 1,
                                 SLOT_WRITE, 0);

    inflight_done (&log, slot, 1);
    inflight_retire (&log, slot);
    atomic_fetch_add (&race->rounds, 1);
  }
}

static void
kill_after_some_rounds (struct race *race)
{
  const struct timespec step = { .tv_nsec = 200000 };
  time_t deadline = time (NULL) + 30;
  pid_t pid = fork ();
  int status;

  assert (pid >= 0);
  if (pid == 0) {
    reserve_and_retire (race);
    _exit (1);
  }
  while (atomic_load (&race->rounds) < 100) {
    assert (time (NULL) < deadline);
    nanosleep (&step, NULL);
  }
  assert (kill (pid, SIGKILL) == 0);
  assert (waitpid (pid, &status, 0) == pid && killed (status));
}

static void
test_inflight_killed_anywhere_replays (void)
{
  struct race *race = mmap (NULL, sizeof *race, PROT_READ | PROT_WRITE,
                            MAP_SHARED | MAP_ANONYMOUS, -1, 0);

  assert (race != MAP_FAILED);
  for (unsigned i = 0; i < 40; i++) {
    struct folder folder = log_make ();
    struct seen seen = { 0 };
    struct inflight log;

    race->folder = &folder;
    atomic_store (&race->rounds, 0);
    kill_after_some_rounds (race);
    assert (try_open (&folder, &log) == 0);
    assert (inflight_replay (&log, SIZE * SIZE, note, &seen) == 0);
    assert (seen.nr == 1 || seen.nr == 2);
    assert (seen.view[0].offset == 4711 && seen.view[0].length == 11);
    assert (seen.nr == 1 || seen.view[1].offset == atomic_load (&race->rounds));
    inflight_close (&log);
    folder_remove (&folder, FILES ("inflight"));
  }
  munmap (race, sizeof *race);
}

int
main (void)
{
  RUN (test_inflight_created_opens_clean_and_empty);
  RUN (test_inflight_missing_is_enoent);
  RUN (test_inflight_slot_on_disk_is_as_laid_out);
  RUN (test_inflight_full_is_eagain_until_one_retires);
  RUN (test_inflight_slow_slot_is_passed_over);
  RUN (test_inflight_unmapped_with_open_slots_replays_them);
  RUN (test_inflight_garbled_slot_is_refused_before_any_visit);
  RUN (test_inflight_unknown_bit_in_word_is_refused);
  RUN (test_inflight_impossible_slot_with_good_crc_is_refused);
  RUN (test_inflight_last_byte_of_volume_is_accepted);
  RUN (test_inflight_session_is_this_or_the_next_only);
  RUN (test_inflight_of_another_size_is_refused);
  RUN (test_inflight_finish_with_open_slot_is_ebusy);
  RUN (test_inflight_clean_with_open_slot_is_refused);
  RUN (test_inflight_killed_anywhere_replays);
  return 0;
}
