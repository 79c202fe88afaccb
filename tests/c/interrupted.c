/* SPDX-License-Identifier: BSD-3-Clause */

/* See interrupted.h. */

#define _GNU_SOURCE

#include "api.h"
#include "base/crc32c.h"
#include "base/file.h"
#include "logs/layout.h"
#include "interrupted.h"

#include <dirent.h>
#include <endian.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>

#define MEND_ROUNDS 200u
#define OUTSTANDING_S 60

static const char *const names[BENCH_REMOTES] = { "a", "b" };

static void
make_params (struct bench *bench)
{
  bench->params = (struct nbdm_params){ .name = "v",
                                        .local = bench->local,
                                        .state_dir = bench->state,
                                        .size = BENCH_SIZE,
                                        .region_size = BENCH_REGION,
                                        .policy = NBDM_DEGRADE,
                                        .hold_ms = 5000,
                                        .flush_ms = 1000000,
                                        .nr_remotes = BENCH_REMOTES };
  for (uint32_t i = 0; i < BENCH_REMOTES; i++) {
    bench->params.remotes[i].name = names[i];
    bench->params.remotes[i].deadline_ms = 20000;
    bench->params.remotes[i].assume_in_sync = 1;
  }
}

static void
create (void *opaque)
{
  struct bench *bench = opaque;

  if (nbdm_create (&bench->params, 0) < 0)
    _exit (1);
}

static void *
share (size_t size)
{
  void *p = mmap (NULL, size, PROT_READ | PROT_WRITE,
                  MAP_SHARED | MAP_ANONYMOUS, -1, 0);

  assert (p != MAP_FAILED);
  return p;
}

static void
obey (const struct bench *bench, struct peer *peer, uint32_t i,
      enum servers_word word)
{
  switch (word) {
  case SERVERS_START:
    break;
  case SERVERS_PUT:
    peer_cut (peer, false);
    peer_hold (peer, PEER_GO);
    peer_put (peer, bench->image[i]);
    break;
  case SERVERS_TAKE:
    peer_cut (peer, false);
    peer_hold (peer, PEER_GO);
    memcpy (bench->image[i], peer_image (peer), BENCH_SIZE);
    break;
  case SERVERS_HOLD:
    peer_hold (peer, PEER_HOLD_FLUSHES);
    break;
  case SERVERS_HOLD_ALL:
    peer_hold (peer, PEER_HOLD_ALL);
    break;
  case SERVERS_GO:
    peer_hold (peer, PEER_GO);
    break;
  case SERVERS_LOSE_CACHE:
    peer_lose_power (peer, PEER_LOSE_ALL);
    peer_hold (peer, PEER_GO);
    break;
  }
}

/* Sends each byte on the control socket back once it has done what it says. */
static void
run_servers (const struct bench *bench, int control)
{
  struct peer *peers[BENCH_REMOTES];
  char word = SERVERS_START;

  for (uint32_t i = 0; i < BENCH_REMOTES; i++) {
    char socket[100];

    snprintf (socket, sizeof socket, "%s/%s", bench->dir, names[i]);
    peers[i] = peer_start (&(struct peer_params){
        .socket = socket, .size = BENCH_SIZE, .seed = i + 1 });
  }
  for (;;) {
    assert (write (control, &word, 1) == 1);
    if (read (control, &word, 1) != 1)
      _exit (0);
    for (uint32_t i = 0; i < BENCH_REMOTES; i++)
      obey (bench, peers[i], i, (enum servers_word)word);
  }
}

