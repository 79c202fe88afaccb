/* SPDX-License-Identifier: BSD-3-Clause */

/* The executor without NBD: the test is a second door, whose clients are arrays
 * of requests. Each io ends once, with the right bytes, and `done` runs on the
 * thread that was promised, whatever the remotes and other lanes do.
 */

#define _GNU_SOURCE

#include <sys/eventfd.h>

#include "executor/lane.h"
#include "wire/mailbox.h"
#include "site.h"

#define REGION 65536u
#define SIZE (16u * REGION)
#define BLOCK 4096u
#define DEPTH 48u /* of a lane under load: more than LANE_BATCH */
#define ROUNDS 60u
#define LANES 3u

static struct site site;
static struct executor executor, lonely;

/* One thread's requests.  Its descriptor is what a client's socket is. */
struct door {
  struct lane lane;
  int fd;
  pthread_t thread;
  uint64_t dice;
  struct ask {
    struct io io;
    struct door *door;
    uint8_t buf[2 * REGION];
    atomic_uint done;
    struct io_end end; /* without the extents */
    char words[160];   /* its */
    uint64_t data;     /* bytes, of the first extent */
    bool same_thread;
  } asks[DEPTH];
};

static struct door door, doors[LANES];

/* --- a door --------------------------------------------------------------- */

static void
done (struct io *io, const struct io_end *end)
{
  struct ask *ask = (struct ask *)((char *)io - offsetof (struct ask, io));
  struct door *d = ask->door;

  ask->end = *end;
  snprintf (ask->words, sizeof ask->words, "%s", end->words ? end->words : "");
  ask->same_thread = pthread_equal (pthread_self (), d->thread);
  if (end->nr_extents > 0 && end->extents[0].type == NBDM_EXTENT_DATA)
    ask->data = end->extents[0].length;
  mailbox_ring (d->lane.watch.box);
  atomic_fetch_add (&ask->done, 1);
  mailbox_ring_all ();
}

static void
door_make (struct door *d)
{
  assert (lane_init (&d->lane) == 0);
  d->lane.executor = &executor;
  d->fd = eventfd (0, EFD_CLOEXEC | EFD_NONBLOCK);
  assert (d->fd >= 0);
  for (unsigned i = 0; i < DEPTH; i++)
    d->asks[i].door = d;
}

static void
door_enter (struct door *d)
{
  d->thread = pthread_self ();
  lane_enter (&d->lane);
}

static void
door_free (struct door *d)
{
  lane_destroy (&d->lane);
  close (d->fd);
}

static struct ask *
submit (struct door *d, unsigned i, enum io_kind kind, uint32_t flags,
        uint64_t offset, uint64_t length)
{
  struct ask *ask = &d->asks[i];

  atomic_store (&ask->done, 0);
  ask->data = 0;
  ask->io.kind = kind;
  ask->io.flags = flags;
  ask->io.offset = offset;
  ask->io.length = length;
  ask->io.buf = ask->buf;
  ask->io.max_extents = EXECUTOR_EXTENTS;
  ask->io.done = done;
  lane_submit (&d->lane, &ask->io);
  return ask;
}

/* Until the first `nr` of them are done. */
static void
wait_done (struct door *d, unsigned nr)
{
  struct pollfd own = { .fd = d->fd, .events = POLLIN };

  lane_push (&d->lane);
  for (unsigned i = 0; i < nr; i++)
    while (atomic_load (&d->asks[i].done) == 0) {
      assert (lane_poll (&d->lane, &own, SITE_DEADLINE_S * 1000) > 0);
      lane_take (&d->lane);
      mailbox_ring_all ();
    }
  for (unsigned i = 0; i < nr; i++)
    assert (atomic_load (&d->asks[i].done) == 1);
}

static struct ask *
carry_out (enum io_kind kind, uint32_t flags, uint64_t offset, uint64_t length)
{
  struct ask *ask = submit (&door, 0, kind, flags, offset, length);

  wait_done (&door, 1);
  assert (ask->same_thread == (ask->end.by == IO_BY_LANE));
  assert (ask->end.rc == 0 && ask->end.words == NULL);
  return ask;
}

