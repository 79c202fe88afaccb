/* SPDX-License-Identifier: BSD-3-Clause */

/* A direct door that a test opens and closes, in its own process.  To be
 * included after nbdm.h, which is for CFFI and has no guard.
 */

#ifndef NBDM_DOOR_H
#define NBDM_DOOR_H

#include <poll.h>
#include <pthread.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "api.h"
#include "volume/volume.h"
#include "test.h"

#define DOOR_DEADLINE_S 60 /* to end, whatever clients do */

/* A file of shared keys: the doors need TLS.  NULL: they have none. */
static const char *door_psk;

struct door {
  struct sockaddr_un address;
  struct direct_server *server;
  pthread_t thread;
  int listener;
};

static inline void *
door_run (void *server)
{
  nbdm_server_run (server);
  return NULL;
}

/* It listens, and does not serve yet.  The path is taken, if need be from an
 * earlier door's socket.
 */
static inline void
door_make (struct door *door, struct nbdm *volume, const char *path,
           const struct nbdm_limits *limits)
{
  struct sockaddr_un *address = &door->address;

  *address = (struct sockaddr_un){ .sun_family = AF_UNIX };
  assert (strlen (path) < sizeof address->sun_path);
  memcpy (address->sun_path, path, strlen (path));
  unlink (path);
  door->listener = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  assert (door->listener >= 0);
  assert (bind (door->listener, (struct sockaddr *)address, sizeof *address)
          == 0);
  assert (listen (door->listener, 16) == 0);
  assert (nbdm_server_open (volume, &door->listener, 1, limits, &door->server)
          == 0);
  if (door_psk) {
    const struct nbdm_tls files = { .psk = door_psk };

    assert (nbdm_server_tls (door->server, 0, &files) == 0);
  }
}

static inline void
door_start (struct door *door)
{
  assert (nbdm_server_start (door->server) == 0);
  assert (pthread_create (&door->thread, NULL, door_run, door->server) == 0);
}

/* Clients are served when this returns. */
static inline void
door_open_limited (struct door *door, struct nbdm *volume, const char *path,
                   const struct nbdm_limits *limits)
{
  door_make (door, volume, path, limits);
  door_start (door);
}

static inline void
door_open (struct door *door, struct nbdm *volume, const char *path)
{
  const struct nbdm_limits usual = { 0 };

  door_open_limited (door, volume, path, &usual);
}

/* Ends the test if it takes longer than a request may. */
static inline void
door_close (struct door *door)
{
  struct timespec until;

  nbdm_server_end (door->server);
  clock_gettime (CLOCK_REALTIME, &until);
  until.tv_sec += DOOR_DEADLINE_S;
  assert (pthread_timedjoin_np (door->thread, NULL, &until) == 0);
  nbdm_server_close (door->server);
  close (door->listener);
}

#endif /* NBDM_DOOR_H */
