/* SPDX-License-Identifier: BSD-3-Clause */

/* The local disk fails, with real threads and a real nbdkit as its remote:
 * takeover, reads and writes without it, copying back, and what a killed
 * process finds.  The failures are fault points; those of real disks are in
 * the end-to-end tests.
 */

#include "api.h"
#include "engine_site.h"

static struct nbdm_status
volume_status (void)
{
  struct nbdm_status s;

  nbdm_get_status (volume, &s);
  return s;
}

static struct nbdm_disk_status
local_status (void)
{
  struct nbdm_disk_status s;

  assert (nbdm_get_disk_status (volume, NBDM_LOCAL, &s) == 0);
  return s;
}

static void
bring_up (const char *fault)
{
  setenv ("NBDM_FAULT", fault, 1);
  make_site (NBDM_DEGRADE, 300, 5000);
  connect_remote ();
  resync_to_end ();
}

/* Of the last region, which is shorter than a block. */
static void
write_short_block (unsigned region, uint8_t value, int expected)
{
  uint8_t buf[512];

  memset (buf, value, sizeof buf);
  assert (nbdm_pwrite (volume, buf, sizeof buf, region * REGION, 0)
          == expected);
}

static void
assert_short_block (unsigned region, uint8_t value)
{
  uint8_t buf[512];

  assert (nbdm_pread (volume, buf, sizeof buf, region * REGION) == 0);
  for (unsigned i = 0; i < sizeof buf; i++)
    assert (buf[i] == value);
}

static void
write_block (unsigned region, uint8_t value, int expected)
{
  uint8_t buf[4096];

  memset (buf, value, sizeof buf);
  assert (nbdm_pwrite (volume, buf, sizeof buf, region * REGION, 0)
          == expected);
}

static void
assert_block (unsigned region, uint8_t value)
{
  uint8_t buf[4096];

  assert (nbdm_pread (volume, buf, sizeof buf, region * REGION) == 0);
  for (unsigned i = 0; i < sizeof buf; i++)
    assert (buf[i] == value);
}

/* As the policy thread does. */
static void
copy_back (void)
{
  time_t until = time (NULL) + DEADLINE_S;
  struct nbdm_resync batch = { .max_bytes = 1u << 20 };

  while (local_status ().state == NBDM_LOCAL_RESYNCING) {
    int rc = nbdm_disk_resync (volume, NBDM_LOCAL, &batch);

    assert (rc == 0 || rc == -ENOTCONN);
    assert (time (NULL) < until);
    batch.first_region = batch.next_region;
  }
  assert (local_status ().state == NBDM_LOCAL_OK);
  assert (local_status ().dirty_regions == 0);
}

static void
end_equal (void)
{
  assert (nbdm_flush (volume) == 0);
  assert (nbdm_stop (volume) == 0);
  assert_images_equal ();
  end_site ();
}

static void
reopen (void)
{
  assert (nbdm_open (&params, &volume) == 0);
  assert (nbdm_start (volume) == 0);
  connect_remote ();
}

static void
test_write_error_is_taken_over (void)
{
  bring_up ("local_write:3=error");
  write_block (0, 1, 0);
  write_block (1, 2, 0);
  assert (local_status ().state == NBDM_LOCAL_OK);
  write_block (2, 3, 0); /* local refuses it, and the client gets no error */
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  assert (local_status ().local.errors == 1);
  assert (local_status ().reason[0]);
  assert (status ().state == NBDM_IN_SYNC);
  write_block (2, 4, 0);
  write_block (40, 5, 0);
  assert_block (0, 1);
  assert_block (1, 2);
  assert_block (2, 4);
  assert_block (40, 5);
  assert (nbdm_remote_invalidate (volume, 1) == -EBUSY);
  assert (nbdm_disk_admit (volume, NBDM_LOCAL) == -ENODEV);
  assert (nbdm_local_attach (volume, params.local, 0) == 0);
  assert (nbdm_remote_compare (volume, 1, 64) == 0);
  assert (nbdm_disk_admit (volume, NBDM_LOCAL) == 0);
  write_block (3, 6, 0);
  assert_block (2, 4);
  copy_back ();
  /* The content of the one active extent. */
  assert (local_status ().copied_bytes == 64u * REGION);
  assert (nbdm_local_attach (volume, params.local, 0) == -EALREADY);
  end_equal ();
}

