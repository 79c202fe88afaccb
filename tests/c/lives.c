/* SPDX-License-Identifier: BSD-3-Clause */

/* See lives.h. */

#include "api.h"
#include "lives.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

static void
end_life (struct bench *bench, bool stop)
{
  if (!stop)
    bench_write (bench, 20, 1, 99); /* the fault kills it */
  bench_must (nbdm_stop (bench->volume));
  nbdm_close (bench->volume);
}

static void
drop (struct bench *bench, uint32_t disk)
{
  nbdm_disk_drop (bench->volume, disk, "the test dropped it");
}

static void
begin_life (struct bench *bench)
{
  bench_must (bench_open (bench));
  bench_connect_all (bench);
  bench_write (bench, 0, 6, 1);
  bench_must (nbdm_flush (bench->volume));
}

static void
well (struct bench *bench, bool stop)
{
  begin_life (bench);
  bench_write (bench, 3, 8, 2);
  end_life (bench, stop);
}

static void
behind (struct bench *bench, bool stop)
{
  begin_life (bench);
  drop (bench, 2);
  bench_write (bench, 3, 8, 2);
  end_life (bench, stop);
}

/* The seventh write fails on local, and b misses the next ones. */
static void
lose_local (struct bench *bench)
{
  begin_life (bench);
  bench_write (bench, 6, 1, 2);
  drop (bench, 2);
  bench_write (bench, 4, 3, 3);
}

/* Then a misses some. */
static void
local_failed (struct bench *bench, bool stop)
{
  lose_local (bench);
  bench_connect (bench, 1);
  drop (bench, 1);
  bench_write (bench, 8, 4, 4);
  end_life (bench, stop);
}

/* Some of local is copied back, and only a has the rest; b is behind.  Then a
 * is lost too, and only local gets a write.
 */
static void
local_resyncing (struct bench *bench, bool stop)
{
  struct nbdm_resync batch
      = { .max_bytes = 5 * BENCH_REGION, .pace.copy_bytes = BENCH_REGION };

  lose_local (bench);
  bench_must (nbdm_local_attach (bench->volume, bench->local, 0));
  bench_must (nbdm_disk_admit (bench->volume, NBDM_LOCAL));
  bench_must (nbdm_disk_resync (bench->volume, NBDM_LOCAL, &batch));
  bench_write (bench, 6, 2, 5);
  drop (bench, 1);
  bench_write (bench, 1, 2, 6);
  if (!stop) /* else regions that only a has cannot be written */
    bench_connect (bench, 0);
  end_life (bench, stop);
}

static atomic_bool write_over;

static void *
write_that_fails (void *opaque)
{
  struct bench *bench = opaque;
  uint8_t buf[512];

  memset (buf, 3, sizeof buf);
  bench->board->pending[8] = 3;
  nbdm_pwrite (bench->volume, buf, sizeof buf, 8 * BENCH_REGION, 0);
  write_over = true;
  return NULL;
}

/* The twelfth write fails on local, and both remotes lose their caches before
 * they are flushed; then one is back.
 */
static void
takeover_lost (struct bench *bench, bool stop)
{
  pthread_t thread;

  begin_life (bench);
  bench_write (bench, 4, 5, 2);
  bench_servers (bench, SERVERS_HOLD);
  assert (pthread_create (&thread, NULL, write_that_fails, bench) == 0);
  bench_wait_outstanding (bench, &write_over);
  bench_servers (bench, SERVERS_LOSE_CACHE);
  pthread_join (thread, NULL);
  bench_connect_all (bench);
  drop (bench, 2);
  bench_write (bench, 10, 2, 4);
  end_life (bench, stop);
}

/* An operator gives commands while a remote is lost and copied to. */
static void
operated (struct bench *bench, bool stop)
{
  struct nbdm_resync batch = { .max_bytes = 1u << 20, .pace.depth = 4 };

  begin_life (bench);
  bench_must (nbdm_remote_pause (bench->volume, 2, 1));
  drop (bench, 2);
  bench_write (bench, 3, 4, 2);
  bench_connect (bench, 1);
  bench_must (nbdm_remote_invalidate (bench->volume, 1));
  bench_must (nbdm_remote_pause (bench->volume, 2, 0));
  bench_must (nbdm_disk_resync (bench->volume, 2, &batch));
  bench_must (nbdm_set_policy (bench->volume, NBDM_STOP, 0));
  bench_must (nbdm_set_policy (bench->volume, NBDM_DEGRADE, 0));
  bench_must (nbdm_remote_fail (bench->volume, 1, "another disk"));
  bench_must (nbdm_cool (bench->volume, 0));
  bench_write (bench, 5, 4, 3);
  bench_must (nbdm_remote_reset (bench->volume, 1));
  end_life (bench, stop);
}

const struct life lives[NR_LIVES] = {
  { "well", well, NULL, true, false },
  { "a remote behind", behind, NULL, true, false },
  { "operated", operated, NULL, true, false },
  { "local failed", local_failed, "local_write:7=error", false, false },
  { "local resyncing", local_resyncing, "local_write:7=error", false, false },
  { "takeover lost", takeover_lost, "local_write:12=error", true, true },
};
