/* SPDX-License-Identifier: BSD-3-Clause */

/* Bytes that the local disk has but that are not on its medium when it comes
 * into use: at a start after a kill, and when an operator brings it back.
 *
 * The kernel reports once that it could not write a page, and then takes the
 * page for clean. So later starts must know that a start's flush failed, and a
 * disk that was not flushed is not used.
 */

#include "api.h"
#include "base/file.h"
#include "volume/flush.h"
#include "interrupted.h"
#include "no_room.h"

static struct bench bench;
static struct left created;

static unsigned nr_local_syncs;
static int local_sync_error; /* errno of the next ones; 0: none */
static bool local_sync_kills;

int __real_fdatasync (int fd);
int __wrap_fdatasync (int fd);

int
__wrap_fdatasync (int fd)
{
  struct stat st, local;

  if (fstat (fd, &st) == 0 && stat (bench.local, &local) == 0
      && st.st_ino == local.st_ino && st.st_dev == local.st_dev) {
    nr_local_syncs++;
    if (local_sync_kills)
      raise (SIGKILL);
    if (local_sync_error) {
      errno = local_sync_error;
      return -1;
    }
  }
  return __real_fdatasync (fd);
}

static void
mends (void *opaque)
{
  (void)opaque;
  bench_open_and_mend (&bench);
}

static void
spoil (unsigned region, uint8_t value)
{
  uint8_t buf[512];
  int fd = open (bench.local, O_RDWR | O_CLOEXEC);

  memset (buf, value, sizeof buf);
  assert (fd >= 0);
  assert (full_pwrite (fd, buf, sizeof buf, region * BENCH_REGION) == 0);
  close (fd);
}

/* The kernel could not write what was answered and not flushed: the local disk
 * has what it had before, which is what counts from now on.
 */
static void
lose (unsigned region, uint8_t value)
{
  spoil (region, value);
  bench.board->answered[region] = value;
}

/* --- at a start ----------------------------------------------------------- */

/* Flush the remotes and not local, as the engine does where no client flushes.
 */
static void
flush_remotes_alone (void)
{
  for (uint32_t i = 0; i < BENCH_REMOTES; i++)
    assert (remote_flush_alone (&bench.volume->remotes[i]));
}

/* Each ends as if killed. */
static void
writes (void *opaque)
{
  (void)opaque;
  assert (bench_open (&bench) == 0);
  bench_connect_all (&bench);
  bench_write (&bench, 3, 1, 1);
  assert (nbdm_flush (bench.volume) == 0);
  bench_write (&bench, 3, 1, 2);
  flush_remotes_alone ();
}

static void
copies_back (void *opaque)
{
  struct nbdm_resync batch
      = { .max_bytes = 5 * BENCH_REGION, .pace.copy_bytes = BENCH_REGION };

  (void)opaque;
  assert (bench_open (&bench) == 0);
  bench_connect_all (&bench);
  bench_write (&bench, 7, 1, 1);
  assert (nbdm_local_attach (bench.volume, bench.local, 0) == 0);
  assert (nbdm_disk_admit (bench.volume, NBDM_LOCAL) == 0);
  assert (nbdm_disk_resync (bench.volume, NBDM_LOCAL, &batch) == 0);
  bench_write (&bench, 3, 1, 1);
  assert (nbdm_flush (bench.volume) == 0);
  bench_write (&bench, 3, 1, 2);
  flush_remotes_alone ();
}

static void
opens (void *opaque)
{
  (void)opaque;
  (void)bench_open (&bench);
}

static void
is_refused (void *opaque)
{
  (void)opaque;
  assert (bench_open (&bench) == -EIO);
  ASSERT_SAYS ("failed to flush");
}

static void
test_failed_flush_of_a_start_is_not_forgotten (void)
{
  bench_put (&bench, &created);
  bench_session (NULL, writes);
  lose (3, 1);
  bench_session ("local_flush:1=error", is_refused);
  bench_session (NULL, mends);
  bench_check_disks (&bench);
}

static void
is_refused_without_room (void *opaque)
{
  no_room = true;
  is_refused (opaque);
}

static void
test_failed_flush_without_room_is_not_forgotten (void)
{
  bench_put (&bench, &created);
  bench_session (NULL, writes);
  lose (3, 1);
  bench_session ("local_flush:1=error", is_refused_without_room);
  bench_session (NULL, mends);
  bench_check_disks (&bench);
}

static void
opens_without_room (void *opaque)
{
  no_room = true;
  opens (opaque);
}

/* A disk that is being caught up has failed again, and the start is killed
 * before it has said so: nothing is read from it that a remote has, and so
 * nothing is lost.
 */
static void
failed_flush_of_a_start_that_is_killed_is_not_forgotten (void (*body) (void *))
{
  static const char *const faults[]
      = { "local_flush:1=error,open_local_flushed=kill",
          "local_flush:1=error,maps_unsealed=kill",
          "local_flush:1=error,begin_maps=kill" };

  for (unsigned i = 0; i < sizeof faults / sizeof faults[0]; i++) {
    bench_put (&bench, &created);
    bench_session ("local_write:1=error", copies_back);
    spoil (3, 1);
    assert (killed (in_child (faults[i], body, NULL)));
    bench_session (NULL, mends);
    bench_check_disks (&bench);
  }
}

static void
test_failed_flush_of_a_start_that_is_killed_is_not_forgotten (void)
{
  failed_flush_of_a_start_that_is_killed_is_not_forgotten (opens);
  failed_flush_of_a_start_that_is_killed_is_not_forgotten (opens_without_room);
}

