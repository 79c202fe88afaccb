/* SPDX-License-Identifier: BSD-3-Clause */

/* Requests of any bytes, to remotes that take whole sectors: a write beside
 * another one in the same sector is neither lost nor undone, on any disk.
 *
 * Each thread owns the bytes of every fourth stripe. The stripes are no whole
 * sectors and share them with other threads' stripes, so each thread knows what
 * it must read there.
 */

#define _GNU_SOURCE

#include "api.h"
#include "site.h"

#include <poll.h>
#include <stdatomic.h>

#define REGION 4096u
#define SECTOR 512u
#define SIZE (64u * REGION)
#define STRIPE 100u
#define WRITERS 4u
#define STRIPES (SIZE / STRIPE / WRITERS) /* of a writer */
#define REQUESTS 1500u                    /* of a writer */
#define LONGEST (5u * SECTOR)

static struct site site;
static uint8_t model[SIZE];
static atomic_bool bad_reads, bad_writes; /* of the local disk */
static atomic_uint writing;

ssize_t __real_pread (int fd, void *buf, size_t count, off_t offset);
ssize_t __real_pwrite (int fd, const void *buf, size_t count, off_t offset);

static bool
is_local (int fd)
{
  return site.volume && fd == site.volume->local.file.fd;
}

ssize_t
__wrap_pread (int fd, void *buf, size_t count, off_t offset)
{
  if (!bad_reads || !is_local (fd))
    return __real_pread (fd, buf, count, offset);
  errno = EIO;
  return -1;
}

ssize_t
__wrap_pwrite (int fd, const void *buf, size_t count, off_t offset)
{
  if (!bad_writes || !is_local (fd))
    return __real_pwrite (fd, buf, count, offset);
  errno = EIO;
  return -1;
}

/* Assert whole sectors, as a server with a block size of 512 bytes requires. */
static void
assert_sectors (void *opaque, const struct peer_command *cmd)
{
  (void)opaque;
  assert (cmd->offset % SECTOR == 0 && cmd->length % SECTOR == 0);
}

static void
bring_up (uint32_t nr_peers)
{
  alarm (150);
  site = (struct site){ .size = SIZE,
                        .region_size = REGION,
                        .hold_ms = 400,
                        .nr_peers = nr_peers,
                        .peer = { .shuffle = true, .applied = assert_sectors },
                        .seed = site_seed (1) };
  site_make (&site);
  site_open (&site);
  for (uint32_t i = 0; i < nr_peers; i++) {
    site_connect (&site, i);
    site_resync_to_end (&site, i);
  }
  memset (model, 0, sizeof model);
}

static void
assert_equal (void)
{
  assert (memcmp (site.image, model, SIZE) == 0);
  for (uint32_t i = 0; i < site.nr_peers; i++)
    assert (memcmp (peer_image (site.peers[i]), model, SIZE) == 0);
}

static void
take_down (void)
{
  for (uint32_t i = 0; i < site.nr_peers; i++)
    site_resync_to_end (&site, i);
  assert (nbdm_stop (site.volume) == 0);
  assert_equal ();
  site_end (&site);
}

/* --- many writers -----------------------------------------------------------
 */

static void
write_bytes (uint64_t r, uint32_t at, uint32_t length)
{
  static _Thread_local uint8_t found[STRIPE];
  int rc;

  if (r >> 32 & 7) {
    memset (model + at, (int)(r >> 40), length);
    rc = nbdm_pwrite (site.volume, model + at, length, at,
                      r >> 35 & 7 ? 0 : NBDM_FUA);
  }
  else {
    memset (model + at, 0, length);
    rc = r >> 35 & 1 ? nbdm_trim (site.volume, length, at, 0)
                     : nbdm_zero (site.volume, length, at, NBDM_MAY_TRIM);
  }
  assert (rc == 0);
  assert (nbdm_pread (site.volume, found, length, at) == 0);
  assert (memcmp (found, model + at, length) == 0);
}

static void *
writer (void *opaque)
{
  uint32_t me = (uint32_t)(uintptr_t)opaque;
  uint64_t random = site.seed + 99 * (me + 1);

  for (unsigned i = 0; i < REQUESTS; i++) {
    uint64_t r = peer_random (&random);
    uint32_t stripe = (uint32_t)(r % STRIPES) * WRITERS + me;
    uint32_t in = (uint32_t)(r >> 16) % STRIPE;

    write_bytes (r, stripe * STRIPE + in,
                 (uint32_t)(r >> 24) % (STRIPE - in) + 1);
  }
  writing--;
  return NULL;
}

