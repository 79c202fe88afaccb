/* SPDX-License-Identifier: BSD-3-Clause */

/* A node's record in the superblock: what is put is got again, both pages of a
 * slot are of one store or the slot is torn, and a program that knows no nodes
 * refuses the volume.
 */

#include "api.h"
#include "base/crc32c.h"
#include "base/file.h"
#include "logs/layout.h"
#include "logs/nodes.h"
#include "logs/superblock.h"
#include "test.h"

#include <endian.h>

#define PAGE_OF_SLOT(slot) ((off_t)(slot)*LAYOUT_PAGE)
#define NODES_OF_SLOT(slot) (NODES_OFFSET + (off_t)(slot)*LAYOUT_PAGE)

/* Every field has a value of its own, so that an exchange of two shows. */
static struct nbdm_node
sample_node (void)
{
  struct nbdm_node node = { .role = NBDM_SECONDARY,
                            .crash = NBDM_CRASH_PROCESS,
                            .inconsistent = 1,
                            .generation = 1000,
                            .epoch = 7,
                            .own_session = 9,
                            .replaced = 3,
                            .nr_peers = NBDM_MAX_REMOTES };

  strcpy (node.name, "alpha");
  strcpy (node.leader, "beta");
  strcpy (node.handed, "gamma");
  memset (node.id, 0xa1, sizeof node.id);
  for (unsigned i = 0; i < NBDM_ANCESTORS; i++)
    node.history[i] = 999 - i;
  node.claim.epoch = 6;
  node.claim.session = 8;
  strcpy (node.claim.node, "delta");
  memset (node.claim.nonce, 0xc1, sizeof node.claim.nonce);
  for (unsigned i = 0; i < NBDM_MAX_REMOTES; i++) {
    struct nbdm_peer *peer = &node.peers[i];

    snprintf (peer->name, sizeof peer->name, "peer%u", i);
    memset (peer->id, (int)(0x10 + i), sizeof peer->id);
    for (unsigned base = 0; base < NBDM_BASES; base++)
      peer->bases[base] = 100 * (i + 1) + base;
    peer->shared = i % 2;
    peer->replaced = 20 + i;
    peer->met = 1700000000 + (int64_t)i;
  }
  return node;
}

static struct disk_superblock
sample_superblock (void)
{
  struct disk_superblock sb = { 0 };

  strcpy (sb.name, "pg");
  sb.size = htole64 (UINT64_C (10) << 30);
  sb.session = htole64 (1);
  sb.role = htole32 (ROLE_PRIMARY);
  return sb;
}

static int
make (struct folder *folder)
{
  struct disk_superblock sb = sample_superblock ();
  struct disk_nodes nodes;
  struct nbdm_node node = sample_node ();
  int fd;

  *folder = folder_make ();
  nodes_put (&node, &sb, &nodes);
  assert (superblock_create (folder->fd, &sb, &nodes) == 0);
  fd = openat (folder->fd, "superblock", O_RDWR | O_CLOEXEC);
  assert (fd >= 0);
  return fd;
}

static void
drop (struct folder *folder, int fd)
{
  close (fd);
  folder_remove (folder, FILES ("superblock"));
}

static bool
load (int fd, struct disk_superblock *sb, struct disk_nodes *nodes)
{
  bool torn;

  assert (superblock_load (fd, sb, nodes, &torn) == 0);
  return torn;
}

/* Load, and return the epoch that both pages agree on. */
static uint64_t
loaded_epoch (int fd, bool expect_torn)
{
  struct disk_superblock sb;
  struct disk_nodes nodes;
  struct nbdm_node node;

  assert (load (fd, &sb, &nodes) == expect_torn);
  assert (nodes.sequence == sb.sequence);
  nodes_get (&sb, &nodes, &node);
  assert (node.generation == 1000 + node.epoch - 7);
  return node.epoch;
}

/* A store of the next epoch; the slot that it wrote. */
static unsigned
store_next (int fd)
{
  struct disk_superblock sb;
  struct disk_nodes nodes;
  struct nbdm_node node;

  load (fd, &sb, &nodes);
  nodes_get (&sb, &nodes, &node);
  node.epoch++;
  node.generation++;
  nodes_put (&node, &sb, &nodes);
  assert (superblock_store (fd, &sb, &nodes) == 0);
  return (unsigned)(le64toh (sb.sequence) % 2);
}

static void
test_nodes_put_is_got_again (void)
{
  struct folder folder;
  int fd = make (&folder);
  struct disk_superblock sb;
  struct disk_nodes nodes;
  struct nbdm_node expect = sample_node (), node;

  assert (file_size (&folder, "superblock") == 4 * LAYOUT_PAGE);
  assert (!load (fd, &sb, &nodes));
  nodes_get (&sb, &nodes, &node);
  assert (memcmp (&expect, &node, sizeof node) == 0);
  drop (&folder, fd);
}

/* An earlier longer name or a peer that is gone leaves nothing behind. */
static void
test_nodes_put_again_leaves_nothing_behind (void)
{
  struct disk_superblock sb = sample_superblock (), again = sb;
  struct disk_nodes nodes, fresh;
  struct nbdm_node node = sample_node ();

  nodes_put (&node, &sb, &nodes);
  node.nr_peers = 1;
  strcpy (node.leader, "b");
  nodes_put (&node, &sb, &nodes);
  nodes_put (&node, &again, &fresh);
  assert (memcmp (&nodes, &fresh, sizeof nodes) == 0);
}

