/* SPDX-License-Identifier: BSD-3-Clause */

/* State directories as the engine itself leaves them, kept in memory: so that
 * a test garbles one, opens it and puts the next in its place thousands of
 * times a second, and compares what is dirty with what the intact one says.
 *
 * They are made by real sessions in child processes, with one remote in sync
 * (nbdkit) and one away.  What a file is called does not matter here: all that
 * hold a format are taken, and of each dirty.* the maps are compared.
 */

#ifndef NBDM_IMAGES_H
#define NBDM_IMAGES_H

#include <dirent.h>
#include <endian.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <time.h>

#include "api.h"
#include "base/crc32c.h"
#include "base/error.h"
#include "base/file.h"
#include "logs/bitmap.h"
#include "logs/layout.h"
#include "volume/volume.h"
#include "listening.h"
#include "test.h"

#define REGION 65536u
#define EXTENT (4u << 20)
#define VOLUME_SIZE (UINT64_C (6) * EXTENT + 3 * 512u)
#define NR_REGIONS ((uint32_t)((VOLUME_SIZE - 1) / REGION + 1))
#define MAP_BYTES ((NR_REGIONS + 7) / 8)
#define MAX_FILES 8
#define DEADLINE_S 60

struct state_file {
  char name[80];
  size_t size;
  uint8_t *bytes;
};

struct image {
  bool failed; /* the file that says so */
  unsigned nr;
  struct state_file file[MAX_FILES];
};

struct verdict {
  int rc;
  char words[400]; /* why refused, or what recovery found */
  unsigned nr;
  struct {
    char name[80];
    uint8_t dirty[MAP_BYTES], late[MAP_BYTES];
  } map[MAX_FILES];
};

struct place {
  char dir[64];
  int fd; /* of the state directory */
  pid_t server;
  struct nbdm_params params;
};

static TEST_UNUSED const char *
place_path (const struct place *place, const char *name)
{
  static char buf[6][128];
  static unsigned turn;
  char *path = buf[turn++ % 6];

  snprintf (path, sizeof buf[0], "%s/%s", place->dir, name);
  return path;
}

static TEST_UNUSED void
place_disk (const struct place *place, const char *name)
{
  int fd = open (place_path (place, name), O_RDWR | O_CREAT, 0600);

  assert (fd >= 0 && ftruncate (fd, (off_t)VOLUME_SIZE) == 0);
  close (fd);
}

static TEST_UNUSED void
create_volume (void *opaque)
{
  const struct place *place = opaque;

  assert (nbdm_create (&place->params, 0) == 0);
}