static void
test_neighbours (void)
{
  pthread_t threads[WRITERS];
  unsigned turn = 0;

  bring_up (2);
  writing = WRITERS;
  for (uintptr_t i = 0; i < WRITERS; i++)
    assert (pthread_create (&threads[i], NULL, writer, (void *)i) == 0);
  for (; writing > 0; turn++) {
    peer_cut (site.peers[turn % 2], false);
    site_connect (&site, turn % 2);
    site_resync_to_end (&site, turn % 2);
    poll (NULL, 0, 20); /* both remotes get requests between two cuts */
  }
  for (unsigned i = 0; i < WRITERS; i++)
    pthread_join (threads[i], NULL);
  take_down ();
}

/* --- one, with every border --------------------------------------------------
 */

static void
test_borders (void)
{
  static uint8_t found[LONGEST];
  uint8_t value = 0;

  bring_up (1);
  for (uint32_t length = 1; length <= LONGEST; length += length < 4 ? 1 : 127)
    for (uint32_t at = SECTOR - 2; at <= SECTOR + 2; at++) {
      memset (model + at, ++value, length);
      assert (nbdm_pwrite (site.volume, model + at, length, at, 0) == 0);
      assert (nbdm_pread (site.volume, found, length, at) == 0);
      assert (memcmp (found, model + at, length) == 0);
      assert (nbdm_pread (site.volume, found, 1, at - 1) == 0);
      assert (found[0] == model[at - 1]);
    }
  model[SIZE - 1] = 9;
  assert (nbdm_pwrite (site.volume, model + SIZE - 1, 1, SIZE - 1, 0) == 0);
  assert (nbdm_pread (site.volume, found, 1, SIZE) == -EINVAL);
  assert (nbdm_pwrite (site.volume, model, 2, SIZE - 1, 0) == -EINVAL);
  assert (nbdm_zero (site.volume, 2, SIZE - 1, 0) == -EINVAL);
  take_down ();
}

/* --- a local disk that fails -------------------------------------------------
 */

/* The neighbours of the bytes cannot be read: they come from a remote, or
 * nothing is written.
 */
static void
test_unreadable (void)
{
  uint8_t byte = 7;

  bring_up (1);
  bad_reads = true;
  model[1000] = byte;
  assert (nbdm_pwrite (site.volume, &byte, 1, 1000, 0) == 0);
  bad_reads = false;
  assert_equal ();
  peer_cut (site.peers[0], false);
  site_wait_state (&site, 0, NBDM_OUT_OF_SYNC);
  bad_reads = true;
  assert (nbdm_pwrite (site.volume, &byte, 1, 3 * REGION, 0) == -EIO);
  assert (nbdm_zero (site.volume, 600, REGION + 1, 0) == -EIO);
  bad_reads = false;
  site_connect (&site, 0);
  take_down ();
}

/* The remote has taken local's place: it is read and written in sectors. */
static void
test_local_failed (void)
{
  struct nbdm_disk_status status;
  uint8_t found[700];

  bring_up (1);
  memset (model + 2 * REGION, 5, SECTOR);
  bad_writes = true;
  assert (nbdm_pwrite (site.volume, model + 2 * REGION, SECTOR, 2 * REGION, 0)
          == 0);
  assert (nbdm_get_disk_status (site.volume, NBDM_LOCAL, &status) == 0);
  assert (status.state == NBDM_LOCAL_FAILED);
  for (uint32_t i = 0; i < 20; i++) {
    uint32_t at = REGION + 300 * i;

    memset (model + at, (int)(100 + i), sizeof found);
    assert (nbdm_pwrite (site.volume, model + at, sizeof found, at, 0) == 0);
    assert (nbdm_pread (site.volume, found, sizeof found, at) == 0);
    assert (memcmp (found, model + at, sizeof found) == 0);
  }
  assert (nbdm_stop (site.volume) == 0);
  bad_writes = false;
  assert (memcmp (peer_image (site.peers[0]), model, SIZE) == 0);
  site_end (&site);
}

int
main (void)
{
  RUN (test_neighbours);
  RUN (test_borders);
  RUN (test_unreadable);
  RUN (test_local_failed);
  return 0;
}
