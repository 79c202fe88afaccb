/* SPDX-License-Identifier: BSD-3-Clause */

/* The kernel drops pages of the local disk that it could not write, and reports
 * that to one flush alone.  This test does so at random, among requests and
 * other faults of the disks: no write that a flush covered is lost, and disks
 * that are in sync are equal.
 *
 * One thread sends all requests, one after the other, so that the test knows at
 * each instant what each region may hold.  Another one connects the remotes and
 * copies to them, as the policy threads do.  So a seed repeats the requests and
 * the faults, and not their timing.
 *
 *   NBDM_LIVES_S=600 build/test_dropped_pages                for so long
 *   NBDM_TEST_SEED=N build/test_dropped_pages verbose        one life, told
 */

#define _GNU_SOURCE
#include "api.h"
#include "base/lock.h"
#include "schedules.h"

#include <inttypes.h>
#include <time.h>

#define EXTENT (4u << 20)
#define NR 8u          /* regions in use */
#define PART 9u        /* of a sector: the byte that is written alone */
#define MAX_VALUES 64u /* of a cell */
#define STEPS 150u
/* Under policy stop a flush waits for a resync, at most twice this time and the
 * hold.
 */
#define DEADLINE_MS 400u
#define MEND_ROUNDS 200u

/* A value that is written as a whole: a sector without one byte, or that byte.
 */
struct cell {
  uint8_t
      value[MAX_VALUES]; /* the first one is durable, later ones came after */
  unsigned nr, last;     /* the last that was answered; later ones got EIO */
  bool crashed;          /* it may hold any of these, until it is read */
};

static struct cell cells[NR][2];
static uint8_t flushed[NR][SECTOR];      /* of local: what its medium holds */
static bool pending_error;               /* the next flush of local tells */
static bool dropped;                     /* pages, since a flush was answered */
static unsigned fail_writes, fail_reads; /* of local, so many */
static uint64_t dice;
static uint8_t next_value;
static unsigned last_dropped; /* region */
static atomic_bool keeping;   /* the remotes are connected again */
static bool verbose;
static unsigned nr_takeovers, nr_failed, nr_refused, nr_drops;

#define SAY(...)                                                               \
  do                                                                           \
    if (verbose)                                                               \
      fprintf (stderr, __VA_ARGS__);                                           \
  while (0)

static uint64_t
at (unsigned i)
{
  return i % 2 * (uint64_t)EXTENT + (i / 2 + 1) * (uint64_t)REGION;
}

static unsigned
roll (unsigned sides)
{
  return (unsigned)(peer_random (&dice) >> 33) % sides;
}

/* --- the kernel ----------------------------------------------------------- */

static bool
is_local (int fd)
{
  struct stat st, local;

  return site.local[0] && !peer_thread && fstat (fd, &st) == 0
         && stat (site.local, &local) == 0 && st.st_ino == local.st_ino
         && st.st_dev == local.st_dev;
}

static void
note_flushed (void)
{
  for (unsigned i = 0; i < NR; i++)
    memcpy (flushed[i], site.image + at (i), SECTOR);
}

int __real_fdatasync (int fd);
int __wrap_fdatasync (int fd);

int
__wrap_fdatasync (int fd)
{
  int rc = 0;

  if (!is_local (fd))
    return __real_fdatasync (fd);
  if (pending_error) {
    SAY ("   local: the flush fails\n");
    errno = EIO;
    rc = -1;
  }
  pending_error = false;
  note_flushed ();
  return rc;
}

ssize_t __real_pwrite (int fd, const void *buf, size_t count, off_t offset);
ssize_t __wrap_pwrite (int fd, const void *buf, size_t count, off_t offset);
ssize_t __real_pread (int fd, void *buf, size_t count, off_t offset);
ssize_t __wrap_pread (int fd, void *buf, size_t count, off_t offset);

ssize_t
__wrap_pwrite (int fd, const void *buf, size_t count, off_t offset)
{
  if (fail_writes == 0 || !is_local (fd))
    return __real_pwrite (fd, buf, count, offset);
  fail_writes--;
  SAY ("   local: a write fails\n");
  errno = EIO;
  return -1;
}

ssize_t
__wrap_pread (int fd, void *buf, size_t count, off_t offset)
{
  if (fail_reads == 0 || !is_local (fd))
    return __real_pread (fd, buf, count, offset);
  fail_reads--;
  SAY ("   local: a read fails\n");
  errno = EIO;
  return -1;
}

/* Not if the volume would only fail, which tells nothing. */
static bool
has_successor (void)
{
  bool has = false;

  for (uint32_t r = 0; r < site.nr_peers; r++)
    has = has || site_status (&site, r).state == NBDM_IN_SYNC;
  return has;
}