static void
test_nodes_volume_without_has_none (void)
{
  struct folder folder = folder_make ();
  struct disk_superblock sb = sample_superblock ();
  struct disk_nodes nodes = { .nr_peers = 3 };
  struct nbdm_node node;
  int fd;

  assert (superblock_create (folder.fd, &sb, &nodes) == 0);
  assert (file_size (&folder, "superblock") == 2 * LAYOUT_PAGE);
  fd = openat (folder.fd, "superblock", O_RDWR | O_CLOEXEC);
  assert (!load (fd, &sb, &nodes));
  assert (nodes.nr_peers == 3); /* not touched */
  nodes_get (&sb, &nodes, &node);
  assert (node.name[0] == '\0' && node.nr_peers == 0);
  drop (&folder, fd);
}

static void
test_nodes_stores_take_turns (void)
{
  struct folder folder;
  int fd = make (&folder);
  unsigned slot = store_next (fd);

  for (uint64_t epoch = 8; epoch < 12; epoch++) {
    assert (loaded_epoch (fd, false) == epoch);
    assert (store_next (fd) == 1 - slot);
    slot = 1 - slot;
  }
  drop (&folder, fd);
}

/* Lost power keeps any sectors of the two pages.  Whatever is kept, a start
 * finds the store before or the whole new one.
 */
static void
test_nodes_torn_store_leaves_the_one_before (void)
{
  struct folder folder;
  int fd = make (&folder);
  char before[4 * LAYOUT_PAGE], after[sizeof before];
  unsigned slot;

  store_next (fd);
  assert (full_pread (fd, before, sizeof before, 0) == 0);
  slot = store_next (fd);
  assert (full_pread (fd, after, sizeof after, 0) == 0);
  for (unsigned kept = 0; kept < 4; kept++) {
    bool page = kept & 1, nodes = kept & 2;
    off_t at = PAGE_OF_SLOT (slot), nodes_at = NODES_OF_SLOT (slot);

    assert (full_pwrite (fd, (page ? after : before) + at, LAYOUT_PAGE,
                         (uint64_t)at)
            == 0);
    assert (full_pwrite (fd, (nodes ? after : before) + nodes_at, LAYOUT_PAGE,
                         (uint64_t)nodes_at)
            == 0);
    assert (loaded_epoch (fd, page != nodes) == (page && nodes ? 9 : 8));
  }
  drop (&folder, fd);
}

static void
test_nodes_every_byte_is_covered (void)
{
  struct folder folder;
  int fd = make (&folder);
  unsigned slot = store_next (fd);

  for (off_t i = 0; i < LAYOUT_PAGE; i += 7) {
    garble (&folder, "superblock", NODES_OF_SLOT (slot) + i);
    assert (loaded_epoch (fd, true) == 7);
    garble (&folder, "superblock", NODES_OF_SLOT (slot) + i);
  }
  assert (loaded_epoch (fd, false) == 8);
  drop (&folder, fd);
}

/* Pages that are each valid, of two stores. */
static void
test_nodes_pages_of_two_stores_are_torn (void)
{
  struct folder folder;
  int fd = make (&folder);
  char page[LAYOUT_PAGE];
  unsigned slot = store_next (fd);

  assert (full_pread (fd, page, sizeof page, (uint64_t)NODES_OF_SLOT (slot))
          == 0);
  store_next (fd);
  assert (store_next (fd) == slot);
  assert (full_pwrite (fd, page, sizeof page, (uint64_t)NODES_OF_SLOT (slot))
          == 0);
  assert (loaded_epoch (fd, true) == 9);
  drop (&folder, fd);
}

static void
test_nodes_truncated_file_is_garbled (void)
{
  struct folder folder;
  int fd = make (&folder);
  struct disk_superblock sb;
  struct disk_nodes nodes;
  bool torn;

  assert (ftruncate (fd, 2 * LAYOUT_PAGE) == 0);
  assert (superblock_load (fd, &sb, &nodes, &torn) == -EUCLEAN);
  drop (&folder, fd);
}

static void
test_nodes_settle_writes_both_pages_again (void)
{
  struct folder folder;
  int fd = make (&folder);
  struct disk_superblock sb;
  struct disk_nodes nodes;
  unsigned slot = store_next (fd);

  load (fd, &sb, &nodes);
  garble (&folder, "superblock", PAGE_OF_SLOT (slot) + 100);
  garble (&folder, "superblock", NODES_OF_SLOT (slot) + 100);
  assert (superblock_settle (fd, &sb, &nodes) == 0);
  assert (loaded_epoch (fd, false) == 8);
  drop (&folder, fd);
}

/* A program from before nodes reads the first two pages alone, and judges the
 * features of a page whose CRC is right.
 */
static void
test_nodes_older_program_refuses (void)
{
  struct folder folder;
  int fd = make (&folder);

  for (unsigned slot = 0; slot < 2; slot++) {
    struct disk_superblock sb;
    uint32_t crc;

    assert (full_pread (fd, &sb, sizeof sb, (uint64_t)PAGE_OF_SLOT (slot))
            == 0);
    crc = le32toh (sb.crc);
    sb.crc = 0;
    assert (crc32c (0, &sb, sizeof sb) == crc);
    assert (le32toh (sb.version) == 1 && le64toh (sb.incompatible) != 0);
  }
  drop (&folder, fd);
}

int
main (void)
{
  RUN (test_nodes_put_is_got_again);
  RUN (test_nodes_put_again_leaves_nothing_behind);
  RUN (test_nodes_volume_without_has_none);
  RUN (test_nodes_stores_take_turns);
  RUN (test_nodes_torn_store_leaves_the_one_before);
  RUN (test_nodes_every_byte_is_covered);
  RUN (test_nodes_pages_of_two_stores_are_torn);
  RUN (test_nodes_truncated_file_is_garbled);
  RUN (test_nodes_settle_writes_both_pages_again);
  RUN (test_nodes_older_program_refuses);
  return 0;
}
