/* SPDX-License-Identifier: BSD-3-Clause */

/* A door for other nodes, with a thread that answers their calls; what it
 * decides is up to the test.  To be included after direct_site.h, or after
 * schedules.h and the headers of the door and of a client.
 */

#ifndef NBDM_NODE_DOOR_H
#define NBDM_NODE_DOOR_H

#include <stdatomic.h>

#include "base/atomics.h"

#define VOLUME "test" /* the site's */
#define CLAIM VOLUME "@1.alpha.1.00000000000000000000000000000001"
#define NEXT_CLAIM VOLUME "@1.alpha.2.00000000000000000000000000000002"
#define LATER_MS 10000u

/* Set by the test: answer the call, or keep it.  SESSION_ENDED comes here too,
 * and is counted after.
 */
static void (*node_judge) (struct direct_server *server,
                           const struct nbdm_call *call);
static atomic_int nr_ended, nr_clean; /* sessions, since the door began */
static pthread_t node_control;

static void
node_count (const struct nbdm_call *call)
{
  if (call->kind != NBDM_CALL_SESSION_ENDED)
    return;
  atomic_fetch_add (&nr_clean, (int)call->clean);
  atomic_fetch_add (&nr_ended, 1);
}

static TEST_UNUSED void
grant_all (struct direct_server *server, const struct nbdm_call *call)
{
  if (call->kind != NBDM_CALL_SESSION_ENDED)
    (void)nbdm_server_answer (server, call->number, 0, NULL, 0);
}

static void *
node_control_main (void *opaque)
{
  struct nbdm_call *call = malloc (sizeof *call);
  int rc;

  assert (call);
  while ((rc = nbdm_server_next_call (opaque, call, LATER_MS)) != -ESHUTDOWN)
    if (rc == 0) {
      node_judge (opaque, call);
      node_count (call);
    }
    else
      assert (rc == -EAGAIN);
  free (call);
  return NULL;
}

/* The door of an open site serves nodes from now on. */
static TEST_UNUSED void
node_door_begin (struct door *d, void (*judge) (struct direct_server *server,
                                                const struct nbdm_call *call))
{
  assert (nbdm_server_listener (d->server, 0, NBDM_NODES, NULL) == 0);
  node_judge = judge;
  atomic_store (&nr_ended, 0);
  atomic_store (&nr_clean, 0);
  assert (pthread_create (&node_control, NULL, node_control_main, d->server)
          == 0);
}

/* As door_close. */
static TEST_UNUSED void
node_door_end (struct door *d)
{
  nbdm_server_end (d->server);
  assert (pthread_join (node_control, NULL) == 0);
  door_close (d);
}

/* The URI of an export at the door. */
static TEST_UNUSED const char *
node_uri (const struct door *d, const char *name)
{
  static _Thread_local char uri[512];

  if (door_psk)
    snprintf (uri, sizeof uri, "nbds+unix://%s@/%s?socket=%s&tls-psk-file=%s",
              TLS_RELAY_USER, name, d->address.sun_path, door_psk);
  else
    snprintf (uri, sizeof uri, "nbd+unix:///%s?socket=%s", name,
              d->address.sun_path);
  return uri;
}

/* Ask for an export by name; the type of the last reply.  Its text goes to
 * `text`, of NBDM_TEXT_LEN bytes.
 */
static TEST_UNUSED uint32_t
node_ask (const struct client *c, uint32_t option, const void *name,
          uint32_t length, char *text)
{
  uint8_t data[8192], answer[8192];
  uint32_t size = htobe32 (length), type, room;

  memcpy (data, &size, sizeof size);
  memcpy (data + sizeof size, name, length);
  memset (data + sizeof size + length, 0, 2);
  client_option (c, option, data, (uint32_t)sizeof size + length + 2);
  do {
    room = sizeof answer;
    type = client_option_reply (c, option, answer, &room);
  } while (type != NBD_REP_ACK && !(type & 0x80000000u));
  assert (room < NBDM_TEXT_LEN);
  if (text) {
    memcpy (text, answer, room);
    text[room] = '\0';
  }
  return type;
}

static TEST_UNUSED struct client
node_greet (const struct door *d)
{
  return client_connect (d->address.sun_path,
                         NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
}

/* A connection in transmission: the export must be granted. */
static TEST_UNUSED struct client
node_open (const struct door *d, const char *name)
{
  struct client c = node_greet (d);

  assert (node_ask (&c, NBD_OPT_GO, name, (uint32_t)strlen (name), NULL)
          == NBD_REP_ACK);
  return c;
}

#endif /* NBDM_NODE_DOOR_H */
