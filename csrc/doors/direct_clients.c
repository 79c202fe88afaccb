/* SPDX-License-Identifier: BSD-3-Clause */

/* The direct door's clients: which are connected, and which may be.
 *
 * A connection is first in the handshake, where a silent one may belong to any
 * stranger.  Then it is a client, which may be silent: the kernel's client may
 * send nothing for hours.  So the two are counted apart.  A new connection
 * always gets into the handshake, if necessary in the place of another one
 * there, of the host that has most of them: see in_the_way_locked.  A client is
 * admitted at the end of the handshake, or is told that there are too many.
 * When all places are taken, a client that never sent a request loses its
 * place: a client in use begins with a read.
 *
 * No host takes all places, as none of its clients could be put out for one of
 * another host: a client in use never is.  So a host with many clients gets
 * another place only while enough are free: see may_have_place.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "api.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/lock.h"
#include "doors/direct.h"
#include "doors/direct_clients.h"
#include "doors/direct_memory.h"
#include "doors/direct_server.h"
#include "wire/mailbox.h"

#define MAX_SHAKING 64u    /* hands */
#define PLACES_PER_FREE 7u /* of one host */
#define PUT_OUT_NS (NS_PER_S)
#define UNUSED_NS (60 * NS_PER_S)
#define DESCRIPTORS 512u /* for remotes, logs, the control socket */
#define STALL_MS 10000u
#define HANDSHAKE_MS 120000u

static uint64_t
default_memory (void)
{
  uint64_t quarter = (uint64_t)sysconf (_SC_PHYS_PAGES)
                     * (uint64_t)sysconf (_SC_PAGESIZE) / 4;

  return quarter < DIRECT_DEFAULT_MEMORY ? quarter : DIRECT_DEFAULT_MEMORY;
}

/* A client uses two descriptors.  Raise the limit as far as allowed, and return
 * how many clients it is enough for.
 */
static uint32_t
make_room (uint32_t max_clients)
{
  rlim_t wanted = DESCRIPTORS + 2 * ((rlim_t)max_clients + 2 * MAX_SHAKING);
  struct rlimit limit, more = { wanted, wanted };
  rlim_t room;

  if (getrlimit (RLIMIT_NOFILE, &limit) < 0 || limit.rlim_cur >= wanted)
    return max_clients;
  if (limit.rlim_max >= wanted)
    more.rlim_max = limit.rlim_max;
  if (setrlimit (RLIMIT_NOFILE, &more) == 0)
    return max_clients;
  limit.rlim_cur = limit.rlim_max;
  (void)setrlimit (RLIMIT_NOFILE, &limit);
  room = limit.rlim_cur / 2;
  return room > DESCRIPTORS / 2 + 2 * MAX_SHAKING
             ? (uint32_t)(room - DESCRIPTORS / 2 - 2 * MAX_SHAKING)
             : 1;
}

void
clients_init (struct clients *clients, const struct nbdm_limits *limits)
{
  uint32_t max
      = limits->max_clients ? limits->max_clients : DIRECT_DEFAULT_CLIENTS;
  uint64_t memory = limits->max_memory ? limits->max_memory : default_memory ();
  uint32_t stall_ms = limits->stall_ms ? limits->stall_ms : STALL_MS;

  memset (clients, 0, sizeof *clients);
  pthread_mutex_init (&clients->lock, NULL);
  cond_init (&clients->gone);
  clients->max_admitted = make_room (max);
  clients->handshake_ns
      = (limits->handshake_ms ? limits->handshake_ms : HANDSHAKE_MS)
        * NS_PER_MS;
  if (memory < NBDM_MAX_REQUEST)
    memory = NBDM_MAX_REQUEST;
  budget_init (&clients->budget, memory, stall_ms * NS_PER_MS);
}

void
clients_destroy (struct clients *clients)
{
  budget_end (&clients->budget);
  pthread_mutex_destroy (&clients->lock);
  pthread_cond_destroy (&clients->gone);
}

/* --- Coming and going ------------------------------------------------------
 */