static void
write_block (uint64_t offset, uint32_t length, uint32_t flags, uint8_t stamp,
             enum io_ender by)
{
  memset (door.asks[0].buf, stamp, length);
  assert (carry_out (IO_WRITE, flags, offset, length)->end.by == by);
}

static void
assert_reads (uint64_t offset, uint32_t length, uint8_t stamp)
{
  struct ask *ask;

  memset (door.asks[0].buf, ~stamp, length);
  ask = carry_out (IO_READ, 0, offset, length);
  for (uint32_t i = 0; i < length; i++)
    assert (ask->buf[i] == stamp);
}

/* --- a thread whose creation takes long, and fails -------------------- */

static struct pool *const last = &lonely.pools[WRITERS];
static atomic_bool no_threads;
static atomic_uint refused, nr_naps;

/* Whether the pool's worker has checked if it is to end. */
static bool
has_decided (void)
{
  bool decided;

  pthread_mutex_lock (&lonely.lock);
  decided = atomic_load (&nr_naps) > 1 || last->nr_workers == 1;
  pthread_mutex_unlock (&lonely.lock);
  return decided;
}

int __real_pthread_create (pthread_t *thread, const pthread_attr_t *attr,
                           void *(*start) (void *), void *opaque);
int __wrap_pthread_create (pthread_t *thread, const pthread_attr_t *attr,
                           void *(*start) (void *), void *opaque);
int
__wrap_pthread_create (pthread_t *thread, const pthread_attr_t *attr,
                       void *(*start) (void *), void *opaque)
{
  if (!no_threads || opaque != last)
    return __real_pthread_create (thread, attr, start, opaque);
  if (refused++ == 0) {
    peer_hold (site.peers[0], PEER_GO);
    while (!has_decided ())
      poll (NULL, 0, 1);
  }
  return EAGAIN;
}

bool __real_wait_until (pthread_cond_t *cond, pthread_mutex_t *lock,
                        uint64_t until_ns);
bool __wrap_wait_until (pthread_cond_t *cond, pthread_mutex_t *lock,
                        uint64_t until_ns);
bool
__wrap_wait_until (pthread_cond_t *cond, pthread_mutex_t *lock,
                   uint64_t until_ns)
{
  if (no_threads && cond == &last->work && nr_naps++ == 0)
    return false;
  return __real_wait_until (cond, lock, until_ns);
}

static bool
is_idle (void)
{
  bool idle;

  pthread_mutex_lock (&lonely.lock);
  idle = last->nr_idle == 1;
  pthread_mutex_unlock (&lonely.lock);
  return idle;
}

/* --- tests ---------------------------------------------------------------- */

/* While a thread is being made, the only worker finishes all ios and is idle
 * for long.  Then the thread cannot be made, and no later one either: the
 * worker must still exist for the next io.
 */
static void
test_one_worker_stays (void)
{
  executor_init (&lonely, site.volume);
  assert (executor_start (&lonely) == 0);
  while (!is_idle ())
    poll (NULL, 0, 1);
  door.lane.executor = &lonely;
  peer_hold (site.peers[0], PEER_HOLD_ANSWERS);
  no_threads = true;
  (void)submit (&door, 0, IO_WRITE, NBDM_FUA, 0, BLOCK);
  (void)submit (&door, 1, IO_WRITE, NBDM_FUA, REGION, BLOCK);
  wait_done (&door, 2);
  assert (refused == 1 && nr_naps > 0);
  (void)submit (&door, 0, IO_WRITE, NBDM_FUA, 0, BLOCK);
  wait_done (&door, 1);
  no_threads = false;
  door.lane.executor = &executor;
  executor_end (&lonely);
  executor_destroy (&lonely);
}

