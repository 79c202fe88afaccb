/* SPDX-License-Identifier: BSD-3-Clause */

/* See schedules.h. */

#define _GNU_SOURCE
#include "api.h"
#include "schedules.h"

#define SCHEDULE_S 100 /* a schedule that takes longer hangs */

struct site site;

/* --- a gate for the flushes of the first remote ------------------------ */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t gate_changed = PTHREAD_COND_INITIALIZER;
static bool gate_shut;
static unsigned at_gate;

static void
pass_gate (void *opaque, const struct peer_command *cmd)
{
  if (cmd->type != PEER_FLUSH || opaque != NULL)
    return;
  pthread_mutex_lock (&lock);
  at_gate++;
  pthread_cond_broadcast (&gate_changed);
  while (gate_shut)
    pthread_cond_wait (&gate_changed, &lock);
  at_gate--;
  pthread_mutex_unlock (&lock);
}

void
shut_flush_gate (bool shut)
{
  pthread_mutex_lock (&lock);
  gate_shut = shut;
  pthread_cond_broadcast (&gate_changed);
  pthread_mutex_unlock (&lock);
}

void
wait_for_flush (void)
{
  pthread_mutex_lock (&lock);
  while (at_gate == 0)
    pthread_cond_wait (&gate_changed, &lock);
  pthread_mutex_unlock (&lock);
}

/* --- gates at fault points --------------------------------------------- */

static const char *used_gates[8]; /* whose files are to be removed */

static void
note_gate (const char *gate)
{
  unsigned i = 0;

  pthread_mutex_lock (&lock);
  while (used_gates[i] && strcmp (used_gates[i], gate) != 0)
    i++;
  assert (i < sizeof used_gates / sizeof used_gates[0]);
  used_gates[i] = gate;
  pthread_mutex_unlock (&lock);
}

static const char *
reached_file (const char *gate, char path[32])
{
  snprintf (path, 32, "%s.reached", gate);
  return path;
}

static void
make_file (const char *path)
{
  int fd = open (path, O_CREAT | O_RDWR | O_CLOEXEC, 0600);

  assert (fd >= 0);
  close (fd);
}

void
wait_at (const char *gate)
{
  char path[32];

  note_gate (gate);
  WAIT_FOR (access (reached_file (gate, path), F_OK) == 0);
}

void
open_at (const char *gate)
{
  note_gate (gate);
  make_file (gate);
}

void
stand_at (const char *gate)
{
  char path[32];

  make_file (reached_file (gate, path));
  WAIT_FOR (access (gate, F_OK) == 0);
}

void
wait_at_gate (void)
{
  wait_at ("gate");
}

void
open_gate (void)
{
  open_at ("gate");
}

static void
remove_gates (void)
{
  char path[32];

  for (unsigned i = 0; used_gates[i]; i++) {
    unlink (used_gates[i]);
    unlink (reached_file (used_gates[i], path));
  }
}

/* --- the volume -------------------------------------------------------- */

void
make_volume (uint64_t size, uint32_t region_size, uint32_t nr_peers,
             uint32_t hold_ms)
{
  site.size = size;
  site.region_size = region_size;
  site.nr_peers = nr_peers;
  site.hold_ms = hold_ms;
  site.peer.applied = pass_gate;
  site.seed = 1;
  site_make (&site);
  site.params.flush_ms = 1000000;
}

void
open_volume (void)
{
  site_open (&site);
  for (uint32_t i = 0; i < site.nr_peers; i++) {
    site_connect (&site, i);
    site_resync_to_end (&site, i);
  }
}

void
bring_up (uint32_t nr_peers, uint32_t hold_ms)
{
  make_volume (SIZE, REGION, nr_peers, hold_ms);
  open_volume ();
}

struct nbdm_status
volume_status (void)
{
  struct nbdm_status s;

  nbdm_get_status (site.volume, &s);
  return s;
}

struct nbdm_disk_status
local_status (void)
{
  struct nbdm_disk_status s;

  assert (nbdm_get_disk_status (site.volume, NBDM_LOCAL, &s) == 0);
  return s;
}

int
write_at (uint64_t offset, uint8_t value)
{
  uint8_t buf[SECTOR];

  memset (buf, value, sizeof buf);
  return nbdm_pwrite (site.volume, buf, sizeof buf, offset, 0);
}

int
read_at (uint64_t offset)
{
  uint8_t buf[SECTOR];
  int rc = nbdm_pread (site.volume, buf, sizeof buf, offset);

  if (rc < 0)
    return rc;
  for (unsigned i = 1; i < sizeof buf; i++)
    assert (buf[i] == buf[0]);
  return buf[0];
}

