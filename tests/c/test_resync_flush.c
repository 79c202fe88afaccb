/* SPDX-License-Identifier: BSD-3-Clause */

/* Copies that go on while a flush is under way, and the regions that this flush
 * clears.
 *
 * The server carries a flush out and keeps its answer until the test lets it
 * go, while it answers copies: so every copy but the first ones is made beside
 * a flush. If the server then loses what it has not flushed, only dirty regions
 * may differ (rule 3).
 */

#include "api.h"
#include "logs/layout.h"
#include "site.h"

#include <poll.h>

#define REGION 4096u
#define NR_REGIONS 16u
#define SIZE (NR_REGIONS * REGION)

static struct site site;
static bool site_no_fua;
static char gate[64]; /* where resync waits with its first flush under way */

struct call {
  pthread_t thread;
  struct nbdm_resync batch;
  int rc;
};

static void *
call (void *opaque)
{
  struct call *c = opaque;

  c->rc = nbdm_disk_resync (site.volume, 1, &c->batch);
  return NULL;
}

static void
start_call (struct call *c, uint32_t depth)
{
  *c = (struct call){ .batch
                      = { .max_bytes = SIZE,
                          .pace = { .depth = depth, .copy_bytes = REGION } } };
  assert (pthread_create (&c->thread, NULL, call, c) == 0);
}

static void
make_site (void)
{
  uint8_t bytes[SIZE];

  memset (&site, 0, sizeof site);
  site.seed = site_seed (1);
  site.size = SIZE;
  site.region_size = REGION;
  site.hold_ms = 20;
  site.nr_peers = 1;
  site.peer.shuffle = true;
  site.peer.no_fua = site_no_fua;
  site_make (&site);
  site.params.flush_bytes = REGION; /* so that one is always due */
  site_open (&site);
  for (uint32_t i = 0; i < SIZE; i++)
    bytes[i] = (uint8_t)(1 + i / REGION);
  assert (nbdm_pwrite (site.volume, bytes, SIZE, 0, 0) == 0);
  site_connect (&site, 0);
  assert (site_status (&site, 0).state == NBDM_RESYNCING);
  assert (site_status (&site, 0).dirty_regions == NR_REGIONS);
}

/* Every region was copied, and its copy answered. */
static void
wait_all_copied (void)
{
  time_t until = time (NULL) + SITE_DEADLINE_S;

  while (site_status (&site, 0).remote.answered_bytes < SIZE) {
    assert (time (NULL) < until);
    poll (NULL, 0, 1);
  }
}

static void
wait_dirty_below (uint64_t nr)
{
  time_t until = time (NULL) + SITE_DEADLINE_S;

  while (site_status (&site, 0).dirty_regions >= nr) {
    assert (time (NULL) < until);
    poll (NULL, 0, 1);
  }
}

static unsigned
check_differing_are_dirty (void)
{
  uint8_t bits[NR_REGIONS / 8];
  unsigned differing = 0;
  char path[128];
  int fd;

  snprintf (path, sizeof path, "%s/dirty.dr0", site.state);
  fd = open (path, O_RDONLY | O_CLOEXEC);
  assert (fd >= 0 && pread (fd, bits, sizeof bits, LAYOUT_PAGE) == sizeof bits);
  close (fd);
  for (uint64_t i = 0; i < NR_REGIONS; i++)
    if (memcmp (site.image + i * REGION,
                peer_image (site.peers[0]) + i * REGION, REGION)
        != 0) {
      assert (bits[i / 8] >> i % 8 & 1);
      differing++;
    }
  return differing;
}

/* The server answers no flush: all regions are copied, and none is clean. */
static void
test_copies_go_on_beside_a_flush (void)
{
  struct call c;

  make_site ();
  peer_hold_flushes (site.peers[0], true);
  start_call (&c, 1);
  wait_all_copied ();
  assert (site_status (&site, 0).dirty_regions == NR_REGIONS);
  peer_hold_flushes (site.peers[0], false);
  pthread_join (c.thread, NULL);
  assert (c.rc == 0 && c.batch.copied_bytes == SIZE);
  assert (site_status (&site, 0).state == NBDM_IN_SYNC);
  site_end (&site);
}

/* After the first flush the server loses what it has not flushed. */
static void
test_a_flush_clears_what_it_covers (void)
{
  unsigned lost = 0;

  for (uint32_t depth = 1; depth <= 4; depth++)
    for (unsigned loss = PEER_LOSE_ALL; loss <= PEER_LOSE_SOME; loss++) {
      uint64_t dirty;
      struct call c;

      make_site ();
      peer_hold_flushes (site.peers[0], true);
      start_call (&c, depth);
      wait_all_copied ();
      peer_answer_flush (site.peers[0]);
      wait_dirty_below (NR_REGIONS);
      dirty = site_status (&site, 0).dirty_regions;
      assert (dirty > 0); /* the first flush began before the last copy */
      peer_lose_power (site.peers[0], (enum peer_loss)loss);
      pthread_join (c.thread, NULL);
      assert (c.rc == -ENOTCONN);
      lost += check_differing_are_dirty ();
      peer_hold_flushes (site.peers[0], false);
      site_connect (&site, 0);
      site_resync_to_end (&site, 0);
      assert (memcmp (site.image, peer_image (site.peers[0]), SIZE) == 0);
      site_end (&site);
    }
  assert (lost > 0); /* or it has shown nothing */
}

