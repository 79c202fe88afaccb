/* SPDX-License-Identifier: BSD-3-Clause */

/* A node is killed at every fault point that a life of it reaches, or its files
 * fail there.  Then its host stays up, or goes down, and the node opens again:
 * as secondary, then as primary.
 *
 * The life: a node that doubts regions opens as primary, answers a write that
 * the other node misses, marks regions, stores its record and stops; it opens
 * as secondary, writes, loses its primary's session, adopts, and stops.  Shared
 * memory outlives it, and says which step it had begun and which it had done.
 *
 * What has to hold after any end:
 *
 *   a write that was answered alone      is dirty, in a generation that the
 *                                        other node cannot hold
 *   one that was not                     is dirty or doubted, if it changed
 *                                        the disk
 *   doubts                               are doubts still; or dirty, in such a
 *                                        generation
 *   what a call had stored               is stored
 */

#include "api.h"
#include "base/file.h"
#include "logs/layout.h"
#include "lone_volume.h"

#include <endian.h>
#include <sys/mman.h>

#define PER_EXTENT (EXTENT / REGION)
#define FIRST 1000u   /* the generation that the other node may hold */
#define MAX_TIMES 12u /* a point is reached more often in some lives */
#define BYTES ((NR_REGIONS + 7) / 8)

enum {
  DOUBTED = 3 * PER_EXTENT + 7,
  WRITTEN = 5,
  MARKED = 4 * PER_EXTENT + 3,
  SECOND = 2 * PER_EXTENT + 1
};

enum step {
  NOTHING,
  OPEN_PRIMARY,
  WRITE,
  MARK,
  STORE,
  STOP_PRIMARY,
  OPEN_SECONDARY,
  WRITE_AGAIN,
  SESSION_LOST,
  CLEAR,
  STOP_SECONDARY
};

static struct board {
  enum step begun, done;
} * board;

static struct nbdm *volume;
/* It ended when a write had reached every disk, and only its answer was left:
 * its primary misses the answer.
 */
static bool retired;

/* --- the life --------------------------------------------------------------
 */

static void
must (int rc)
{
  if (rc < 0)
    _exit (2);
}

#define STEP(step, call)                                                       \
  do {                                                                         \
    board->begun = (step);                                                     \
    must (call);                                                               \
    board->done = (step);                                                      \
  } while (0)

static int
open_as (bool primary)
{
  int rc;

  params.primary = primary;
  params.epoch = 1;
  rc = nbdm_open (&params, &volume);
  if (rc < 0)
    fprintf (stderr, "open: %s\n", nbdm_last_error ());
  return rc;
}

static int
mark (uint32_t map, uint64_t region)
{
  uint8_t bits[BYTES] = { 0 };

  bits[region / 8] = (uint8_t)(1u << region % 8);
  return nbdm_node_mark (volume, 1, map, bits, sizeof bits);
}

static int
write_region (uint64_t region)
{
  static uint8_t buf[512];

  memset (buf, 0x5a, sizeof buf);
  return nbdm_pwrite (volume, buf, sizeof buf, region * REGION, 0);
}

static int
change_record (void)
{
  struct nbdm_node before, after;

  must (nbdm_node_get (volume, &before));
  after = before;
  after.own_session = 77;
  return nbdm_node_store (volume, &before, &after);
}

static int
stop (void)
{
  int rc = nbdm_stop (volume);

  nbdm_close (volume);
  return rc;
}

static void
live (void *opaque)
{
  (void)opaque;
  STEP (OPEN_PRIMARY, open_as (true));
  STEP (WRITE, write_region (WRITTEN));
  STEP (MARK, mark (NBDM_MAP_DIRTY, MARKED));
  STEP (STORE, change_record ());
  STEP (STOP_PRIMARY, stop ());
  STEP (OPEN_SECONDARY, open_as (false));
  STEP (WRITE_AGAIN, write_region (SECOND));
  STEP (SESSION_LOST, nbdm_node_session_lost (volume));
  STEP (CLEAR, nbdm_node_clear (volume, 1));
  STEP (STOP_SECONDARY, stop ());
}