static void *
write_region_9 (void *opaque)
{
  (void)opaque;
  write_block (9, 8, 0);
  return NULL;
}

/* What began on the old disk is not to end on the new one. */
static void
test_attach_waits_for_the_old_disk (void)
{
  char fault[300], gate[] = "/tmp/nbdm-gate-XXXXXX", reached[64];
  pthread_t writer;

  assert (mkdtemp (gate));
  snprintf (fault, sizeof fault, "local_write:1=wait:%s/go,local_write:2=error",
            gate);
  bring_up (fault);
  assert (pthread_create (&writer, NULL, write_region_9, NULL) == 0);
  snprintf (reached, sizeof reached, "%s/go.reached", gate);
  while (access (reached, F_OK) < 0)
    pause_ms (5);
  write_block (2, 3, 0); /* fails on local, and is taken over */
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  assert (nbdm_local_attach (volume, params.local, 0) == -EBUSY);
  snprintf (fault, sizeof fault, "touch %s/go", gate);
  assert (system (fault) == 0);
  pthread_join (writer, NULL);
  assert_block (9, 8);
  assert (nbdm_local_attach (volume, params.local, 0) == 0);
  assert (nbdm_disk_admit (volume, NBDM_LOCAL) == 0);
  copy_back ();
  snprintf (fault, sizeof fault, "rm -r %s", gate);
  assert (system (fault) == 0);
  end_equal ();
}

static void
test_flush_error_is_taken_over (void)
{
  bring_up ("local_flush:2=error"); /* the first is the open's */
  write_block (0, 1, 0);
  assert (nbdm_flush (volume) == 0);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  assert (!volume_status ().failed);
  assert_block (0, 1);
  assert (nbdm_local_attach (volume, params.local, 0) == 0);
  assert (nbdm_disk_admit (volume, NBDM_LOCAL) == 0);
  copy_back ();
  end_equal ();
}

static void
test_fua_error_is_taken_over (void)
{
  uint8_t buf[512] = { 1 };

  bring_up ("local_flush:2=error");
  assert (nbdm_pwrite (volume, buf, sizeof buf, 0, NBDM_FUA) == 0);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  assert (nbdm_flush (volume) == 0);
  assert (nbdm_stop (volume) == 0);
  nbdm_close (volume);
  reopen ();
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  assert (nbdm_local_attach (volume, params.local, 1) == 0);
  assert (nbdm_disk_admit (volume, NBDM_LOCAL) == 0);
  assert (local_status ().dirty_regions == 65);
  copy_back ();
  end_equal ();
}

/* Without a remote in sync the client gets the error, and never old data. */
static void
test_alone_it_is_an_error (void)
{
  bring_up ("local_write:2=error,local_read:70=error");
  write_block (0, 1, 0);
  kill_server ();
  write_block (1, 2, -EIO);
  assert (local_status ().state == NBDM_LOCAL_OK);
  write_block (2, 3, 0);
  start_server ();
  connect_remote ();
  resync_to_end ();
  end_equal ();
}