static void
drop_pages (void)
{
  int fd = open (site.local, O_RDWR | O_CLOEXEC);
  bool any = false;

  assert (fd >= 0);
  for (unsigned i = 0; i < NR; i++)
    if (roll (2) && memcmp (flushed[i], site.image + at (i), SECTOR) != 0) {
      SAY ("   local: region %u is dropped: %u %u\n", i, flushed[i][0],
           flushed[i][PART]);
      assert (__real_pwrite (fd, flushed[i], SECTOR, (off_t)at (i)) == SECTOR);
      any = true;
      last_dropped = i;
    }
  close (fd);
  nr_drops += any;
  pending_error = pending_error || any;
  dropped = dropped || any;
}

/* --- what is known -------------------------------------------------------- */

static void
written (struct cell *c, uint8_t value, bool answered)
{
  assert (c->nr < MAX_VALUES);
  c->value[c->nr++] = value;
  if (!answered)
    return;
  c->last = c->nr - 1;
  c->crashed = false;
}

/* It holds what was answered last, or what came after. */
static void
forget_older (struct cell *c)
{
  if (c->crashed)
    return;
  c->nr -= c->last;
  memmove (c->value, c->value + c->last, c->nr);
  c->last = 0;
}

static void
crash (void)
{
  SAY ("   (anything since the last flush may be lost)\n");
  for (unsigned i = 0; i < 2 * NR; i++)
    cells[i / 2][i % 2].crashed = true;
  dropped = false;
}

static void
condemn (unsigned i, unsigned part, uint8_t found)
{
  const struct cell *c = &cells[i][part];

  fprintf (stderr, "region %u, %s: %u; crashed %d, last %u of", i,
           part ? "part" : "rest", found, c->crashed, c->last);
  for (unsigned n = 0; n < c->nr; n++)
    fprintf (stderr, " %u", c->value[n]);
  fprintf (stderr, "\n");
  abort ();
}

static void
judge (unsigned i, unsigned part, uint8_t found)
{
  struct cell *c = &cells[i][part];
  bool any = c->crashed || dropped;
  unsigned n = any ? 0 : c->last;

  while (n < c->nr && c->value[n] != found)
    n++;
  if (n == c->nr)
    condemn (i, part, found);
  if (dropped)
    return;    /* another disk may hold another value */
  c->last = n; /* it counts once it was seen */
  if (c->crashed)
    c->nr = n + 1;
  c->crashed = false;
}

/* --- requests ------------------------------------------------------------- */

static bool
has_failed (void)
{
  return volume_status ().failed;
}

static void
write_sector (unsigned i, bool fua)
{
  uint8_t buf[SECTOR], value = ++next_value;
  int rc;

  memset (buf, value, sizeof buf);
  rc = nbdm_pwrite (site.volume, buf, sizeof buf, at (i), fua ? NBDM_FUA : 0);
  SAY ("write%s %u: %u: %d\n", fua ? " fua" : "", i, value, rc);
  assert (rc == 0 || rc == -EIO);
  written (&cells[i][0], value, rc == 0);
  written (&cells[i][1], value, rc == 0);
  if (rc == 0 && fua && !dropped) {
    forget_older (&cells[i][0]);
    forget_older (&cells[i][1]);
  }
}

static void
write_part (unsigned i)
{
  uint8_t value = ++next_value;
  int rc = nbdm_pwrite (site.volume, &value, 1, at (i) + PART, 0);

  SAY ("write part %u: %u: %d\n", i, value, rc);
  assert (rc == 0 || rc == -EIO);
  written (&cells[i][1], value, rc == 0);
}

static int
read_sector (unsigned i)
{
  uint8_t buf[SECTOR];
  int rc = nbdm_pread (site.volume, buf, sizeof buf, at (i));

  SAY ("read %u: %d: %u %u\n", i, rc, buf[0], buf[PART]);
  if (rc < 0)
    return rc;
  judge (i, 0, buf[0]);
  judge (i, 1, buf[PART]);
  for (unsigned n = 0; n < SECTOR; n++)
    assert (n == PART || buf[n] == buf[0]);
  return 0;
}

static void
do_the_flush (void)
{
  int rc = nbdm_flush (site.volume);

  SAY ("flush: %d\n", rc);
  if (rc < 0)
    return;
  dropped = false;
  for (unsigned i = 0; i < 2 * NR; i++)
    forget_older (&cells[i / 2][i % 2]);
}

/* --- the disks ------------------------------------------------------------ */

static bool
is_admitted (uint32_t r)
{
  LOCK_FOR_SCOPE (&site.volume->lock);
  return site.volume->remotes[r].admitted;
}

