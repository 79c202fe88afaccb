/* SPDX-License-Identifier: BSD-3-Clause */

/* A write without a thread of its own.  It takes the express path only if it
 * needs no wait; otherwise it holds nothing afterwards.  A write that fails
 * half-way is completed by the same rules as any other.
 */

#include "api.h"
#include "base/clock.h"
#include "request/express.h"
#include "volume/local.h"
#include "wire/conn.h"
#include "wire/mailbox.h"
#include "wire/transport.h"
#include "wire/watch.h"
#include "engine_site.h"

#define BLOCK 4096u

static struct watch watch;
static struct mailbox *box; /* its */

/* What each read and write of a disk does besides. */
static enum { GO, COMPUTE, SLEEP } disk_does;
static uint8_t block[2 * REGION];

static void
take_time (void)
{
  uint64_t until = now_ns () + 200000;

  if (disk_does == SLEEP)
    poll (NULL, 0, 1);
  while (disk_does == COMPUTE && now_ns () < until)
    ;
}

ssize_t __real_pwrite (int fd, const void *buf, size_t count, off_t offset);
ssize_t __wrap_pwrite (int fd, const void *buf, size_t count, off_t offset);
ssize_t
__wrap_pwrite (int fd, const void *buf, size_t count, off_t offset)
{
  take_time ();
  return __real_pwrite (fd, buf, count, offset);
}

ssize_t __real_pread (int fd, void *buf, size_t count, off_t offset);
ssize_t __wrap_pread (int fd, void *buf, size_t count, off_t offset);
ssize_t
__wrap_pread (int fd, void *buf, size_t count, off_t offset)
{
  take_time ();
  return __real_pread (fd, buf, count, offset);
}

static bool
begin (struct express *x, uint32_t count, uint64_t offset, uint32_t flags)
{
  memset (block, (int)(offset / BLOCK + 1), sizeof block);
  return express_begin (volume, x, block, count, offset, flags, &watch);
}

static void
make_watch (void)
{
  assert (watch_init (&watch) == 0);
  box = watch.box;
}

/* A first write the other way, so that the extent is in the set. */
static void
begin_site (uint32_t hold_ms)
{
  make_site (NBDM_DEGRADE, hold_ms, 5000);
  make_watch ();
  connect_remote ();
  resync_to_end ();
  assert (nbdm_pwrite (volume, block, BLOCK, 0, 0) == 0);
}

static void
end_test (void)
{
  watch_end (&watch);
  end_site ();
}

/* As a session does it: poll until the legs have answered. */
static void
wait_legs (struct express *x)
{
  struct pollfd none = { .fd = -1 };

  watch_push (&watch);
  while (x->legs_left > 0) {
    assert (watch_poll (&watch, &none, DEADLINE_S * 1000) > 0);
    for (struct waiter *w = watch_take (&watch); w; w = w->next) {
      struct express *through = express_answered (&watch, w);

      assert (through == (x->legs_left == 0 ? x : NULL));
    }
  }
  watch_leave_idle (&watch);
}

static void
test_written_on_both (void)
{
  struct express x;
  int rc = -1;

  begin_site (1000);
  assert (begin (&x, BLOCK, 8 * BLOCK, 0));
  express_local (volume, &x);
  wait_legs (&x);
  assert (express_end (volume, &x, &rc) && rc == 0);
  assert (status ().remote.unflushed_regions == 1);
  assert (nbdm_stop (volume) == 0);
  assert_images_equal ();
  end_test ();
}

static struct nbdm_status
volume_status (void)
{
  struct nbdm_status s;

  nbdm_get_status (volume, &s);
  return s;
}

/* Refused, and as if nothing had been asked. */
static void
assert_refused (uint32_t count, uint64_t offset, uint32_t flags)
{
  struct express x;
  uint32_t before = volume_status ().inflight;

  assert (!begin (&x, count, offset, flags));
  assert (volume_status ().inflight == before);
  assert (nbdm_pwrite (volume, block, BLOCK, 32 * BLOCK, 0) == 0);
}