static void
start_servers (struct bench *bench)
{
  int pair[2];
  char done;

  assert (socketpair (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
  bench->servers = fork ();
  assert (bench->servers >= 0);
  if (bench->servers == 0) {
    prctl (PR_SET_PDEATHSIG, SIGKILL);
    close (pair[0]);
    run_servers (bench, pair[1]);
  }
  close (pair[1]);
  bench->control = pair[0];
  assert (read (bench->control, &done, 1) == 1);
}

void
bench_servers (struct bench *bench, enum servers_word word)
{
  char byte = (char)word;

  assert (write (bench->control, &byte, 1) == 1);
  do /* what a killed child has not read is there still */
    assert (read (bench->control, &byte, 1) == 1);
  while (byte != (char)word);
}

void
bench_make (struct bench *bench)
{
  const char *base = access ("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
  int fd;

  memset (bench, 0, sizeof *bench);
  snprintf (bench->dir, sizeof bench->dir, "%s/nbdm-inter-XXXXXX", base);
  assert (mkdtemp (bench->dir));
  snprintf (bench->local, sizeof bench->local, "%s/local", bench->dir);
  snprintf (bench->state, sizeof bench->state, "%s/state", bench->dir);
  fd = open (bench->local, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  assert (fd >= 0 && ftruncate (fd, BENCH_SIZE) == 0);
  close (fd);
  assert (mkdir (bench->state, 0700) == 0);
  bench->dirfd = open (bench->state, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  assert (bench->dirfd >= 0);
  bench->board = share (sizeof *bench->board);
  bench->image = share (BENCH_REMOTES * sizeof bench->image[0]);
  for (uint32_t i = 0; i < BENCH_REMOTES; i++)
    snprintf (bench->uri[i], sizeof bench->uri[i], "nbd+unix:///?socket=%s/%s",
              bench->dir, names[i]);
  start_servers (bench);
  make_params (bench);
  assert (passed (in_child (NULL, create, bench)));
}

void
bench_remove (struct bench *bench)
{
  char command[128];

  close (bench->control); /* ends the servers */
  waitpid (bench->servers, NULL, 0);
  close (bench->dirfd);
  munmap (bench->board, sizeof *bench->board);
  munmap (bench->image, BENCH_REMOTES * sizeof bench->image[0]);
  snprintf (command, sizeof command, "rm -rf %s", bench->dir);
  assert (system (command) == 0);
}

/* --- what lies there ---------------------------------------------------- */

static void
each_file (struct bench *bench,
           void (*act) (struct bench *, const char *name, struct left *),
           struct left *left)
{
  int fd = openat (bench->dirfd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  DIR *dir = fdopendir (fd);
  struct dirent *entry;

  assert (dir);
  while ((entry = readdir (dir)))
    if (entry->d_name[0] != '.')
      act (bench, entry->d_name, left);
  closedir (dir);
}

static void
take_file (struct bench *bench, const char *name, struct left *left)
{
  struct left_file *file = &left->file[left->nr_files++];
  struct stat st;
  int fd = openat (bench->dirfd, name, O_RDONLY | O_CLOEXEC);

  assert (left->nr_files <= BENCH_FILES && fd >= 0 && fstat (fd, &st) == 0);
  snprintf (file->name, sizeof file->name, "%s", name);
  file->size = (size_t)st.st_size;
  file->bytes = malloc (file->size + 1);
  assert (file->bytes && full_pread (fd, file->bytes, file->size, 0) == 0);
  close (fd);
}

static void
remove_file (struct bench *bench, const char *name, struct left *left)
{
  (void)left;
  assert (unlinkat (bench->dirfd, name, 0) == 0);
}

void
bench_take (struct bench *bench, struct left *left)
{
  int fd = open (bench->local, O_RDONLY | O_CLOEXEC);

  left->nr_files = 0;
  each_file (bench, take_file, left);
  assert (fd >= 0 && full_pread (fd, left->disk[0], BENCH_SIZE, 0) == 0);
  close (fd);
  bench_servers (bench, SERVERS_TAKE);
  memcpy (left->disk[1], bench->image, BENCH_REMOTES * BENCH_SIZE);
  left->board = *bench->board;
}

void
bench_put (struct bench *bench, const struct left *left)
{
  int fd = open (bench->local, O_RDWR | O_CLOEXEC);

  each_file (bench, remove_file, NULL);
  assert (fd >= 0 && full_pwrite (fd, left->disk[0], BENCH_SIZE, 0) == 0);
  close (fd);
  for (unsigned i = 0; i < left->nr_files; i++) {
    fd = openat (bench->dirfd, left->file[i].name,
                 O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    assert (fd >= 0);
    assert (full_pwrite (fd, left->file[i].bytes, left->file[i].size, 0) == 0);
    close (fd);
  }
  memcpy (bench->image, left->disk[1], BENCH_REMOTES * BENCH_SIZE);
  bench_servers (bench, SERVERS_PUT);
  *bench->board = left->board;
}

void
bench_free (struct left *left)
{
  for (unsigned i = 0; i < left->nr_files; i++)
    free (left->file[i].bytes);
}

void
bench_session (const char *fault, void (*body) (void *))
{
  assert (passed (in_child (fault, body, NULL)));
}

bool
left_in_takeover (const struct left *left)
{
  struct disk_superblock slot[2];

  for (unsigned i = 0; i < left->nr_files; i++)
    if (strcmp (left->file[i].name, "superblock") == 0) {
      assert (left->file[i].size == sizeof slot);
      memcpy (slot, left->file[i].bytes, sizeof slot);
      return le32toh (
                 slot[le64toh (slot[1].sequence) > le64toh (slot[0].sequence)]
                     .flags)
             & SUPERBLOCK_UNDECIDED;
    }
  return false;
}

/* In both slots, where they lie: no store is made, nothing moves on. */
void
bench_reboot (const struct bench *bench)
{
  struct disk_superblock slot[2];
  int fd = openat (bench->dirfd, "superblock", O_RDWR | O_CLOEXEC);

  assert (fd >= 0 && full_pread (fd, slot, sizeof slot, 0) == 0);
  for (unsigned i = 0; i < 2; i++) {
    memset (slot[i].boot_id, 0, sizeof slot[i].boot_id);
    slot[i].crc = 0;
    slot[i].crc = htole32 (crc32c (0, &slot[i], sizeof slot[i]));
  }
  assert (full_pwrite (fd, slot, sizeof slot, 0) == 0);
  close (fd);
}

/* --- in a child --------------------------------------------------------- */

int
bench_open (struct bench *bench)
{
  struct found *found = &bench->board->found;
  struct nbdm_disk_status local;
  struct nbdm_status status;

  memset (found, 0, sizeof *found);
  found->rc = nbdm_open (&bench->params, &bench->volume);
  if (found->rc < 0) {
    snprintf (found->reason, sizeof found->reason, "%s", nbdm_last_error ());
    return found->rc;
  }
  nbdm_get_status (bench->volume, &status);
  assert (nbdm_get_disk_status (bench->volume, NBDM_LOCAL, &local) == 0);
  found->local_state = local.state;
  found->local_dirty = local.dirty_regions;
  snprintf (found->reason, sizeof found->reason, "%s", status.reason);
  for (uint32_t i = 0; i < bench->params.nr_remotes; i++) {
    struct nbdm_disk_status remote;

    assert (nbdm_get_disk_status (bench->volume, i + 1, &remote) == 0);
    found->dirty[i] = remote.dirty_regions;
    /* The map, as the status leaves out what was lost and is copied at once. */
    found->late[i] = bench->volume->remotes[i].disk.dm.map[MAP_LATE].nr_set;
  }
  assert (nbdm_start (bench->volume) == 0);
  return 0;
}

void
bench_must (int rc)
{
  if (rc < 0)
    _exit (3);
}

void
bench_connect (struct bench *bench, uint32_t remote)
{
  bench_must (nbdm_remote_connect (bench->volume, remote + 1,
                                   bench->uri[remote], 10000));
  bench_must (nbdm_disk_admit (bench->volume, remote + 1));
}

void
bench_connect_all (struct bench *bench)
{
  for (uint32_t i = 0; i < bench->params.nr_remotes; i++)
    bench_connect (bench, i);
}

void
bench_wait_outstanding (struct bench *bench, const atomic_bool *over)
{
  time_t until = time (NULL) + OUTSTANDING_S;
  struct nbdm_disk_status s = { 0 };

  for (uint32_t i = 0; i < BENCH_REMOTES; i++, s.remote.outstanding = 0)
    while (s.remote.outstanding == 0 && !atomic_load (over)) {
      assert (time (NULL) < until);
      assert (nbdm_get_disk_status (bench->volume, i + 1, &s) == 0);
      poll (NULL, 0, 1);
    }
}

void
bench_stop (struct bench *bench)
{
  assert (nbdm_stop (bench->volume) == 0);
  nbdm_close (bench->volume);
}

void
bench_write (struct bench *bench, unsigned first, unsigned count, uint8_t value)
{
  uint8_t buf[512];

  memset (buf, value, sizeof buf);
  for (unsigned i = first; i < first + count; i++) {
    bench->board->pending[i] = value;
    bench_must (
        nbdm_pwrite (bench->volume, buf, sizeof buf, i * BENCH_REGION, 0));
    bench->board->answered[i] = value;
    bench->board->pending[i] = 0;
  }
}

static bool
allowed (const struct bench *bench, unsigned region, uint8_t value)
{
  struct board *board = bench->board;

  if (bench->both_may_have_lost
      || (board->pending[region] && value == board->pending[region]))
    board->answered[region] = value; /* it counts once it was seen */
  else if (value != board->answered[region])
    return false;
  board->pending[region] = 0;
  return true;
}

void
bench_check_reads (struct bench *bench)
{
  struct board *board = bench->board;

  for (unsigned i = 0; i < BENCH_REGIONS; i++) {
    uint8_t buf[512];
    int rc = nbdm_pread (bench->volume, buf, sizeof buf, i * BENCH_REGION);

    if (rc == -EIO && bench->local_went_away)
      continue;
    if (rc < 0 || !allowed (bench, i, buf[0])) {
      fprintf (stderr, "region %u: read %d, value %u, answered %u; %s\n", i, rc,
               buf[0], board->answered[i], board->found.reason);
      _exit (1);
    }
  }
}

static bool
is_mended (struct bench *bench)
{
  struct nbdm_disk_status local;
  struct nbdm_status status;
  bool well;

  nbdm_get_status (bench->volume, &status);
  assert (nbdm_get_disk_status (bench->volume, NBDM_LOCAL, &local) == 0);
  well = local.state == NBDM_LOCAL_OK && !status.failed;
  for (uint32_t i = 0; i < BENCH_REMOTES; i++) {
    struct nbdm_disk_status remote;

    assert (nbdm_get_disk_status (bench->volume, i + 1, &remote) == 0);
    well = well && remote.state == NBDM_IN_SYNC && remote.dirty_regions == 0;
  }
  return well;
}

void
bench_mend (struct bench *bench)
{
  for (unsigned round = 0; !is_mended (bench); round++) {
    struct nbdm_resync batch = { .max_bytes = 1u << 20, .pace.depth = 4 };

    if (round == MEND_ROUNDS) {
      fprintf (stderr, "it does not come to be in sync; %s\n",
               bench->board->found.reason);
      _exit (1);
    }
    if (nbdm_local_attach (bench->volume, bench->local, 0) == 0)
      assert (nbdm_disk_admit (bench->volume, NBDM_LOCAL) == 0);
    (void)nbdm_disk_resync (bench->volume, NBDM_LOCAL, &batch);
    for (uint32_t i = 0; i < BENCH_REMOTES; i++) {
      batch.first_region = 0;
      nbdm_remote_release_late (bench->volume, i + 1);
      (void)nbdm_disk_resync (bench->volume, i + 1, &batch);
    }
  }
  bench_check_reads (bench);
  if (nbdm_stop (bench->volume) < 0) {
    fprintf (stderr, "stop: %s\n", nbdm_last_error ());
    _exit (1);
  }
  nbdm_close (bench->volume);
}

void
bench_open_and_mend (struct bench *bench)
{
  assert (bench_open (bench) == 0);
  bench_connect_all (bench);
  bench_check_reads (bench);
  bench_mend (bench);
}

/* --- in the parent ------------------------------------------------------ */

void
bench_check_disks (struct bench *bench)
{
  static uint8_t local[BENCH_SIZE];
  int fd = open (bench->local, O_RDONLY | O_CLOEXEC);

  assert (fd >= 0 && full_pread (fd, local, BENCH_SIZE, 0) == 0);
  close (fd);
  for (unsigned i = 0; i < BENCH_REGIONS; i++)
    if (!allowed (bench, i, local[i * BENCH_REGION])) {
      fprintf (stderr, "local holds %u in region %u, answered %u\n",
               local[i * BENCH_REGION], i, bench->board->answered[i]);
      abort ();
    }
  bench_servers (bench, SERVERS_TAKE);
  for (uint32_t i = 0; i < BENCH_REMOTES; i++)
    for (unsigned j = 0; j < BENCH_REGIONS; j++) {
      const uint8_t *has = &bench->image[i][j * BENCH_REGION];

      if (memcmp (&local[j * BENCH_REGION], has, BENCH_REGION) == 0)
        continue;
      fprintf (stderr, "in sync, and %s holds %u in region %u, local %u\n",
               names[i], *has, j, local[j * BENCH_REGION]);
      abort ();
    }
}