/* The other node was counted and is in sync, except where this one doubts. */
static void
begin (void *opaque)
{
  struct nbdm_node before, after;

  (void)opaque;
  must (open_as (false));
  must (nbdm_node_get (volume, &before));
  after = before;
  after.generation = FIRST;
  after.epoch = 1;
  after.role = NBDM_PRIMARY;
  after.crash = NBDM_CRASH_SESSION;
  after.peers[0].shared = 1;
  strcpy (after.leader, "alpha");
  must (nbdm_node_store (volume, &before, &after));
  must (mark (NBDM_MAP_DOUBTS, DOUBTED));
  must (stop ());
}

/* --- what it left ----------------------------------------------------------
 */

struct maps {
  uint8_t dirty[BYTES], doubts[BYTES];
};

static bool
has (const uint8_t *bits, uint64_t region)
{
  return bits[region / 8] >> region % 8 & 1;
}

static bool
has_extent (const uint8_t *bits, uint64_t region)
{
  uint64_t first = region / PER_EXTENT * PER_EXTENT;

  for (uint64_t r = first; r < first + PER_EXTENT && r < NR_REGIONS; r++)
    if (!has (bits, r))
      return false;
  return true;
}

static void
look (struct maps *maps, struct nbdm_node *node)
{
  assert (nbdm_node_get (volume, node) == 0);
  assert (nbdm_node_map (volume, 1, NBDM_MAP_DIRTY, maps->dirty, BYTES) == 0);
  assert (nbdm_node_map (volume, 1, NBDM_MAP_DOUBTS, maps->doubts, BYTES) == 0);
}

static bool
changed (uint64_t region)
{
  uint8_t byte;
  int fd = open (local, O_RDONLY);

  assert (fd >= 0 && pread (fd, &byte, 1, (off_t)(region * REGION)) == 1);
  close (fd);
  return byte != 0;
}

/* The other node cannot hold the present generation. */
static bool
is_apart (const struct nbdm_node *node)
{
  return node->generation != FIRST && !node->peers[0].shared
         && node->peers[0].bases[0] != 0;
}

/* Until the adoption begins, which empties the maps. */
static void
check_maps (const struct maps *maps, const struct nbdm_node *node, bool host)
{
  if (has (maps->dirty, DOUBTED))
    assert (is_apart (node));
  else
    assert (has (maps->doubts, DOUBTED));
  if (board->done >= WRITE)
    assert (has (maps->dirty, WRITTEN) && is_apart (node));
  else if (changed (WRITTEN))
    assert (has (maps->dirty, WRITTEN) || has (maps->doubts, WRITTEN));
  if (board->done >= MARK)
    assert (has (maps->dirty, MARKED));
  if (board->done >= SESSION_LOST)
    assert (has_extent (maps->doubts, SECOND));
  else if (board->done < WRITE_AGAIN && !retired && changed (SECOND))
    assert (has (maps->doubts, SECOND));
  if (host && board->done >= WRITE && board->begun < STOP_PRIMARY)
    assert (has_extent (maps->doubts, WRITTEN));
  if (host && board->done >= WRITE_AGAIN)
    assert (has_extent (maps->doubts, SECOND));
}

static void
check_record (const struct maps *maps, const struct nbdm_node *node, bool host)
{
  static const uint8_t none[BYTES];
  bool any = memcmp (maps->doubts, none, BYTES) != 0;

  assert (node->role == NBDM_PRIMARY && node->epoch == 1);
  if (board->done >= STORE)
    assert (node->own_session == 77);
  assert (any == (node->crash != NBDM_CRASH_NONE));
  /* The session before the last start may have been closed. */
  if (host && board->done >= WRITE && board->begun < STOP_PRIMARY)
    assert (node->crash == NBDM_CRASH_HOST);
}