/* The session loses its place, and its thread will notice. */
static void
put_out_locked (struct clients *clients, struct session *s)
{
  if (s->stage == SHAKING_HANDS)
    clients->nr_shaking--;
  else if (s->stage == ADMITTED)
    clients->nr_admitted--;
  s->stage = PUT_OUT;
  (void)shutdown (s->fd, SHUT_RDWR);
}

/* A number for the host that the client is on, or for its user on this host.
 * A host with IPv6 has a network of addresses to itself, so only that counts.
 */
static uint64_t
origin_of (int fd)
{
  union {
    struct sockaddr any;
    struct sockaddr_in in;
    struct sockaddr_in6 in6;
  } peer = { .any.sa_family = AF_UNSPEC };
  socklen_t size = sizeof peer, cred_size;
  struct ucred cred = { .uid = 0 };
  uint64_t network = 0;

  if (getpeername (fd, &peer.any, &size) < 0)
    return 0;
  switch (peer.any.sa_family) {
  case AF_INET:
    return peer.in.sin_addr.s_addr;
  case AF_INET6:
    if (IN6_IS_ADDR_V4MAPPED (&peer.in6.sin6_addr))
      return peer.in6.sin6_addr.s6_addr32[3];
    memcpy (&network, &peer.in6.sin6_addr, sizeof network);
    return network;
  default:
    cred_size = sizeof cred;
    (void)getsockopt (fd, SOL_SOCKET, SO_PEERCRED, &cred, &cred_size);
    return cred.uid;
  }
}

static uint32_t
nr_shaking_from_locked (const struct clients *clients, uint64_t origin)
{
  uint32_t nr = 0;

  for (const struct session *s = clients->first; s; s = s->next)
    nr += s->stage == SHAKING_HANDS && s->origin == origin;
  return nr;
}

/* The handshake that gives way: the oldest one of the host with most of them.
 * So a host that connects again and again only ends its own.  New sessions are
 * at the front.
 */
static struct session *
in_the_way_locked (const struct clients *clients)
{
  struct session *found = NULL;
  uint32_t most = 0;

  for (struct session *s = clients->first; s; s = s->next) {
    uint32_t nr = s->stage == SHAKING_HANDS
                      ? nr_shaking_from_locked (clients, s->origin)
                      : 0;

    if (nr > 0 && nr >= most) {
      found = s;
      most = nr;
    }
  }
  return found;
}

/* May a host with `nr` clients have another of these places?  For each free one
 * it has fewer than seven.  So it leaves an eighth of them to others, a second
 * host an eighth of that, and any host without a client gets the last one.  Of
 * seven places or fewer none is left over.
 */
static bool
may_have_place (uint32_t nr, uint32_t free_places)
{
  return nr < (uint64_t)PLACES_PER_FREE * free_places;
}

static uint32_t
nr_admitted_from_locked (const struct clients *clients, uint64_t origin)
{
  uint32_t nr = 0;

  for (const struct session *s = clients->first; s; s = s->next)
    nr += s->stage == ADMITTED && s->origin == origin;
  return nr;
}

/* The oldest client that has not been used, of any host or of that one. */
static struct session *
unused_locked (const struct clients *clients, const uint64_t *origin)
{
  uint64_t now = now_ns ();
  struct session *oldest = NULL;

  for (struct session *s = clients->first; s; s = s->next)
    if (s->stage == ADMITTED && !atomic_load (&s->asked)
        && now - s->admitted_ns >= UNUSED_NS
        && (origin == NULL || s->origin == *origin))
      oldest = s;
  return oldest;
}