/* It is the right disk, so it does not differ. */
static bool
matches (uint32_t r)
{
  bool same = true;

  for (unsigned i = 0; i < NR && same; i++) {
    int rc = nbdm_remote_compare (site.volume, r + 1, at (i) / REGION);

    if (rc == 1) {
      fprintf (stderr, "remote %u differs in region %u\n", r, i);
      abort ();
    }
    same = rc != -ENOTCONN;
  }
  return same;
}

static void
join (uint32_t r)
{
  int rc;

  if (is_admitted (r) || has_failed ())
    return;
  rc = connect_at (r, r);
  if (rc == 0 && matches (r))
    rc = nbdm_disk_admit (site.volume, r + 1);
  SAY ("connect %u: %d, state %u\n", r, rc, site_status (&site, r).state);
}

static void
resync (uint32_t r, uint64_t bytes)
{
  struct nbdm_resync batch = { .max_bytes = bytes, .pace.copy_bytes = REGION };
  int rc;

  nbdm_remote_release_late (site.volume, r + 1);
  rc = nbdm_disk_resync (site.volume, r + 1, &batch);
  SAY ("resync %u: %d, state %u\n", r, rc, site_status (&site, r).state);
}

static pthread_t keeper;
/* No remote is connected while another one's connections are cut. */
static pthread_mutex_t cutting = PTHREAD_MUTEX_INITIALIZER;

/* As the policy threads do, at any moment. */
static void *
keep (void *opaque)
{
  while (keeping) {
    pthread_mutex_lock (&cutting);
    for (uint32_t r = 0; r < site.nr_peers; r++) {
      join (r);
      if (site_status (&site, r).state == NBDM_RESYNCING)
        resync (r, SIZE);
    }
    pthread_mutex_unlock (&cutting);
    poll (NULL, 0, 10);
  }
  return opaque;
}

static void
cut (uint32_t r, bool cache_too)
{
  LOCK_FOR_SCOPE (&cutting);
  if (cache_too)
    peer_lose_power (site.peers[r], PEER_LOSE_ALL);
  else
    peer_cut (site.peers[r], false);
  SAY ("cut %u%s\n", r, cache_too ? ", and its cache is lost" : "");
}

static void
bring_local_back (void)
{
  int rc = nbdm_local_attach (site.volume, site.local, 0);

  if (rc == 0)
    rc = nbdm_disk_admit (site.volume, NBDM_LOCAL);
  SAY ("resume local: %d\n", rc);
}

static void
copy_back (uint64_t bytes)
{
  struct nbdm_resync batch = { .max_bytes = bytes, .pace.copy_bytes = REGION };
  int rc = nbdm_disk_resync (site.volume, NBDM_LOCAL, &batch);

  SAY ("copy back: %d, state %u\n", rc, local_status ().state);
}

static void
wait_for_end_of_hold (uint32_t r)
{
  WAIT_FOR (site_status (&site, r).state != NBDM_HOLDING);
}

static void
start_keeping (void)
{
  if (keeping)
    return;
  keeping = true;
  assert (pthread_create (&keeper, NULL, keep, NULL) == 0);
}

static void
stop_keeping (void)
{
  if (!keeping)
    return;
  keeping = false;
  pthread_join (keeper, NULL);
}

static void
reopen (bool stop)
{
  int rc;

  stop_keeping ();
  rc = stop ? nbdm_stop (site.volume) : -1;
  if (rc < 0 && (dropped || has_failed ()))
    crash ();
  if (rc == 0) {
    dropped = false;
    for (unsigned i = 0; i < 2 * NR; i++)
      forget_older (&cells[i / 2][i % 2]);
  }
  nbdm_close (site.volume);
  SAY ("%s: %d\n", stop ? "stop" : "kill", rc);
  while ((rc = nbdm_open (&site.params, &site.volume)) < 0) {
    SAY ("open: %d %s\n", rc, nbdm_last_error ());
    assert (rc == -EIO);
    nr_refused++;
  }
  assert (nbdm_start (site.volume) == 0);
  if (roll (4))
    start_keeping ();
  SAY ("open: local %u, missing %" PRIu64 "\n", local_status ().state,
       local_status ().dirty_regions);
}

/* --- steps -----------------------------------------------------------------
 */

