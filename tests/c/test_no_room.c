/* SPDX-License-Identifier: BSD-3-Clause */

/* A start after a kill makes no new file: the state directory may have no room
 * for one.
 */

#define _GNU_SOURCE
#include "api.h"
#include "interrupted.h"
#include "no_room.h"

#define CHILD_S 60 /* nothing here may hang */

static struct bench bench;

static void
live (void *opaque)
{
  (void)opaque;
  alarm (CHILD_S);
  bench_must (bench_open (&bench));
  bench_connect_all (&bench);
  bench_write (&bench, 0, 6, 1);
  bench_must (nbdm_flush (bench.volume));
  bench_write (&bench, 3, 4, 2); /* the first of them fails on local */
  bench_must (nbdm_flush (bench.volume));
}

static void
start_without_room (void *opaque)
{
  (void)opaque;
  alarm (CHILD_S);
  no_room = true;
  bench_open_and_mend (&bench);
}

/* Local fails, and the kill comes at each sync of a map: also where local's map
 * has marks, and the superblock does not know of them yet.
 */
static void
test_kill_at_each_sync_of_a_map (void)
{
  unsigned n = 1;

  for (bool was_killed = true; was_killed; n++) {
    char fault[64];

    snprintf (fault, sizeof fault, "local_write:7=error,dirty_map_sync:%u=kill",
              n);
    bench_make (&bench);
    was_killed = killed (in_child (fault, live, NULL));
    assert (passed (in_child (NULL, start_without_room, NULL)));
    bench_check_disks (&bench);
    bench_remove (&bench);
  }
  assert (n > 6); /* three at the start, and those of the takeover */
}

int
main (void)
{
  RUN (test_kill_at_each_sync_of_a_map);
  return 0;
}