/* Marked again while the flush is under way that covers its copy. */
static void
test_a_region_marked_beside_a_flush_stays_dirty (void)
{
  struct call c;

  make_site ();
  peer_hold_flushes (site.peers[0], true);
  start_call (&c, 1);
  wait_all_copied ();
  assert (nbdm_remote_invalidate (site.volume, 1) == 0);
  peer_hold_flushes (site.peers[0], false);
  pthread_join (c.thread, NULL);
  assert (c.rc == 0 && c.batch.copied_bytes == 0);
  assert (site_status (&site, 0).dirty_regions == NR_REGIONS);
  site_resync_to_end (&site, 0);
  site_end (&site);
}

/* A pause, and a stop, end a call that has much left, whatever its rest. */
static void
test_a_pause_ends_the_call (void)
{
  time_t start = time (NULL);
  uint64_t answered;
  struct call c;

  make_site ();
  c = (struct call){ .batch = { .max_bytes = SIZE,
                                .pace = { .depth = 1,
                                          .copy_bytes = REGION,
                                          .burst_us = 1,
                                          .rest_us = 3600000000u } } };
  assert (pthread_create (&c.thread, NULL, call, &c) == 0);
  while (site_status (&site, 0).remote.answered_bytes == 0)
    poll (NULL, 0, 1);
  assert (nbdm_remote_pause (site.volume, 1, 1) == 0);
  pthread_join (c.thread, NULL);
  assert (c.rc == 0 && c.batch.next_region > 0);
  assert (site_status (&site, 0).dirty_regions > 0);
  assert (nbdm_remote_pause (site.volume, 1, 0) == 0);
  /* Another pace ends a rest too.  The rest begins once a copy was answered. */
  answered = site_status (&site, 0).remote.answered_bytes;
  assert (pthread_create (&c.thread, NULL, call, &c) == 0);
  WAIT_FOR (site_status (&site, 0).remote.answered_bytes > answered);
  do
    assert (nbdm_disk_resync_pace (site.volume, 1,
                                   &(struct nbdm_pace){ .depth = 4 })
            == 0);
  while (site_status (&site, 0).state != NBDM_IN_SYNC
         && poll (NULL, 0, 1) == 0);
  pthread_join (c.thread, NULL);
  assert (time (NULL) - start < SITE_DEADLINE_S);
  site_end (&site);
}

static void *
write_fua (void *opaque)
{
  uint8_t bytes[REGION];

  memset (bytes, 0xf0, sizeof bytes);
  *(int *)opaque
      = nbdm_pwrite (site.volume, bytes, REGION, 2 * REGION, NBDM_FUA);
  return NULL;
}

static uint64_t
flushes_asked (void)
{
  uint64_t asked;

  pthread_mutex_lock (&site.volume->lock);
  asked = site.volume->remotes[0].disk.flush.asked;
  pthread_mutex_unlock (&site.volume->lock);
  return asked;
}

/* A FUA write, to a server without FUA, holds the range that resync wants next
 * and waits for the flush that resync leads.  Neither may wait for the other.
 */
static void
test_no_range_is_waited_for_with_a_flush_to_land (void)
{
  time_t until = time (NULL) + SITE_DEADLINE_S;
  char reached[80];
  pthread_t client;
  struct call c;
  int rc = -1;

  site_no_fua = true;
  make_site ();
  site_no_fua = false;
  snprintf (reached, sizeof reached, "%s.reached", gate);
  start_call (&c, 1);
  while (access (reached, F_OK) < 0) {
    assert (time (NULL) < until);
    poll (NULL, 0, 1);
  }
  assert (flushes_asked () == 1); /* 0 is copied, 1 under way, 2 comes next */
  assert (pthread_create (&client, NULL, write_fua, &rc) == 0);
  while (flushes_asked () < 2) { /* it has the range, and waits */
    assert (time (NULL) < until);
    poll (NULL, 0, 1);
  }
  close (open (gate, O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
  pthread_join (client, NULL);
  pthread_join (c.thread, NULL);
  unlink (gate);
  unlink (reached);
  assert (rc == 0 && c.rc == 0);
  site_resync_to_end (&site, 0);
  assert (memcmp (site.image, peer_image (site.peers[0]), SIZE) == 0);
  site_end (&site);
}

int
main (void)
{
  char fault[128];

  alarm (150); /* nothing here may hang */
  snprintf (gate, sizeof gate, "/tmp/nbdm-gate-%d", (int)getpid ());
  snprintf (fault, sizeof fault, "resync_flush_begun:1=wait:%s", gate);
  setenv ("NBDM_FAULT", fault, 1);
  /* First: the fault is for the first flush of the process. */
  RUN (test_no_range_is_waited_for_with_a_flush_to_land);
  RUN (test_copies_go_on_beside_a_flush);
  RUN (test_a_flush_clears_what_it_covers);
  RUN (test_a_region_marked_beside_a_flush_stays_dirty);
  RUN (test_a_pause_ends_the_call);
  return 0;
}