/* Small and quick on the lane, all else by a worker. */
static void
test_every_kind (void)
{
  struct ask *ask;

  write_block (0, BLOCK, 0, 1, IO_BY_WORKER); /* the extent becomes hot */
  write_block (BLOCK, BLOCK, 0, 2, IO_BY_LANE);
  write_block (2 * BLOCK, BLOCK, NBDM_FUA, 3, IO_BY_WORKER);
  write_block (REGION, 2 * REGION, 0, 4, IO_BY_WORKER);
  for (unsigned i = 0; i < 3; i++)
    assert_reads (i * BLOCK, BLOCK, (uint8_t)(1 + i));
  assert (door.asks[0].end.by == IO_BY_LANE);
  assert_reads (REGION, 2 * REGION, 4);
  assert (door.asks[0].end.by == IO_BY_WORKER);
  (void)carry_out (IO_CACHE, 0, 0, REGION);
  ask = carry_out (IO_EXTENTS, 0, REGION, 2 * REGION);
  assert (ask->end.nr_extents == 1 && ask->data == 2 * REGION);
  (void)carry_out (IO_TRIM, 0, REGION, REGION);
  (void)carry_out (IO_ZERO, NBDM_FUA, 2 * REGION, REGION);
  assert_reads (REGION, 2 * REGION, 0);
  assert (carry_out (IO_FLUSH, 0, 0, 0)->end.by == IO_BY_FLUSHER);
}

/* The log gives the reason, and only for errors. */
static void
test_error (void)
{
  struct ask *ask = submit (&door, 0, IO_WRITE, 0, SIZE, BLOCK);

  wait_done (&door, 1);
  assert (ask->end.rc == -EINVAL && strstr (ask->words, "outside"));
}

/* A write waits for its remote on the lane and delays no read; the lane still
 * polls the door's own descriptor, and a time-out ends a wait.
 */
static void
test_wait (void)
{
  struct pollfd own = { .fd = door.fd, .events = POLLIN };
  struct ask *ask;

  peer_hold (site.peers[0], PEER_HOLD_ANSWERS);
  memset (door.asks[1].buf, 5, BLOCK);
  ask = submit (&door, 1, IO_WRITE, 0, 4 * BLOCK, BLOCK);
  lane_push (&door.lane);
  assert_reads (BLOCK, BLOCK, 2);
  while (lane_poll (&door.lane, &own, 20) > 0)
    lane_take (&door.lane);
  assert (atomic_load (&ask->done) == 0);
  eventfd_write (door.fd, 1);
  assert (lane_poll (&door.lane, &own, -1) == 1 && own.revents == POLLIN);
  assert (eventfd_read (door.fd, &(eventfd_t){ 0 }) == 0);
  peer_hold (site.peers[0], PEER_GO);
  wait_done (&door, 2);
  assert (ask->end.by == IO_BY_LANE && ask->end.rc == 0);
  assert (ask->same_thread);
  assert_reads (4 * BLOCK, BLOCK, 5);
}

/* What was begun, and then lost its remote, is completed by a worker; and so is
 * another write of the same range, which waited for it.
 */
static void
test_lost_half_way (void)
{
  peer_hold (site.peers[0], PEER_HOLD_ANSWERS);
  memset (door.asks[0].buf, 6, BLOCK);
  memset (door.asks[1].buf, 7, BLOCK);
  (void)submit (&door, 0, IO_WRITE, 0, 5 * BLOCK, BLOCK);
  lane_push (&door.lane);
  (void)submit (&door, 1, IO_WRITE, 0, 5 * BLOCK, BLOCK);
  peer_cut (site.peers[0], false);
  peer_hold (site.peers[0], PEER_GO);
  wait_done (&door, 2);
  for (unsigned i = 0; i < 2; i++)
    assert (door.asks[i].end.by == IO_BY_WORKER && door.asks[i].end.rc == 0);
  assert_reads (5 * BLOCK, BLOCK, 7);
  site_wait_state (&site, 0, NBDM_OUT_OF_SYNC);
  write_block (6 * BLOCK, BLOCK, 0, 8, IO_BY_LANE); /* no leg to wait for */
  site_connect (&site, 0);
  site_resync_to_end (&site, 0);
}