static void
test_remote_lost_while_it_serves (void)
{
  uint8_t buf[4096];

  bring_up ("local_write:2=error");
  write_block (0, 1, 0);
  write_block (1, 2, 0);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  kill_server ();
  write_block (1, 3, -EIO); /* held, then no disk has it */
  assert (nbdm_pread (volume, buf, sizeof buf, 0) == -EIO);
  write_block (5, 3, -EIO); /* refused at once */
  assert (nbdm_flush (volume) == -EIO);
  assert (!volume_status ().failed);
  start_server ();
  connect_remote ();
  assert (status ().dirty_regions == 0);
  assert (status ().state == NBDM_IN_SYNC);
  assert_block (0, 1);
  write_block (5, 4, 0);
  assert_block (5, 4);
  assert (nbdm_local_attach (volume, params.local, 0) == 0);
  assert (nbdm_disk_admit (volume, NBDM_LOCAL) == 0);
  copy_back ();
  end_equal ();
}

/* While being caught up, local is the source of what it does not miss. */
static void
test_remote_lost_while_copying_back (void)
{
  bring_up ("local_write:1=error");
  write_block (7, 1, 0);
  assert (nbdm_local_attach (volume, params.local, 0) == 0);
  assert (nbdm_disk_admit (volume, NBDM_LOCAL) == 0);
  assert (local_status ().dirty_regions == 64);
  {
    struct nbdm_resync batch = { .max_bytes = REGION };
    assert (nbdm_disk_resync (volume, NBDM_LOCAL, &batch) == 0);
  }
  assert (local_status ().dirty_regions > 0);
  kill_server ();
  write_block (0, 2, 0);     /* copied back by now */
  write_block (63, 3, -EIO); /* still missing: no disk has it */
  assert_block (0, 2);
  start_server ();
  connect_remote ();
  assert_block (0, 2);
  copy_back ();
  resync_to_end ();
  assert_block (7, 1);
  end_equal ();
}

static void
test_bad_sector_is_rewritten (void)
{
  bring_up ("local_read:66=error,local_read:67=error"); /* after the sync */
  write_block (3, 11, 0);
  for (unsigned i = 0; i < 100; i++)
    assert_block (3, 11);
  assert (local_status ().state == NBDM_LOCAL_RESYNCING);
  assert (local_status ().dirty_regions == 1);
  write_block (3, 12, 0);
  assert_block (3, 12);
  copy_back ();
  assert (local_status ().local.repaired == 1);
  assert (local_status ().local.errors == 1);
  assert_block (3, 12);
  end_equal ();
}

static void
test_policy_stop_takes_nothing_over (void)
{
  setenv ("NBDM_FAULT", "local_write:2=error", 1);
  make_site (NBDM_STOP, 300, 5000);
  connect_remote ();
  resync_to_end ();
  write_block (0, 1, 0);
  write_block (0, 2, -EIO);
  assert (local_status ().state == NBDM_LOCAL_OK);
  resync_to_end ();
  end_equal ();
}

/* A child makes three writes, the last in a cold extent, and is killed.  It
 * "--attaches" the disk that failed in the second one before the third.
 */
static void
kill_child (const char *what, const char *fault)
{
  pid_t pid;
  int wstatus;

  make_site (NBDM_DEGRADE, 300, 5000);
  assert (nbdm_stop (volume) == 0);
  nbdm_close (volume);
  pid = fork ();
  assert (pid >= 0);
  if (pid == 0) {
    setenv ("NBDM_FAULT", fault, 1);
    execl ("/proc/self/exe", "test_local", what, dir, (char *)NULL);
    _exit (127);
  }
  waitpid (pid, &wstatus, 0);
  assert (WIFSIGNALED (wstatus) && WTERMSIG (wstatus) == SIGKILL);
}

/* A process killed between the marks and the superblock believes the marks. */
static void
test_killed_in_a_takeover (void)
{
  kill_child ("--writes", "local_write:2=error,takeover_marked=kill");
  reopen ();
  assert (local_status ().state == NBDM_LOCAL_RESYNCING);
  assert_block (0, 1);
  copy_back ();
  resync_to_end ();
  assert_block (0, 1);
  end_equal ();
}