/* In memory, where nothing waits for a disk. */
static TEST_UNUSED void
place_make (struct place *place)
{
  struct nbdm_params *params = &place->params;

  const char *tmp = getenv ("TMPDIR");

  if (tmp == NULL)
    tmp = access ("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
  snprintf (place->dir, sizeof place->dir, "%.40s/nbdm-image-XXXXXX", tmp);
  assert (mkdtemp (place->dir));
  place_disk (place, "local");
  place_disk (place, "remote");
  assert (mkdir (place_path (place, "state"), 0700) == 0);
  place->fd = open (place_path (place, "state"), O_RDONLY | O_DIRECTORY);
  assert (place->fd >= 0);
  *params = (struct nbdm_params){
    .name = "test",
    .local = strdup (place_path (place, "local")),
    .state_dir = strdup (place_path (place, "state")),
    .region_size = REGION,
    .policy = NBDM_DEGRADE,
    .nr_remotes = 2,
    .remotes = { { .name = "near", .deadline_ms = 20000, .assume_in_sync = 1 },
                 { .name = "far", .deadline_ms = 20000, .assume_in_sync = 1 } }
  };
  assert (passed (in_child (NULL, create_volume, place)));
}

static TEST_UNUSED void
place_remove (struct place *place)
{
  char command[128];

  close (place->fd);
  snprintf (command, sizeof command, "rm -rf %s", place->dir);
  assert (system (command) == 0);
  free ((char *)place->params.local);
  free ((char *)place->params.state_dir);
}

/* --- sessions, each in a child --------------------------------------- */

static TEST_UNUSED void
place_serve (struct place *place)
{
  time_t until = time (NULL) + DEADLINE_S;
  const char *sock = place_path (place, "sock");

  unlink (sock);
  place->server = fork ();
  assert (place->server >= 0);
  if (place->server == 0) {
    prctl (PR_SET_PDEATHSIG, SIGKILL);
    execlp ("nbdkit", "nbdkit", "-f", "-U", sock, "file",
            place_path (place, "remote"), (char *)NULL);
    _exit (127);
  }
  while (!unix_listens (sock)) {
    assert (time (NULL) < until);
    poll (NULL, 0, 5);
  }
}

static TEST_UNUSED void
place_serve_no_more (struct place *place)
{
  kill (place->server, SIGKILL);
  waitpid (place->server, NULL, 0);
}

/* The first remote gets into sync, the second is away. */
static TEST_UNUSED struct nbdm *
place_start (const struct place *place)
{
  struct nbdm_disk_status s;
  struct nbdm *v;
  char uri[200];

  snprintf (uri, sizeof uri, "nbd+unix:///?socket=%s",
            place_path (place, "sock"));
  assert (nbdm_open (&place->params, &v) == 0);
  assert (nbdm_start (v) == 0);
  assert (nbdm_remote_connect (v, 1, uri, DEADLINE_S * 1000) == 0);
  assert (nbdm_disk_admit (v, 1) == 0);
  assert (nbdm_get_disk_status (v, 1, &s) == 0);
  assert (s.state == NBDM_IN_SYNC);
  return v;
}

static TEST_UNUSED int
write_region (struct nbdm *v, uint64_t offset)
{
  uint8_t buf[512];

  memset (buf, (int)(offset / REGION) + 1, sizeof buf);
  return nbdm_pwrite (v, buf, sizeof buf, offset, 0);
}

/* Ends in a clean stop: the files of an earlier session. */
static TEST_UNUSED void
session_before (void *opaque)
{
  struct nbdm *v = place_start (opaque);

  for (uint64_t extent = 0; extent < 2; extent++)
    assert (write_region (v, extent * EXTENT + 3 * REGION) == 0);
  assert (nbdm_flush (v) == 0);
  assert (nbdm_stop (v) == 0);
  _exit (0); /* nbdkit is not ours to wait for */
}

/* Flushed and unflushed writes in four extents. */
#define NR_WRITES 8
static TEST_UNUSED struct nbdm *
session_writes (const struct place *place)
{
  struct nbdm_disk_status s;
  struct nbdm *v = place_start (place);

  for (uint64_t n = 0; n < NR_WRITES; n++) {
    assert (write_region (v, n % 4 * EXTENT + (n + 5) * REGION) == 0);
    if (n == 2)
      assert (nbdm_flush (v) == 0);
  }
  assert (nbdm_get_disk_status (v, 1, &s) == 0);
  assert (s.remote.unflushed_regions > 0);
  assert (nbdm_get_disk_status (v, 2, &s) == 0);
  assert (s.dirty_regions >= NR_WRITES);
  return v;
}

static TEST_UNUSED void
session_stopped (void *opaque)
{
  assert (nbdm_stop (session_writes (opaque)) == 0);
  _exit (0);
}

/* Every thread of it has stopped: a signal's sender goes on before that. */
static TEST_UNUSED void
freeze (pid_t pid)
{
  time_t until = time (NULL) + DEADLINE_S;
  char command[160];

  /* The state is what follows the name in brackets. */
  snprintf (command, sizeof command,
            "! sed 's/.*) //' /proc/%d/task/*/stat | grep -qv '^T'", (int)pid);
  assert (kill (pid, SIGSTOP) == 0);
  while (system (command) != 0)
    assert (time (NULL) < until);
}

/* Killed in a write that its remote never sees. */
static TEST_UNUSED void
session_killed (void *opaque)
{
  struct nbdm *v = session_writes (opaque);

  freeze (((struct place *)opaque)->server);
  write_region (v, 4 * EXTENT);
  abort (); /* the fault is to end it in this write, or long before */
}

static TEST_UNUSED void
session_failed (void *opaque)
{
  struct nbdm *v = session_writes (opaque);
  struct nbdm_status s;

  assert (write_region (v, 4 * EXTENT) == -EIO);
  nbdm_get_status (v, &s);
  assert (s.failed);
  _exit (0);
}

/* --- the files ------------------------------------------------------- */

static TEST_UNUSED bool
is_map (const char *name)
{
  return strncmp (name, "dirty.", 6) == 0;
}

static TEST_UNUSED bool
is_state_file (const char *name)
{
  if (strchr (name, '~')) /* a leftover */
    return false;
  return is_map (name) || strcmp (name, "superblock") == 0
         || strcmp (name, "activity") == 0 || strcmp (name, "inflight") == 0;
}

static TEST_UNUSED void
image_take (const struct place *place, struct image *image)
{
  DIR *dir = opendir (place_path (place, "state"));
  struct dirent *entry;

  image->nr = 0;
  assert (dir);
  while ((entry = readdir (dir))) {
    struct state_file *file = &image->file[image->nr];
    struct stat st;
    int fd;

    if (!is_state_file (entry->d_name))
      continue;
    assert (image->nr++ < MAX_FILES);
    snprintf (file->name, sizeof file->name, "%.79s", entry->d_name);
    fd = openat (place->fd, entry->d_name, O_RDONLY);
    assert (fd >= 0 && fstat (fd, &st) == 0);
    file->size = (size_t)st.st_size;
    file->bytes = malloc (file->size);
    assert (file->bytes);
    assert (full_pread (fd, file->bytes, file->size, 0) == 0);
    close (fd);
  }
  closedir (dir);
  assert (image->nr >= 5);
  image->failed = faccessat (place->fd, "failed", F_OK, 0) == 0;
}

static TEST_UNUSED void
image_free (struct image *image)
{
  for (unsigned i = 0; i < image->nr; i++)
    free (image->file[i].bytes);
  image->nr = 0;
}

static TEST_UNUSED const struct state_file *
image_file (const struct image *image, const char *name)
{
  for (unsigned i = 0; i < image->nr; i++)
    if (strcmp (image->file[i].name, name) == 0)
      return &image->file[i];
  abort ();
}

static TEST_UNUSED void
put_file (const struct place *place, const char *name, const void *bytes,
          size_t size)
{
  int fd = openat (place->fd, name, O_RDWR | O_CREAT, 0600);

  assert (fd >= 0 && full_pwrite (fd, bytes, size, 0) == 0);
  assert (ftruncate (fd, (off_t)size) == 0);
  close (fd);
}

static TEST_UNUSED void
image_put (const struct place *place, const struct image *image)
{
  for (unsigned i = 0; i < image->nr; i++)
    put_file (place, image->file[i].name, image->file[i].bytes,
              image->file[i].size);
  if (image->failed)
    put_file (place, "failed", "", 0);
  else
    unlinkat (place->fd, "failed", 0);
}

/* Both slots: a boot before this one wrote them. */
static TEST_UNUSED void
image_reboot (struct image *image)
{
  uint8_t *bytes = image_file (image, "superblock")->bytes;

  for (unsigned slot = 0; slot < 2; slot++) {
    struct disk_superblock *sb = (void *)(bytes + (size_t)slot * LAYOUT_PAGE);
    sb->boot_id[0] ^= 1;
    sb->crc = 0;
    sb->crc = htole32 (crc32c (0, sb, sizeof *sb));
  }
}

/* --- what a start makes of them -------------------------------------- */

static TEST_UNUSED void
read_maps (const struct place *place, const struct image *image,
           struct verdict *verdict)
{
  verdict->nr = 0;
  for (unsigned i = 0; i < image->nr; i++) {
    const char *name = image->file[i].name;
    uint64_t step = bitmap_bytes (NR_REGIONS);
    int fd;

    if (!is_map (name))
      continue;
    fd = openat (place->fd, name, O_RDONLY);
    assert (fd >= 0);
    snprintf (verdict->map[verdict->nr].name, sizeof verdict->map[0].name, "%s",
              name);
    assert (full_pread (fd, verdict->map[verdict->nr].dirty, MAP_BYTES,
                        LAYOUT_PAGE + MAP_DIRTY * step)
            == 0);
    assert (full_pread (fd, verdict->map[verdict->nr].late, MAP_BYTES,
                        LAYOUT_PAGE + MAP_LATE * step)
            == 0);
    close (fd);
    verdict->nr++;
  }
}

/* Open what is there and close it again, as if killed.  `image` says which
 * maps there have to be.
 */
static TEST_UNUSED void
judge (const struct place *place, const struct image *image,
       struct verdict *verdict)
{
  struct nbdm_status s;
  struct nbdm *v;

  verdict->nr = 0;
  verdict->rc = nbdm_open (&place->params, &v);
  if (verdict->rc < 0) {
    snprintf (verdict->words, sizeof verdict->words, "%s", last_error ());
    return;
  }
  nbdm_get_status (v, &s);
  snprintf (verdict->words, sizeof verdict->words, "%s", s.reason);
  read_maps (place, image, verdict);
  nbdm_close (v);
}

static TEST_UNUSED bool
bit_of (const uint8_t *bits, uint32_t region)
{
  return bits[region / 8] >> region % 8 & 1;
}

#endif /* NBDM_IMAGES_H */