static void
test_refused_where_it_would_wait (void)
{
  struct express x;
  int rc;

  begin_site (1000);
  assert_refused (BLOCK, 0, NBDM_FUA);
  assert_refused (2 * REGION, 0, 0);
  assert_refused (BLOCK, SIZE, 0);
  assert_refused (100, 0, 0);
  assert (begin (&x, BLOCK, 0, 0));
  assert_refused (BLOCK, 0, 0); /* the range is held */
  express_local (volume, &x);
  wait_legs (&x);
  assert (express_end (volume, &x, &rc) && rc == 0);
  end_test ();
}

static void
test_refused_in_a_cold_extent (void)
{
  make_site (NBDM_DEGRADE, 1000, 5000);
  make_watch ();
  connect_remote ();
  resync_to_end ();
  assert_refused (BLOCK, 0, 0);
  end_test ();
}

static void
test_refused_while_holding_and_stopping (void)
{
  struct express x;

  begin_site (60000);
  kill_server ();
  wait_state (NBDM_HOLDING);
  assert (!begin (&x, BLOCK, 0, 0));
  start_server ();
  connect_remote ();
  nbdm_remote_release_late (volume, 1);
  resync_to_end ();
  assert (begin (&x, BLOCK, 0, 0));
  express_local (volume, &x);
  wait_legs (&x);
  assert (express_end (volume, &x, &(int){ 0 }));
  assert (nbdm_stop (volume) == 0);
  assert (!begin (&x, BLOCK, 0, 0));
  end_test ();
}

/* Dirty regions are left to resync: no leg to wait for. */
static void
test_remote_lost_is_local_alone (void)
{
  struct express x;
  int rc;

  begin_site (50);
  kill_server ();
  wait_state (NBDM_OUT_OF_SYNC);
  assert (begin (&x, BLOCK, 20 * BLOCK, 0));
  assert (x.legs_left == 0);
  express_local (volume, &x);
  assert (express_end (volume, &x, &rc) && rc == 0);
  assert (status ().dirty_regions >= 1);
  end_test ();
}

/* The remote dies while it has the command: express_end does not end the
 * request, express_complete does, and the region is dirty.
 */
static void
test_lost_half_way_is_completed (void)
{
  struct express x;
  int rc;

  begin_site (50);
  freeze_server ();
  assert (begin (&x, BLOCK, 24 * BLOCK, 0));
  express_local (volume, &x);
  kill_server ();
  wait_legs (&x);
  assert (!express_end (volume, &x, &rc));
  assert (express_complete (volume, &x) == 0);
  assert (status ().state == NBDM_OUT_OF_SYNC);
  assert (status ().dirty_regions >= 1 && volume_status ().inflight == 0);
  end_test ();
}

/* An error of the remote's: degraded before the answer, by a thread. */
static void
test_remote_refuses (void)
{
  struct express x;
  int rc;

  failing_server = true;
  begin_site (50);
  close (open (path ("refuse"), O_CREAT | O_RDWR, 0600));
  assert (begin (&x, BLOCK, 28 * BLOCK, 0));
  express_local (volume, &x);
  wait_legs (&x);
  assert (!express_end (volume, &x, &rc));
  assert (express_complete (volume, &x) == 0);
  assert (status ().state == NBDM_OUT_OF_SYNC);
  end_test ();
}

static void
write_and_read (int times)
{
  for (int i = 0; i < times; i++) {
    assert (nbdm_pwrite (volume, block, BLOCK, 0, 0) == 0);
    assert (nbdm_pread (volume, block, BLOCK, 0) == 0);
  }
}

static bool
is_quick (void)
{
  assert (local_is_quick (volume, true) == local_is_quick (volume, false));
  return local_is_quick (volume, true);
}