static void
child_killed (const char *what, const char *folder)
{
  snprintf (dir, sizeof dir, "%s", folder);
  set_params (NBDM_DEGRADE, 300, 5000);
  reopen ();
  resync_to_end ();
  write_block (0, 1, 0);
  write_block (1, 2, 0);
  if (strcmp (what, "--attaches") == 0) {
    assert (nbdm_local_attach (volume, params.local, 0) == 0);
    assert (nbdm_disk_admit (volume, NBDM_LOCAL) == 0);
  }
  write_short_block (64, 3, 0);
  abort (); /* it was to be killed */
}

/* A write was logged and did not begin: the remote still has the older bytes.
 */
static void
test_killed_before_local_is_marked (void)
{
  kill_child ("--writes", "local_write:2=error,slot_reserved:3=kill");
  reopen ();
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  assert_short_block (64, 0);
  assert (nbdm_local_attach (volume, params.local, 1) == 0);
  assert (nbdm_disk_admit (volume, NBDM_LOCAL) == 0);
  copy_back ();
  resync_to_end ();
  assert_short_block (64, 0);
  end_equal ();
}

/* Killed while local is caught up, and local is gone at the next start: what
 * it had not flushed went with it.
 */
static void
test_gone_at_the_next_start (void)
{
  static const uint8_t zeroes[512];
  int fd;

  kill_child ("--attaches", "local_write:2=error,before_answer:3=kill");
  fd = open (path ("local"), O_WRONLY | O_CLOEXEC);
  assert (fd >= 0 && pwrite (fd, zeroes, sizeof zeroes, 64 * REGION) > 0);
  close (fd);
  assert (rename (path ("local"), path ("gone")) == 0);
  reopen ();
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  assert_short_block (64, 3);
  assert (rename (path ("gone"), path ("local")) == 0);
  assert (nbdm_local_attach (volume, params.local, 0) == 0);
  assert (nbdm_disk_admit (volume, NBDM_LOCAL) == 0);
  copy_back ();
  resync_to_end ();
  assert_short_block (64, 3);
  end_equal ();
}

/* What could not be flushed may have been a hole before. */
static void
test_holes_of_a_doubted_disk (void)
{
  struct nbdm_extent extent;

  bring_up ("local_flush:2=error");
  assert (nbdm_extents (volume, SIZE, 0, &extent, 1) == 1);
  assert (extent.type == NBDM_EXTENT_HOLE);
  kill_server ();
  wait_state (NBDM_OUT_OF_SYNC);
  assert (nbdm_flush (volume) == -EIO);
  assert (volume_status ().failed);
  assert (nbdm_extents (volume, SIZE, 0, &extent, 1) == 1);
  assert (extent.type == NBDM_EXTENT_DATA && extent.length == SIZE);
  assert (nbdm_stop (volume) == -EIO);
  nbdm_close (volume);
  remove_site ();
}