void
lose (uint32_t remote)
{
  peer_cut (site.peers[remote], false);
  site_wait_state (&site, remote, NBDM_OUT_OF_SYNC);
}

int
connect_at (uint32_t remote, uint32_t peer)
{
  char uri[160];

  snprintf (uri, sizeof uri, "nbd+unix:///?socket=%s", site.sockets[peer]);
  return nbdm_remote_connect (site.volume, remote + 1, uri, 10000);
}

void
open_again (void)
{
  nbdm_close (site.volume);
  site_open (&site);
}

void
write_and_fail_local (uint64_t offset, uint8_t value)
{
  assert (write_at (offset, value) == 0);
  assert (local_status ().state == NBDM_LOCAL_FAILED);
}

void
attach_and_admit (void)
{
  assert (local_status ().state == NBDM_LOCAL_FAILED);
  assert (nbdm_local_attach (site.volume, site.local, 0) == 0);
  assert (nbdm_disk_admit (site.volume, NBDM_LOCAL) == 0);
}

void
punch_local (uint64_t offset)
{
  int fd = open (site.local, O_RDWR | O_CLOEXEC);

  assert (fd >= 0
          && fallocate (fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                        (off_t)offset, REGION)
                 == 0);
  close (fd);
}

/* --- a call in a thread of its own ------------------------------------- */

static void *
run_job (void *opaque)
{
  struct job *job = opaque;

  job->rc = job->run (job);
  job->over = true;
  return NULL;
}

void
start (struct job *job, int (*run) (struct job *job))
{
  job->run = run;
  job->over = false;
  assert (pthread_create (&job->thread, NULL, run_job, job) == 0);
}

int
end (struct job *job)
{
  WAIT_FOR (job->over);
  pthread_join (job->thread, NULL);
  return job->rc;
}

bool
over_soon (const struct job *job)
{
  for (unsigned i = 0; i < 1000 && !job->over; i++)
    poll (NULL, 0, 1);
  return job->over;
}

int
do_write (struct job *job)
{
  return write_at (job->offset, job->value);
}

int
do_write_fua (struct job *job)
{
  uint8_t buf[SECTOR];

  memset (buf, job->value, sizeof buf);
  return nbdm_pwrite (site.volume, buf, sizeof buf, job->offset, NBDM_FUA);
}

int
do_read (struct job *job)
{
  return read_at (job->offset);
}

int
do_zero (struct job *job)
{
  return nbdm_zero (site.volume, REGION, job->offset, 0);
}

int
do_attach (struct job *job)
{
  (void)job;
  return nbdm_local_attach (site.volume, site.local, 0);
}

int
do_flush (struct job *job)
{
  (void)job;
  return nbdm_flush (site.volume);
}

int
do_stop (struct job *job)
{
  (void)job;
  return nbdm_stop (site.volume);
}

static int
copy_back (uint64_t max_bytes)
{
  struct nbdm_resync batch = { .max_bytes = max_bytes };

  return nbdm_disk_resync (site.volume, NBDM_LOCAL, &batch);
}

int
do_copy_back (struct job *job)
{
  (void)job;
  return copy_back (64u << 20);
}

int
do_copy_back_one (struct job *job)
{
  (void)job;
  return copy_back (site.region_size);
}

int
do_resync_second (struct job *job)
{
  struct nbdm_resync batch = { .max_bytes = 64u << 20, .pace.depth = 1 };

  (void)job;
  return nbdm_disk_resync (site.volume, 2, &batch);
}

/* --- running schedules ------------------------------------------------- */

static void
run_one (void *opaque)
{
  const struct schedule *schedule = opaque;
  char folder[] = "/tmp/nbdm-schedule-XXXXXX";

  alarm (SCHEDULE_S);
  assert (mkdtemp (folder) && chdir (folder) == 0);
  schedule->run ();
  nbdm_stop (site.volume);
  nbdm_close (site.volume);
  site_remove (&site);
  remove_gates ();
  assert (rmdir (folder) == 0);
}

int
run_schedules (const struct schedule *schedules, size_t nr, int argc,
               char *argv[])
{
  size_t ran = 0;

  for (size_t i = 0; i < nr; i++)
    if (argc < 2 || strcmp (argv[1], schedules[i].name) == 0) {
      printf ("%s\n", schedules[i].name);
      fflush (stdout);
      assert (passed (
          in_child (schedules[i].fault, run_one, (void *)&schedules[i])));
      ran++;
    }
  return ran > 0 ? 0 : 1;
}