/* 0, or -EUSERS with a message. */
static int
find_place_locked (struct clients *clients, const struct session *s)
{
  uint32_t nr = nr_admitted_from_locked (clients, s->origin);
  uint32_t free_places = clients->max_admitted - clients->nr_admitted;
  struct session *unused = NULL;

  if (may_have_place (nr, free_places))
    return 0;
  if (nr > 0)
    unused = unused_locked (clients, &s->origin);
  if (unused == NULL && free_places == 0 && may_have_place (nr, 1))
    unused = unused_locked (clients, NULL);
  if (unused) {
    put_out_locked (clients, unused);
    return 0;
  }
  if (free_places == 0)
    return set_message (-EUSERS,
                        "there are %u clients, as many as max_clients allows",
                        clients->max_admitted);
  return set_message (
      -EUSERS,
      "this host or user has %u clients, and the rest of the %u "
      "that max_clients allows is for others",
      nr, clients->max_admitted);
}

/* Connections may come faster than the threads that lost their place end: then
 * wait for these, or nothing would bound their number.  They wait for nothing.
 */
static void
await_ends_locked (struct clients *clients)
{
  uint64_t until = now_ns () + PUT_OUT_NS;

  while (clients->nr - clients->nr_shaking - clients->nr_admitted >= MAX_SHAKING
         && wait_until (&clients->gone, &clients->lock, until))
    ;
}

void
clients_add (struct clients *clients, struct session *s)
{
  s->origin = origin_of (s->fd);
  budget_come (&clients->budget, s->fixed);
  LOCK_FOR_SCOPE (&clients->lock);
  await_ends_locked (clients);
  if (clients->nr_shaking >= MAX_SHAKING)
    put_out_locked (clients, in_the_way_locked (clients));
  clients->nr_shaking++;
  s->stage = SHAKING_HANDS;
  s->clients = clients;
  s->next = clients->first;
  clients->first = s;
  clients->nr++;
}

bool
clients_make_room (struct clients *clients)
{
  struct session *found;

  LOCK_FOR_SCOPE (&clients->lock);
  found = in_the_way_locked (clients);
  if (found)
    put_out_locked (clients, found);
  return found != NULL;
}

void
clients_remove (struct session *s)
{
  struct clients *clients = s->clients;
  struct session **p = &clients->first;

  budget_go (&clients->budget, s->fixed);
  LOCK_FOR_SCOPE (&clients->lock);
  if (s->stage == SHAKING_HANDS)
    clients->nr_shaking--;
  else if (s->stage == ADMITTED)
    clients->nr_admitted--;
  while (*p != s)
    p = &(*p)->next;
  *p = s->next;
}

void
clients_removed (struct clients *clients)
{
  LOCK_FOR_SCOPE (&clients->lock);
  clients->nr--;
  pthread_cond_broadcast (&clients->gone);
}

int
clients_admit (struct session *s)
{
  struct clients *clients = s->clients;
  int rc;

  pthread_mutex_lock (&clients->lock);
  rc = s->stage == SHAKING_HANDS ? find_place_locked (clients, s) : -ECONNRESET;
  if (rc == 0) {
    clients->nr_shaking--;
    clients->nr_admitted++;
    s->stage = ADMITTED;
    s->admitted_ns = now_ns ();
  }
  pthread_mutex_unlock (&clients->lock);
  if (rc == -EUSERS)
    direct_log (s, "refused: %s", last_error ());
  return rc;
}

/* --- The end ---------------------------------------------------------------
 */

void
clients_disconnect (struct clients *clients)
{
  LOCK_FOR_SCOPE (&clients->lock);
  clients->disconnecting = true;
  for (struct session *s = clients->first; s; s = s->next) {
    atomic_store (&s->ending, true);
    if (atomic_load (&s->shaking_hands))
      (void)shutdown (s->fd, SHUT_RDWR);
    mailbox_ring (s->lane.watch.box);
  }
  mailbox_ring_all ();
  pthread_cond_broadcast (&clients->gone);
  while (clients->nr > 0)
    pthread_cond_wait (&clients->gone, &clients->lock);
}

int
clients_wait_gone (struct clients *clients, uint64_t until_ns)
{
  LOCK_FOR_SCOPE (&clients->lock);
  while (!clients->disconnecting || clients->nr > 0)
    if (!wait_until (&clients->gone, &clients->lock, until_ns))
      return -ETIMEDOUT;
  return 0;
}