static void
touch (const char *name)
{
  close (open (path (name), O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
}

/* Both refuse a write alike: neither is worse. */
static void
both_refuse_alike (const char *fault)
{
  setenv ("NBDM_FAULT", fault, 1);
  failing_server = true;
  make_site (NBDM_DEGRADE, 300, 5000);
  connect_remote ();
  resync_to_end ();
  write_block (0, 1, 0);
  touch ("refuse");
  write_block (0, 2, -EIO);
  assert (unlink (path ("refuse")) == 0);
}

/* Local, which was whole before it, stays the source. */
static void
test_both_refuse_alike (void)
{
  both_refuse_alike ("local_write:2=error");
  assert_block (0, 1);
  assert (local_status ().state == NBDM_LOCAL_OK);
  resync_to_end ();
  assert_block (0, 1);
  end_equal ();
}

/* Local cannot even read the region: the remote has the rest of it. */
static void
test_both_refuse_alike_and_local_cannot_read (void)
{
  both_refuse_alike ("local_write:2=error,local_read:1=error,"
                     "local_read:2=error");
  assert_block (0, 1);
  assert (local_status ().dirty_regions == 1);
  copy_back ();
  resync_to_end ();
  assert_block (0, 1);
  end_equal ();
}

static void *
resync_local (void *opaque)
{
  struct nbdm_resync batch = { .max_bytes = 64u << 20 };

  (void)opaque;
  nbdm_disk_resync (volume, NBDM_LOCAL, &batch);
  return NULL;
}

static void
wait_reached (const char *name)
{
  time_t until = time (NULL) + DEADLINE_S;

  while (access (path (name), F_OK) < 0) {
    assert (time (NULL) < until);
    pause_ms (5);
  }
}

/* The fault waits for files of the site, which has a name by then. */
static void
bring_up_failing (const char *fault)
{
  char with_dir[300];

  snprintf (dir, sizeof dir, "/tmp/nbdm-engine-XXXXXX");
  assert (mkdtemp (dir));
  snprintf (with_dir, sizeof with_dir, fault, dir);
  setenv ("NBDM_FAULT", with_dir, 1);
  failing_server = true;
  make_site_here (NBDM_DEGRADE, 300, 5000);
  connect_remote ();
  resync_to_end ();
}

/* A region was copied back and is not clean yet; a write of it succeeds on
 * local, and the remote, its only source, refuses it.
 */
static void
test_source_refuses_what_was_copied_back (void)
{
  pthread_t thread;

  bring_up_failing ("local_write:1=error,"
                    "local_resync_before_clean:1=wait:%s/go");
  write_block (7, 1, 0);
  assert (nbdm_local_attach (volume, params.local, 0) == 0);
  assert (nbdm_disk_admit (volume, NBDM_LOCAL) == 0);
  assert (pthread_create (&thread, NULL, resync_local, NULL) == 0);
  wait_reached ("go.reached");
  touch ("refuse");
  write_block (3, 9, -EIO);
  unlink (path ("refuse"));
  touch ("go");
  pthread_join (thread, NULL);
  connect_remote ();
  copy_back ();
  resync_to_end ();
  end_equal ();
}

/* Whatever fails and when: no client sees an error, and the disks end equal. */
static void
test_takeover_under_load (void)
{
  bring_up ("local_write:500=error,local_flush:900=error");
  start_load ();
  for (unsigned i = 0; i < 3; i++) {
    wait_requests (600);
    if (local_status ().state == NBDM_LOCAL_FAILED) {
      assert (nbdm_local_attach (volume, params.local, i == 1) == 0);
      assert (nbdm_disk_admit (volume, NBDM_LOCAL) == 0);
      copy_back ();
    }
  }
  stop_load ();
  assert (local_status ().local.errors > 0);
  assert (local_status ().state == NBDM_LOCAL_OK);
  end_equal ();
}

static const struct engine_test tests[] = {
  TEST (test_write_error_is_taken_over),
  TEST (test_attach_waits_for_the_old_disk),
  TEST (test_flush_error_is_taken_over),
  TEST (test_fua_error_is_taken_over),
  TEST (test_alone_it_is_an_error),
  TEST (test_remote_lost_while_it_serves),
  TEST (test_remote_lost_while_copying_back),
  TEST (test_bad_sector_is_rewritten),
  TEST (test_policy_stop_takes_nothing_over),
  TEST (test_killed_in_a_takeover),
  TEST (test_killed_before_local_is_marked),
  TEST (test_gone_at_the_next_start),
  TEST (test_both_refuse_alike),
  TEST (test_both_refuse_alike_and_local_cannot_read),
  TEST (test_holes_of_a_doubted_disk),
  TEST (test_source_refuses_what_was_copied_back),
  TEST (test_takeover_under_load),
};

int
main (int argc, char *argv[])
{
  if (argc > 2) {
    alarm (100);
    child_killed (argv[1], argv[2]);
  }
  return run_tests (tests, sizeof tests / sizeof tests[0], argc, argv);
}
