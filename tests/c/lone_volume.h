/* SPDX-License-Identifier: BSD-3-Clause */

/* A volume whose remote never answers, in a folder of its own: what a start
 * believes is seen by the dirty maps.  "Killed" is nbdm_close without
 * nbdm_stop, or a child that a fault point killed: the page cache lives in
 * both.
 */

#ifndef NBDM_TEST_LONE_VOLUME_H
#define NBDM_TEST_LONE_VOLUME_H

#include "api.h"
#include "logs/superblock.h"
#include "volume/volume.h"
#include "test.h"

#define REGION 65536u
#define EXTENT (4u << 20)
#define SIZE (UINT64_C (5) * EXTENT + 3 * 512u)
#define NR_REGIONS ((SIZE - 1) / REGION + 1)

static struct folder site;
static struct nbdm_params params;
static char local[PATH_MAX + 16];

/* The folder, an empty disk, and the parameters. */
static TEST_UNUSED void
describe_volume (uint64_t size, uint32_t region_size)
{
  int fd;

  site = folder_make ();
  snprintf (local, sizeof local, "%s/disk", site.path);
  fd = open (local, O_RDWR | O_CREAT, 0600);
  assert (fd >= 0 && ftruncate (fd, (off_t)size) == 0);
  close (fd);
  params = (struct nbdm_params){ .name = "test",
                                 .local = local,
                                 .state_dir = site.path,
                                 .region_size = region_size,
                                 .policy = NBDM_DEGRADE,
                                 .hold_ms = 0,
                                 .nr_remotes = 1 };
  params.remotes[0].name = "dr";
  params.remotes[0].deadline_ms = 1000;
  params.remotes[0].assume_in_sync = 1;
}

static TEST_UNUSED void
create_volume (void)
{
  int status;
  pid_t pid;

  /* In a child: NBDM_FAULT is read once a process, and not before the one
   * that is to be killed.
   */
  pid = fork ();
  assert (pid >= 0);
  if (pid == 0)
    _exit (nbdm_create (&params, 0) == 0 ? 0 : 1);
  waitpid (pid, &status, 0);
  assert (status == 0);
}

static TEST_UNUSED void
make_volume (uint64_t size, uint32_t region_size)
{
  describe_volume (size, region_size);
  create_volume ();
}

static TEST_UNUSED void
end_volume (void)
{
  char command[PATH_MAX + 16];

  close (site.fd);
  snprintf (command, sizeof command, "rm -rf %s", site.path);
  assert (system (command) == 0);
}

static TEST_UNUSED struct nbdm *
open_volume (void)
{
  struct nbdm *v = NULL;

  if (nbdm_open (&params, &v) < 0) {
    fprintf (stderr, "open: %s\n", nbdm_last_error ());
    abort ();
  }
  return v;
}

static TEST_UNUSED struct nbdm_disk_status
remote (struct nbdm *v)
{
  struct nbdm_disk_status s;

  assert (nbdm_get_disk_status (v, 1, &s) == 0);
  return s;
}

static TEST_UNUSED void
write_at (struct nbdm *v, uint64_t offset)
{
  static const uint8_t buf[4096] = { 1 };

  assert (nbdm_pwrite (v, buf, 512, offset, 0) == 0);
}

/* A child writes, and NBDM_FAULT kills it on the way. */
static TEST_UNUSED void
killed_at (const char *fault, uint64_t offset)
{
  int status;
  pid_t pid = fork ();

  assert (pid >= 0);
  if (pid == 0) {
    setenv ("NBDM_FAULT", fault, 1);
    struct nbdm *v = open_volume ();
    assert (nbdm_start (v) == 0);
    write_at (v, offset);
    _exit (0);
  }
  waitpid (pid, &status, 0);
  assert (WIFSIGNALED (status) && WTERMSIG (status) == SIGKILL);
}

/* The superblock as another boot would find it. */
static TEST_UNUSED void
reboot (void)
{
  struct disk_superblock sb;
  struct disk_nodes nodes;
  bool torn;
  int fd = openat (site.fd, "superblock", O_RDWR);

  assert (fd >= 0 && superblock_load (fd, &sb, &nodes, &torn) == 0);
  sb.boot_id[0] ^= 1;
  assert (superblock_store (fd, &sb, &nodes) == 0);
  close (fd);
}

/* Open in a child too, so that the next test's fault is still to be read. */
static TEST_UNUSED void
check_in_child (void (*check) (struct nbdm *))
{
  int status;
  pid_t pid = fork ();

  assert (pid >= 0);
  if (pid == 0) {
    struct nbdm *v = open_volume ();
    check (v);
    assert (nbdm_stop (v) == 0);
    nbdm_close (v);
    _exit (0);
  }
  waitpid (pid, &status, 0);
  assert (status == 0);
}

static TEST_UNUSED void
no_dirty_region (struct nbdm *v)
{
  assert (remote (v).dirty_regions == 0);
}

static TEST_UNUSED void
one_dirty_extent (struct nbdm *v)
{
  assert (remote (v).dirty_regions == EXTENT / REGION);
  assert (remote (v).remote.late_regions == EXTENT / REGION);
}

#endif /* NBDM_TEST_LONE_VOLUME_H */