static void
check (void *opaque)
{
  bool host = *(bool *)opaque;
  struct maps maps;
  struct nbdm_node node;

  assert (open_as (false) == 0);
  look (&maps, &node);
  if (board->begun < CLEAR)
    check_maps (&maps, &node, host);
  check_record (&maps, &node, host);
  assert (nbdm_stop (volume) == 0);
  nbdm_close (volume);
}

/* Nothing is doubted any more, and what was is dirty. */
static void
check_as_primary (void *opaque)
{
  struct maps before, after;
  struct nbdm_node old, node;

  (void)opaque;
  assert (open_as (false) == 0);
  look (&before, &old);
  assert (nbdm_stop (volume) == 0);
  nbdm_close (volume);
  assert (open_as (true) == 0);
  look (&after, &node);
  for (uint64_t r = 0; r < NR_REGIONS; r++) {
    assert (!has (after.doubts, r));
    assert (has (after.dirty, r)
            == (has (before.dirty, r) || has (before.doubts, r)));
    if (has (before.doubts, r))
      assert (is_apart (&node) && node.generation != old.generation);
  }
  assert (node.crash == NBDM_CRASH_NONE);
  assert (nbdm_stop (volume) == 0);
  nbdm_close (volume);
}

/* --- the ends --------------------------------------------------------------
 */

static void
shell (const char *command)
{
  assert (setenv ("SITE", site.path, 1) == 0);
  assert (system (command) == 0);
}

/* One life; false: it reached its end. */
static bool
end_early (const char *fault, bool host)
{
  int status;

  /* The disk stays the same file: a start compares its identity. */
  shell ("cd $SITE && rm $(ls | grep -v ^disk) && truncate -s 0 disk "
         "&& truncate -r $SITE.begun/disk disk "
         "&& cd $SITE.begun && cp -p $(ls | grep -v ^disk) $SITE/");
  *board = (struct board){ NOTHING, NOTHING };
  retired = strncmp (fault, "after_retire", 12) == 0
            || strncmp (fault, "before_answer", 13) == 0;
  status = in_child (fault, live, NULL);
  if (passed (status))
    return false;
  assert (killed (status) || (WIFEXITED (status) && WEXITSTATUS (status) == 2));
  if (host)
    reboot ();
  status = in_child (NULL, check, &host);
  if (!passed (status)) {
    fprintf (stderr, "%s, host %d: begun %d, done %d\n", fault, host,
             board->begun, board->done);
    abort ();
  }
  assert (passed (in_child (NULL, check_as_primary, NULL)));
  return true;
}

static unsigned
try_point (const char *point, const char *action)
{
  unsigned times = 0;
  char fault[96];

  for (unsigned n = 1; n <= MAX_TIMES; n++) {
    snprintf (fault, sizeof fault, "%s:%u=%s", point, n, action);
    if (!end_early (fault, n % 2))
      break;
    times++;
    if (n == 1)
      end_early (fault, false);
  }
  return times;
}

static void
test_nodes_killed_at_every_point_loses_no_difference (void)
{
  unsigned points = 0, ends = 0;
  const char *point;
  int fails;

  for (uint32_t i = 0; (point = nbdm_fault_point (i, &fails)); i++) {
    unsigned times = try_point (point, "kill");

    points += times > 0;
    ends += times;
    if (fails)
      ends += try_point (point, "error");
  }
  printf ("%u points, %u ends\n", points, ends);
  assert (points >= 40 && ends >= 150);
}

int
main (void)
{
  board = mmap (NULL, sizeof *board, PROT_READ | PROT_WRITE,
                MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  assert (board != MAP_FAILED);
  describe_volume (SIZE, REGION);
  params.node = "alpha";
  params.remotes[0].is_node = 1;
  params.remotes[0].assume_in_sync = 0;
  create_volume ();
  assert (passed (in_child (NULL, begin, NULL)));
  shell ("cp -rp --sparse=always $SITE $SITE.begun");
  RUN (test_nodes_killed_at_every_point_loses_no_difference);
  shell ("rm -r $SITE.begun");
  end_volume ();
  return 0;
}