/* A few requests show that a disk is slow, and a few that it is quick again; a
 * slow machine is no slow disk.  Every eighth read and write is measured.
 */
static void
test_refused_while_the_disk_sleeps (void)
{
  begin_site (1000);
  disk_does = COMPUTE;
  write_and_read (100);
  assert (is_quick ());
  disk_does = SLEEP;
  write_and_read (12);
  assert (!is_quick ());
  assert_refused (BLOCK, 0, 0);
  disk_does = GO;
  write_and_read (100);
  assert (is_quick ());
  end_test ();
}

/* A thread that waits takes the poller's part from a session that is away, and
 * the ticker does it for those asleep.
 */
static void
test_part_is_lent (void)
{
  struct watcher watcher = { .box = NULL };
  struct express x;
  struct conn *conn;
  int rc;

  begin_site (1000);
  watcher.box = box;
  assert (begin (&x, BLOCK, 8 * BLOCK, 0));
  conn = conn_get (x.request.legs[0].conn);
  conn_push (conn);
  conn_before_poll (conn, &watcher);
  conn_after_poll (conn, &watcher, 0); /* away at the local disk */
  assert (nbdm_pwrite (volume, block, BLOCK, 40 * BLOCK, NBDM_FUA) == 0);
  express_local (volume, &x);
  conn_unwatch (conn, &watcher);
  wait_legs (&x);
  assert (express_end (volume, &x, &rc) && rc == 0);
  conn_put (conn);
  end_test ();
}

/* No thread uses a connection that is dropped, and the ticker no longer polls
 * it. The session that polls for the others is held at the local disk: so the
 * other sessions are woken, whether they handed their part over before or after
 * the drop.
 */
static void
drop_while_poller_is_away (bool absent_before)
{
  struct watcher away = { .box = mailbox_new () }, listed = { .box = box };
  struct pollfd told = { .fd = box->fd, .events = POLLIN };
  struct express x;
  struct conn *conn;
  int rc;

  assert (begin (&x, BLOCK, 24 * BLOCK, 0));
  express_local (volume, &x);
  conn = conn_get (x.request.legs[0].conn);
  conn_push (conn);
  assert (conn_before_poll (conn, &away) & POLLIN);
  assert (!(conn_before_poll (conn, &listed) & POLLIN));
  if (absent_before)
    conn_after_poll (conn, &away, 0);
  nbdm_disk_drop (volume, 1, "a test");
  if (!absent_before)
    conn_after_poll (conn, &away, 0);
  assert (poll (&told, 1, DEADLINE_S * 1000) == 1);
  wait_legs (&x);
  assert (!express_end (volume, &x, &rc));
  assert (express_complete (volume, &x) == 0);
  assert (status ().state == NBDM_OUT_OF_SYNC);
  conn_unwatch (conn, &away);
  conn_put (conn);
  mailbox_put (away.box);
}

static void
test_dropped_after_the_part_was_lent (void)
{
  begin_site (50);
  freeze_server ();
  drop_while_poller_is_away (true);
  end_test ();
}

static void
test_dropped_before_the_part_is_lent (void)
{
  begin_site (50);
  freeze_server ();
  drop_while_poller_is_away (false);
  end_test ();
}

int
main (int argc, char *argv[])
{
  static const struct engine_test tests[] = {
    TEST (test_written_on_both),
    TEST (test_refused_where_it_would_wait),
    TEST (test_refused_in_a_cold_extent),
    TEST (test_refused_while_holding_and_stopping),
    TEST (test_remote_lost_is_local_alone),
    TEST (test_lost_half_way_is_completed),
    TEST (test_remote_refuses),
    TEST (test_refused_while_the_disk_sleeps),
    TEST (test_part_is_lent),
    TEST (test_dropped_after_the_part_was_lent),
    TEST (test_dropped_before_the_part_is_lent),
  };

  return run_tests (tests, sizeof tests / sizeof *tests, argc, argv);
}
