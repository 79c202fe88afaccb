/* SPDX-License-Identifier: BSD-3-Clause */

/* A session in which local fails and that is killed before a remote has taken
 * its place, for the tests of what the next sessions find.
 */

#ifndef NBDM_KILLED_TAKEOVER_H
#define NBDM_KILLED_TAKEOVER_H

#include "api.h"
#include "interrupted.h"

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

#define CHILD_S 60 /* nothing here may hang */
#define FIRST 3u   /* regions that are written last */
#define NR 4u
#define LAST 8u /* one whose write fails */

static struct bench bench;

/* In the first local has a write that no remote has durably; in the others
 * local is not to be believed.
 */
enum failure { WRITE, FLUSH, CLIENTS_FLUSH, BESIDE_ITS_LEG, READ };
enum loss { KEPT, LOST_BEFORE, LOST_AFTER };

struct takeover {
  const char *name;
  enum failure failure;
  enum loss loss; /* of the remotes' caches, seen from the kill */
  const char *fault;
};

static atomic_bool over;

static void *
fail (void *opaque)
{
  const struct takeover *takeover = opaque;
  uint8_t buf[512];

  if (takeover->failure == READ)
    nbdm_pread (bench.volume, buf, sizeof buf, FIRST * BENCH_REGION);
  else if (takeover->failure == CLIENTS_FLUSH)
    nbdm_flush (bench.volume);
  else {
    /* With FUA only its own bytes are made durable on the remotes. */
    memset (buf, 3, sizeof buf);
    bench.board->pending[LAST] = 3;
    nbdm_pwrite (bench.volume, buf, sizeof buf, LAST * BENCH_REGION,
                 takeover->failure == WRITE ? 0 : NBDM_FUA);
  }
  over = true;
  return NULL;
}

static TEST_UNUSED void
live (void *opaque)
{
  const struct takeover *takeover = opaque;
  pthread_t thread;

  alarm (CHILD_S);
  bench_must (bench_open (&bench));
  bench_connect_all (&bench);
  bench_write (&bench, 0, 6, 1);
  bench_must (nbdm_flush (bench.volume));
  bench_write (&bench, FIRST, NR, 2); /* answered, and nowhere flushed */
  if (takeover->loss == LOST_BEFORE || takeover->failure == CLIENTS_FLUSH)
    bench_servers (&bench, SERVERS_HOLD);
  if (takeover->failure == BESIDE_ITS_LEG)
    bench_servers (&bench, SERVERS_HOLD_ALL);
  assert (pthread_create (&thread, NULL, fail, (void *)takeover) == 0);
  if (takeover->loss == LOST_BEFORE) { /* over the takeover's flush */
    bench_wait_outstanding (&bench, &over);
    bench_servers (&bench, SERVERS_LOSE_CACHE);
  }
  pthread_join (thread, NULL);
}

/* It has lost what it could not flush, or cannot read. */
static TEST_UNUSED void
spoil_local (unsigned nr)
{
  int fd = open (bench.local, O_WRONLY | O_CLOEXEC);
  uint8_t old[512];

  memset (old, 1, sizeof old);
  assert (fd >= 0);
  for (unsigned i = FIRST; i < FIRST + nr; i++)
    assert (pwrite (fd, old, sizeof old, i * BENCH_REGION) == sizeof old);
  close (fd);
}

static TEST_UNUSED bool
every_remote_is_held (void)
{
  struct nbdm_disk_status s = { .state = NBDM_HOLDING };

  for (uint32_t i = 0; i < BENCH_REMOTES && s.state == NBDM_HOLDING; i++)
    assert (nbdm_get_disk_status (bench.volume, i + 1, &s) == 0);
  return s.state == NBDM_HOLDING;
}

static TEST_UNUSED bool
every_remote_is_lost (void)
{
  bool lost = true;

  pthread_mutex_lock (&bench.volume->lock);
  for (uint32_t i = 0; i < BENCH_REMOTES; i++)
    lost = lost && bench.volume->remotes[i].conn == NULL;
  pthread_mutex_unlock (&bench.volume->lock);
  return lost;
}

#endif /* NBDM_KILLED_TAKEOVER_H */