/* --- beside a write under way --------------------------------------------- */

static void
is_killed_writing (void *opaque)
{
  copies_back (opaque);
  bench_write (&bench, 3, 1, 3); /* the fault kills it */
}

/* The server was killed while it copied to local and wrote to region 3.  The
 * kernel could not write what was answered in this region before, and told this
 * to a start that was killed.  No mark of a later start makes local the only
 * source of the region: no open slot, and no log that is lost.
 */
static void
test_write_under_way_does_not_make_local_the_source (void)
{
  static const char *const lost[] = { NULL, "activity", "inflight" };
  struct folder folder = { .fd = bench.dirfd };

  for (unsigned i = 0; i < sizeof lost / sizeof lost[0]; i++) {
    bench_put (&bench, &created);
    assert (killed (in_child ("local_write:1=error,after_issue:4=kill",
                              is_killed_writing, NULL)));
    assert (killed (in_child ("local_flush:1=kill", opens, NULL)));
    spoil (3, 1);
    if (lost[i])
      garble (&folder, lost[i], 40);
    bench_session (NULL, mends);
    bench_check_disks (&bench);
  }
}

/* --- when it is brought back ---------------------------------------------- */

static void
brings_it_back (void *opaque)
{
  unsigned before;

  (void)opaque;
  assert (bench_open (&bench) == 0);
  bench_connect_all (&bench);
  bench_write (&bench, 7, 1, 1);
  local_sync_error = EIO;
  assert (nbdm_local_attach (bench.volume, bench.local, 0) == -EIO);
  ASSERT_SAYS ("cannot flush the local disk");
  assert (nbdm_disk_admit (bench.volume, NBDM_LOCAL) == -ENODEV);
  local_sync_error = 0;
  before = nr_local_syncs;
  assert (nbdm_local_attach (bench.volume, bench.local, 0) == 0);
  assert (nr_local_syncs > before);
  assert (nbdm_disk_admit (bench.volume, NBDM_LOCAL) == 0);
  bench_mend (&bench);
}

/* The regions that are not copied back count as good as soon as the disk is
 * admitted.
 */
static void
test_disk_that_is_brought_back_is_flushed_first (void)
{
  bench_put (&bench, &created);
  bench_session ("local_write:1=error", brings_it_back);
  bench_check_disks (&bench);
}

/* Some of what it missed is copied back when the server stops. */
static void
copies_some_back (void *opaque)
{
  struct nbdm_resync batch
      = { .max_bytes = 5 * BENCH_REGION, .pace.copy_bytes = BENCH_REGION };

  (void)opaque;
  assert (bench_open (&bench) == 0);
  bench_connect_all (&bench);
  bench_write (&bench, 7, 1, 1);
  bench_write (&bench, 3, 1, 1);
  assert (nbdm_local_attach (bench.volume, bench.local, 0) == 0);
  assert (nbdm_disk_admit (bench.volume, NBDM_LOCAL) == 0);
  assert (nbdm_disk_resync (bench.volume, NBDM_LOCAL, &batch) == 0);
  bench_stop (&bench);
}

/* The disk is away at the start, and so it has failed. */
static void
is_killed_as_it_brings_it_back (void *opaque)
{
  char away[100];

  (void)opaque;
  snprintf (away, sizeof away, "%s.away", bench.local);
  assert (rename (bench.local, away) == 0);
  assert (bench_open (&bench) == 0);
  assert (bench.board->found.local_state == NBDM_LOCAL_FAILED);
  assert (rename (away, bench.local) == 0);
  bench_connect_all (&bench);
  local_sync_kills = true;
  (void)nbdm_local_attach (bench.volume, bench.local, 0);
}

/* Another program has written to the disk, and the kernel could not write some
 * of that.  It said so to the flush of a command that was killed.
 */
static void
test_flush_that_is_killed_is_not_forgotten (void)
{
  bench_put (&bench, &created);
  bench_session ("local_write:1=error", copies_some_back);
  assert (killed (in_child (NULL, is_killed_as_it_brings_it_back, NULL)));
  spoil (3, 0);
  bench_session (NULL, mends);
  bench_check_disks (&bench);
}

/* The same of a start. */
static void
is_killed_as_it_flushes (void *opaque)
{
  (void)opaque;
  local_sync_kills = true;
  (void)bench_open (&bench);
}

static void
test_flush_of_a_start_that_is_killed_is_not_forgotten (void)
{
  bench_put (&bench, &created);
  bench_session ("local_write:1=error", copies_some_back);
  assert (killed (in_child (NULL, is_killed_as_it_flushes, NULL)));
  spoil (3, 0);
  bench_session (NULL, mends);
  bench_check_disks (&bench);
}

int
main (void)
{
  alarm (60); /* nothing here may hang */
  bench_make (&bench);
  bench_take (&bench, &created);
  RUN (test_failed_flush_of_a_start_is_not_forgotten);
  RUN (test_failed_flush_without_room_is_not_forgotten);
  RUN (test_failed_flush_of_a_start_that_is_killed_is_not_forgotten);
  RUN (test_write_under_way_does_not_make_local_the_source);
  RUN (test_disk_that_is_brought_back_is_flushed_first);
  RUN (test_flush_that_is_killed_is_not_forgotten);
  RUN (test_flush_of_a_start_that_is_killed_is_not_forgotten);
  bench_free (&created);
  bench_remove (&bench);
  return 0;
}