/* Flushes that come while one is under way share the next. */
static void
test_flushes_share (void)
{
  struct nbdm_status before, after;

  nbdm_get_status (site.volume, &before);
  peer_slow_flushes (site.peers[0], 50, 0);
  write_block (0, BLOCK, 0, 9, IO_BY_LANE);
  for (unsigned i = 0; i < DEPTH; i++)
    (void)submit (&door, i, IO_FLUSH, 0, 0, 0);
  wait_done (&door, DEPTH);
  peer_slow_flushes (site.peers[0], 0, 0);
  nbdm_get_status (site.volume, &after);
  for (unsigned i = 0; i < DEPTH; i++)
    assert (door.asks[i].end.by == IO_BY_FLUSHER && door.asks[i].end.rc == 0);
  assert (after.flushes - before.flushes < DEPTH / 2);
}

/* Batches of every kind, of which many fall on the same ranges. */
static void *
load (void *opaque)
{
  static const enum io_kind kinds[]
      = { IO_WRITE, IO_WRITE, IO_WRITE, IO_WRITE,   IO_READ,
          IO_READ,  IO_ZERO,  IO_FLUSH, IO_EXTENTS, IO_CACHE };
  struct door *d = opaque;

  door_enter (d);
  for (unsigned round = 0; round < ROUNDS; round++) {
    unsigned nr = 1 + (unsigned)(peer_random (&d->dice) % DEPTH);

    for (unsigned i = 0; i < nr; i++) {
      uint64_t dice = peer_random (&d->dice);
      enum io_kind kind = kinds[dice % (sizeof kinds / sizeof *kinds)];
      uint32_t length = dice >> 8 & 7 ? BLOCK : 2 * REGION;
      uint64_t offset = (dice >> 16) % ((SIZE - length) / BLOCK) * BLOCK;

      memset (d->asks[i].buf, (int)(dice >> 40), length);
      if (kind == IO_FLUSH)
        (void)submit (d, i, kind, 0, 0, 0);
      else
        (void)submit (d, i, kind, kind == IO_ZERO ? NBDM_MAY_TRIM : 0, offset,
                      length);
    }
    wait_done (d, nr);
    for (unsigned i = 0; i < nr; i++)
      assert (d->asks[i].end.rc == 0);
  }
  lane_leave (&d->lane);
  return NULL;
}

/* Several lanes of one executor, while the remote comes and goes. */
static void
test_load (void)
{
  for (unsigned i = 0; i < LANES; i++) {
    door_make (&doors[i]);
    doors[i].dice = site.seed + i;
    assert (pthread_create (&doors[i].thread, NULL, load, &doors[i]) == 0);
  }
  for (unsigned i = 0; i < 4; i++) {
    poll (NULL, 0, 20);
    peer_cut (site.peers[0], false);
    site_connect (&site, 0);
    site_resync_to_end (&site, 0);
  }
  for (unsigned i = 0; i < LANES; i++) {
    pthread_join (doors[i].thread, NULL);
    door_free (&doors[i]);
  }
}

/* A volume that stops refuses, and that is no line of the log. */
static void
test_stopping (void)
{
  struct ask *ask;

  site_resync_to_end (&site, 0);
  assert (nbdm_stop (site.volume) == 0);
  assert (memcmp (site.image, peer_image (site.peers[0]), SIZE) == 0);
  ask = submit (&door, 0, IO_WRITE, 0, 0, BLOCK);
  wait_done (&door, 1);
  assert (ask->end.rc == -ESHUTDOWN && ask->end.words == NULL);
}

int
main (void)
{
  alarm (150); /* nothing here may hang */
  site = (struct site){ .size = SIZE,
                        .region_size = REGION,
                        .hold_ms = 200,
                        .nr_peers = 1,
                        .seed = site_seed (1) };
  site_make (&site);
  site_open (&site);
  site_connect (&site, 0);
  site_resync_to_end (&site, 0);
  executor_init (&executor, site.volume);
  assert (executor_start (&executor) == 0);
  door_make (&door);
  door_enter (&door);

  RUN (test_every_kind);
  RUN (test_error);
  RUN (test_wait);
  RUN (test_lost_half_way);
  RUN (test_flushes_share);
  RUN (test_load);
  RUN (test_one_worker_stays);
  RUN (test_stopping);

  lane_leave (&door.lane);
  door_free (&door);
  executor_end (&executor);
  executor_destroy (&executor);
  site_end (&site);
  return 0;
}
