/* SPDX-License-Identifier: BSD-3-Clause */

/* See site.h. */

#define _GNU_SOURCE

#include "api.h"
#include "site.h"
#include "local_deadline.h"
#include "tls_relay.h"

#include <inttypes.h>
#include <poll.h>
#include <sys/mman.h>

uint64_t
site_seed (uint64_t fixed)
{
  const char *text = getenv ("NBDM_TEST_SEED");
  uint64_t seed = text ? strtoull (text, NULL, 0) : fixed;

  printf ("seed %" PRIu64 " (NBDM_TEST_SEED)\n", seed);
  fflush (stdout);
  return seed | 1;
}

static void
make_local (struct site *site)
{
  int fd = open (site->local, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  void *p;

  assert (fd >= 0 && ftruncate (fd, (off_t)site->size) == 0);
  p = mmap (NULL, site->size, PROT_READ, MAP_SHARED, fd, 0);
  assert (p != MAP_FAILED);
  site->image = p;
  close (fd);
}

void
site_make (struct site *site)
{
  static const char *const names[SITE_MAX_PEERS] = { "dr0", "dr1", "dr2" };
  const char *base = access ("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";

  snprintf (site->dir, sizeof site->dir, "%s/nbdm-site-XXXXXX", base);
  assert (mkdtemp (site->dir));
  snprintf (site->local, sizeof site->local, "%s/local", site->dir);
  snprintf (site->state, sizeof site->state, "%s/state", site->dir);
  make_local (site);
  assert (mkdir (site->state, 0700) == 0);
  site->params
      = (struct nbdm_params){ .name = "test",
                              .local = site->local,
                              .state_dir = site->state,
                              .size = site->size,
                              .region_size = site->region_size,
                              .policy = NBDM_DEGRADE,
                              .hold_ms = site->hold_ms,
                              .local_deadline_ms = local_deadline_of_tests (),
                              .node = site->node,
                              .nr_remotes = site->nr_peers };
  for (uint32_t i = 0; i < site->nr_peers; i++) {
    struct peer_params peer = site->peer;

    snprintf (site->sockets[i], sizeof site->sockets[i], "%s/sock%u", site->dir,
              i);
    peer.socket = site->sockets[i];
    peer.size = site->size;
    peer.seed = site->seed + i + 1;
    peer.opaque = (void *)(uintptr_t)i;
    site->peers[i] = peer_start (&peer);
    site->params.remotes[i].name = names[i];
    site->params.remotes[i].is_node = site->node != NULL;
    site->params.remotes[i].deadline_ms = SITE_DEADLINE_S * 1000;
  }
  assert (nbdm_create (&site->params, 0) == 0);
}

void
site_open (struct site *site)
{
  if (nbdm_open (&site->params, &site->volume) < 0) {
    fprintf (stderr, "open: %s\n", nbdm_last_error ());
    abort ();
  }
  assert (nbdm_start (site->volume) == 0);
}

void
site_promote (struct site *site, bool counted)
{
  struct nbdm_node before, after;

  site_open (site);
  assert (nbdm_node_get (site->volume, &before) == 0);
  after = before;
  after.generation = SITE_GENERATION;
  after.epoch = 1;
  after.role = NBDM_PRIMARY;
  snprintf (after.leader, sizeof after.leader, "%s", site->node);
  for (uint32_t i = 0; i < after.nr_peers; i++)
    after.peers[i].shared = counted;
  assert (nbdm_node_store (site->volume, &before, &after) == 0);
  assert (nbdm_stop (site->volume) == 0);
  nbdm_close (site->volume);
  site->params.primary = 1;
  site->params.epoch = 1;
}

void
site_remove (struct site *site)
{
  char command[128];

  for (uint32_t i = 0; i < site->nr_peers; i++)
    peer_stop (site->peers[i]);
  munmap ((void *)site->image, site->size);
  snprintf (command, sizeof command, "rm -rf %s", site->dir);
  assert (system (command) == 0);
}

void
site_end (struct site *site)
{
  assert (nbdm_stop (site->volume) == 0);
  nbdm_close (site->volume);
  site_remove (site);
}

struct nbdm_disk_status
site_status (struct site *site, uint32_t remote)
{
  struct nbdm_disk_status status;

  assert (nbdm_get_disk_status (site->volume, remote + 1, &status) == 0);
  return status;
}

void
site_wait_state (struct site *site, uint32_t remote,
                 enum nbdm_remote_state state)
{
  time_t until = time (NULL) + SITE_DEADLINE_S;
  struct nbdm_disk_status status = site_status (site, remote);

  while (status.state != state) {
    assert (time (NULL) < until);
    nbdm_disk_wait (site->volume, remote + 1, status.serial, 1000);
    status = site_status (site, remote);
  }
}

void
site_connect (struct site *site, uint32_t remote)
{
  time_t until = time (NULL) + SITE_DEADLINE_S;
  char uri[256];

  peer_uri (uri, sizeof uri, site->sockets[remote]);
  /* The old connection may not have been noticed dead yet, and a new one may
   * be cut before it is admitted.
   */
  for (;;) {
    assert (time (NULL) < until);
    if (nbdm_remote_connect (site->volume, remote + 1, uri, 10000) == 0
        && nbdm_disk_admit (site->volume, remote + 1) == 0)
      return;
    poll (NULL, 0, 1);
  }
}

int
site_resync (struct site *site, uint32_t remote, struct nbdm_resync *batch)
{
  struct nbdm_disk_status status = site_status (site, remote);
  int rc;

  if (status.remote.late_regions == status.dirty_regions)
    nbdm_remote_release_late (site->volume, remote + 1);
  rc = nbdm_disk_resync (site->volume, remote + 1, batch);
  if (rc < 0)
    fprintf (stderr, "resync: %s; %s\n", nbdm_last_error (),
             site_status (site, remote).reason);
  batch->first_region = batch->next_region;
  return rc;
}

void
site_resync_to_end (struct site *site, uint32_t remote)
{
  struct nbdm_resync batch = { .max_bytes = 1u << 20, .pace.depth = 4 };
  time_t until = time (NULL) + SITE_DEADLINE_S;

  while (site_status (site, remote).state == NBDM_RESYNCING) {
    assert (time (NULL) < until);
    assert (site_resync (site, remote, &batch) == 0);
  }
  assert (site_status (site, remote).state == NBDM_IN_SYNC);
}