static void
step_disks (unsigned what, uint32_t r)
{
  switch (what) {
  case 0:
    cut (r, false);
    break;
  case 1:
    cut (r, true);
    break;
  case 2:
    if (roll (4))
      break;
    stop_keeping ();
    wait_for_end_of_hold (r);
    break;
  case 3:
  case 4:
    join (r);
    break;
  case 5:
    start_keeping ();
    break;
  case 6:
  case 7:
    resync (r, roll (2) ? REGION : SIZE);
    break;
  case 8:
    bring_local_back ();
    break;
  case 9:
    copy_back (roll (2) ? REGION : SIZE);
    break;
  case 10:
    fail_writes = roll (4) == 0;
    break;
  case 11:
    fail_reads = 1 + roll (3);
    (void)read_sector (roll (NR)); /* which may make local miss the region */
    fail_reads = 0;
    break;
  case 12:
    if (has_successor ())
      drop_pages ();
    cut (r, false);
    break;
  default:
    if (has_successor ())
      drop_pages ();
  }
}

static void
step (void)
{
  unsigned what = roll (100), i = roll (NR);

  if (has_failed ()) {
    nr_failed++;
    crash ();
    reopen (roll (2));
  }
  if (local_status ().state == NBDM_LOCAL_FAILED)
    dropped = false; /* no page of it counts any more */
  if (dropped && roll (2))
    write_part (last_dropped);
  else if (what < 25)
    write_sector (i, roll (6) == 0);
  else if (what < 35)
    write_part (i);
  else if (what < 45)
    (void)read_sector (i);
  else if (what < 52)
    do_the_flush ();
  else if (what < 57)
    (void)nbdm_cool (site.volume, 0);
  else if (what < 59)
    reopen (roll (3) == 0);
  else if (what < 61)
    (void)nbdm_set_policy (site.volume, roll (8) ? NBDM_DEGRADE : NBDM_STOP, 0);
  else
    step_disks (roll (15), roll (site.nr_peers));
}

static bool
is_mended (void)
{
  bool well = local_status ().state == NBDM_LOCAL_OK && !has_failed ();

  for (uint32_t r = 0; r < site.nr_peers; r++)
    well = well && site_status (&site, r).state == NBDM_IN_SYNC;
  return well;
}

static void
mend (void)
{
  stop_keeping ();
  fail_writes = fail_reads = 0;
  for (unsigned round = 0; !is_mended (); round++) {
    assert (round < MEND_ROUNDS);
    if (has_failed ()) {
      crash ();
      reopen (false);
    }
    (void)nbdm_set_policy (site.volume, NBDM_DEGRADE, 0);
    for (uint32_t r = 0; r < site.nr_peers; r++)
      join (r);
    if (local_status ().state == NBDM_LOCAL_FAILED)
      bring_local_back ();
    copy_back (SIZE);
    for (uint32_t r = 0; r < site.nr_peers; r++)
      resync (r, SIZE);
  }
}

static void
run_life (uint64_t seed)
{
  dice = seed | 1;
  memset (cells, 0, sizeof cells);
  for (unsigned i = 0; i < 2 * NR; i++)
    cells[i / 2][i % 2].nr = 1;
  memset (flushed, 0, sizeof flushed);
  pending_error = dropped = false;
  next_value = 0;
  make_volume (SIZE, REGION, 1 + roll (2), 150);
  for (uint32_t r = 0; r < site.nr_peers; r++)
    site.params.remotes[r].deadline_ms = DEADLINE_MS;
  open_volume ();
  note_flushed ();
  start_keeping ();
  for (unsigned i = 0; i < STEPS; i++) {
    unsigned before = local_status ().state;

    step ();
    nr_takeovers += local_status ().state == NBDM_LOCAL_FAILED
                    && before != NBDM_LOCAL_FAILED;
  }
  mend ();
  do_the_flush ();
  mend ();
  stop_keeping ();
  for (unsigned i = 0; i < NR; i++)
    assert (read_sector (i) == 0);
  assert (nbdm_stop (site.volume) == 0);
  for (uint32_t r = 0; r < site.nr_peers; r++)
    assert (memcmp (site.image, peer_image (site.peers[r]), SIZE) == 0);
  site_end (&site);
  memset (&site, 0, sizeof site);
}

int
main (int argc, char *argv[])
{
  uint64_t seed = site_seed ((uint64_t)time (NULL));
  const char *budget = getenv ("NBDM_LIVES_S");
  time_t until = time (NULL) + (budget ? atoi (budget) : 15);
  unsigned lives = 0;

  verbose = argc > 1;
  (void)argv;
  do {
    alarm (100); /* nothing here may hang */
    if (!verbose && lives > 0)
      seed = seed * UINT64_C (6364136223846793005) + 1;
    printf ("life %#" PRIx64 "\n", seed);
    fflush (stdout);
    run_life (seed);
    lives++;
  } while (!verbose && time (NULL) < until);
  printf ("%u lives: %u drops, %u takeovers, %u failed, %u starts refused\n",
          lives, nr_drops, nr_takeovers, nr_failed, nr_refused);
  return 0;
}
