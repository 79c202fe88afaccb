/* SPDX-License-Identifier: BSD-3-Clause */

/* usage: server_in_c CONFIG    (until SIGTERM)
 *
 * A server without Python: the engine and its direct door, which the sanitizers
 * can watch from end to end.  The policy is what nbd_mirror/server/keeper.py
 * does, without its patience: connect, admit, resync, release what was late;
 * and, so that there is something to do, now and then all is invalidated or
 * paused.
 *
 * The configuration has a word a line: local disk, state directory, a file
 * that is there while every remote is in sync, the socket to listen on, and
 * that of each remote.
 */

#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>

#include "api.h"
#include "door.h"
#include "test.h"
#include "volume/volume.h"

#define LINE 256
#define MAX_LINES 8
#define FIRST_REMOTE 4 /* line */

/* The leak sanitizer's, where it is loaded; it ends the process if it finds
 * any.
 */
void __lsan_do_leak_check (void) __attribute__ ((weak));

static char lines[MAX_LINES][LINE];
static unsigned nr_lines;
static struct nbdm *volume;
static pthread_t keepers[NBDM_MAX_REMOTES], maintenance;
static atomic_bool ending;

static void
pause_ms (unsigned ms)
{
  const struct timespec time = { ms / 1000, (long)(ms % 1000) * 1000000 };

  nanosleep (&time, NULL);
}

static unsigned
nr_remotes (void)
{
  return nr_lines - FIRST_REMOTE;
}

static struct nbdm_disk_status
status_of (uint32_t remote)
{
  struct nbdm_disk_status s;

  assert (nbdm_get_disk_status (volume, remote + 1, &s) == 0);
  return s;
}

static void
connect_once (uint32_t remote)
{
  char uri[LINE + 32];

  snprintf (uri, sizeof uri, "nbd+unix:///?socket=%s",
            lines[FIRST_REMOTE + remote]);
  if (nbdm_remote_connect (volume, remote + 1, uri, 1000) < 0) {
    nbdm_remote_explain (volume, remote + 1, nbdm_last_error ());
    pause_ms (50);
    return;
  }
  for (uint64_t region = 0; region < 4; region++)
    nbdm_remote_compare (volume, remote + 1, region); /* with any result */
  if (nbdm_disk_admit (volume, remote + 1) < 0)
    nbdm_disk_drop (volume, remote + 1, "not admitted");
}

/* Batches, as long as there is something to copy. */
static void
resync_some (uint32_t remote)
{
  struct nbdm_resync batch = { .max_bytes = 4u << 20, .pace.depth = 8 };

  for (unsigned n = 0; n < 64 && !ending; n++) {
    struct nbdm_disk_status s = status_of (remote);

    if (s.state != NBDM_RESYNCING)
      return;
    if (s.remote.late_regions > 0 && s.remote.late_regions == s.dirty_regions) {
      pause_ms (20);
      nbdm_remote_release_late (volume, remote + 1);
    }
    if (nbdm_disk_resync (volume, remote + 1, &batch) < 0)
      return;
    batch.first_region = batch.next_region;
  }
}

static void *
keep (void *opaque)
{
  uint32_t remote = (uint32_t)(uintptr_t)opaque;

  while (!ending) {
    struct nbdm_disk_status s = status_of (remote);

    if (s.state == NBDM_FAILED)
      nbdm_remote_reset (volume, remote + 1);
    if (!s.remote.connected)
      connect_once (remote);
    else
      resync_some (remote);
    nbdm_disk_wait (volume, remote + 1, s.serial, 100);
  }
  return NULL;
}

static void
tell_in_sync (void)
{
  for (uint32_t i = 0; i < nr_remotes (); i++)
    if (status_of (i).state != NBDM_IN_SYNC) {
      unlink (lines[2]);
      return;
    }
  close (open (lines[2], O_WRONLY | O_CREAT, 0600));
}

static void *
maintain (void *opaque)
{
  uint64_t some[64];
  struct nbdm_status s;

  (void)opaque;
  for (unsigned turn = 1; !ending; turn++) {
    uint32_t remote = turn / 64 % nr_remotes ();

    pause_ms (50);
    nbdm_get_status (volume, &s);
    assert (!s.failed);
    nbdm_get_active_extents (volume, some, 64);
    nbdm_get_recent_regions (volume, some, 64);
    tell_in_sync ();
    nbdm_cool (volume, 100);
    if (turn % 64 == 20)
      nbdm_remote_pause (volume, remote + 1, 1);
    if (turn % 64 == 24)
      nbdm_remote_pause (volume, remote + 1, 0);
    if (turn % 64 == 40 && s.clients > 0)
      nbdm_remote_invalidate (volume, remote + 1);
  }
  return NULL;
}

static void
read_lines (const char *path)
{
  FILE *file = fopen (path, "re");

  assert (file);
  while (nr_lines < MAX_LINES && fgets (lines[nr_lines], LINE, file)) {
    lines[nr_lines][strcspn (lines[nr_lines], "\n")] = '\0';
    nr_lines++;
  }
  fclose (file);
  assert (nr_lines > FIRST_REMOTE);
}

static void
open_volume (void)
{
  static const char *const names[] = { "a", "b", "c", "d", "e" };
  struct nbdm_params params = {
    .name = "test", .region_size = 65536, .policy = NBDM_DEGRADE, .hold_ms = 300
  };
  int rc;

  params.local = lines[0];
  params.state_dir = lines[1];
  params.nr_remotes = nr_remotes ();
  for (uint32_t i = 0; i < params.nr_remotes; i++) {
    params.remotes[i].name = names[i];
    params.remotes[i].deadline_ms = 1500;
  }
  rc = nbdm_create (&params, 0);
  assert (rc == 0 || rc == -EEXIST);
  if (nbdm_open (&params, &volume) < 0) {
    fprintf (stderr, "server: %s\n", nbdm_last_error ());
    exit (1);
  }
}

static void
start_threads (void)
{
  assert (nbdm_start (volume) == 0);
  for (uint32_t i = 0; i < nr_remotes (); i++)
    assert (pthread_create (&keepers[i], NULL, keep, (void *)(uintptr_t)i)
            == 0);
  assert (pthread_create (&maintenance, NULL, maintain, NULL) == 0);
}

static void
stop_and_close (void)
{
  ending = true;
  nbdm_wake (volume);
  for (uint32_t i = 0; i < nr_remotes (); i++)
    pthread_join (keepers[i], NULL);
  pthread_join (maintenance, NULL);
  assert (nbdm_stop (volume) == 0);
  nbdm_close (volume);
}

int
main (int argc, char **argv)
{
  struct door door;
  sigset_t ends;
  int number;

  assert (argc == 2);
  sigemptyset (&ends);
  sigaddset (&ends, SIGTERM);
  /* Before there is a thread, so that each has it blocked. */
  assert (pthread_sigmask (SIG_BLOCK, &ends, NULL) == 0);
  read_lines (argv[1]);
  open_volume ();
  start_threads ();
  door_open (&door, volume, lines[3]);
  assert (sigwait (&ends, &number) == 0);
  door_close (&door);
  stop_and_close ();
  /* Here and not at the process's end: p11-kit, which libnbd brings along,
   * waits for ever for a lock of the C library in its destructor, where a
   * runtime of a sanitizer stands before that (glibc 2.36, p11-kit 0.24).
   */
  if (__lsan_do_leak_check)
    __lsan_do_leak_check ();
  _exit (0);
}
