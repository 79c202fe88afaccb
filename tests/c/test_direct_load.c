/* SPDX-License-Identifier: BSD-3-Clause */

/* The direct door under load: what clients may do to it, and to each other,
 * while remotes come and go, and while the door ends.
 *
 * The tests look for a request that is never answered, an answer that is given
 * twice, a write in the wrong place, and a client that delays others.
 */

#define _GNU_SOURCE

#include <stdatomic.h>

#include "api.h"
#include "wire/protocol.h"
#include "direct_site.h"

#define HOT (64u << 10) /* bytes; half of what is written is there */
#define IN_FLIGHT 16

/* --- load ----------------------------------------------------------------- */

/* A request under way. */
struct slot {
  bool busy;
  uint16_t type;
  bool own; /* in the client's own place */
  uint32_t length;
  uint64_t cookie;
  time_t since;
};

struct loader {
  pthread_t thread;
  unsigned number;
  struct client client;
  struct slot slots[IN_FLIGHT];
  uint64_t random, cookie;
  uint8_t own; /* what stands in its own place */
  uint8_t *buf;
};

static struct loader loaders[CLIENTS];
static atomic_bool load_stop;
static atomic_uint load_answers;

static uint32_t
any_length (uint64_t r)
{
  static const uint32_t sectors[]
      = { 8, 8, 8, 8, 8, 16, 128, LARGEST / SECTOR };

  return (uint32_t)(1 + (r >> 8) % sectors[r % 8]) * SECTOR;
}

static uint16_t
any_type (uint64_t r)
{
  static const uint16_t rare[]
      = { NBD_CMD_FLUSH, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES, NBD_CMD_FLUSH };

  if (r % 16 == 0)
    return rare[r / 16 % 4];
  return r % 16 < 5 ? NBD_CMD_READ : NBD_CMD_WRITE;
}

static bool
issue_shared (struct loader *l, struct slot *slot)
{
  uint64_t r = peer_random (&l->random);
  uint64_t area = r >> 40 & 1 ? HOT : SHARED;
  uint64_t offset;
  uint16_t flags;

  slot->type = any_type (r >> 44);
  slot->length = slot->type == NBD_CMD_FLUSH ? 0 : any_length (r);
  offset = slot->type == NBD_CMD_FLUSH
               ? 0
               : peer_random (&l->random) % (area / SECTOR) * SECTOR;
  if (slot->length > SHARED - offset)
    offset = SHARED - slot->length;
  flags
      = slot->type == NBD_CMD_WRITE && r >> 50 % 16 == 0 ? NBD_CMD_FLAG_FUA : 0;
  if (slot->type == NBD_CMD_WRITE)
    memset (l->buf, (int)(r >> 32), slot->length);
  return client_request (&l->client, slot->type, flags, slot->cookie, offset,
                         slot->length, l->buf);
}

/* Use the place where no other client writes: a read there returns the last
 * answered write.
 */
static bool
issue_own (struct loader *l, struct slot *slot)
{
  uint64_t offset = SHARED + l->number * OWN;

  slot->type = slot->type == NBD_CMD_WRITE ? NBD_CMD_READ : NBD_CMD_WRITE;
  slot->length = 4096;
  if (slot->type == NBD_CMD_WRITE)
    memset (l->buf, ++l->own, slot->length);
  return client_request (&l->client, slot->type, 0, slot->cookie, offset,
                         slot->length, l->buf);
}

static bool
issue (struct loader *l, unsigned i)
{
  struct slot *slot = &l->slots[i];

  slot->busy = true;
  slot->own = i == 0;
  slot->cookie = ++l->cookie * IN_FLIGHT + i;
  slot->since = time (NULL);
  return slot->own ? issue_own (l, slot) : issue_shared (l, slot);
}

/* Others' answers keep coming while one request hangs. */
static void
assert_none_hangs (const struct loader *l)
{
  time_t now = time (NULL);

  for (unsigned i = 0; i < IN_FLIGHT; i++)
    assert (!l->slots[i].busy || now - l->slots[i].since < CLIENT_DEADLINE_S);
}

static void
check_own (const struct loader *l, const struct slot *slot)
{
  if (slot->type == NBD_CMD_READ)
    assert_filled (l->buf, l->own, slot->length);
}

static bool
take_answer (struct loader *l)
{
  struct answer answer;
  struct slot *slot;
  bool simple;

  if (!client_answer (&l->client, &answer, l->buf, LARGEST, &simple))
    return false;
  slot = &l->slots[answer.cookie % IN_FLIGHT];
  assert (slot->busy && slot->cookie == answer.cookie); /* once */
  /* This holds while the door ends too: a request is carried out, or has no
   * answer.
   */
  assert (answer.error == 0);
  if (simple && answer.error == 0 && slot->type == NBD_CMD_READ
      && !client_receive (&l->client, l->buf, slot->length))
    return false;
  if (slot->own)
    check_own (l, slot);
  slot->busy = false;
  load_answers++;
  assert_none_hangs (l);
  return true;
}

static unsigned
nr_busy (const struct loader *l)
{
  unsigned nr = 0;

  for (unsigned i = 0; i < IN_FLIGHT; i++)
    nr += l->slots[i].busy;
  return nr;
}

static void *
load (void *opaque)
{
  struct loader *l = opaque;
  bool going = true;

  l->buf = malloc (LARGEST);
  assert (l->buf);
  while (going && !load_stop) {
    for (unsigned i = 0; i < IN_FLIGHT && going; i++)
      if (!l->slots[i].busy)
        going = issue (l, i);
    if (going)
      going = take_answer (l);
  }
  while (going && nr_busy (l) > 0)
    going = take_answer (l);
  if (l->client.may_end)
    client_close (&l->client);
  else
    client_leave (&l->client);
  free (l->buf);
  return NULL;
}

static void
start_load (bool may_end)
{
  load_stop = false;
  for (unsigned i = 0; i < CLIENTS; i++) {
    struct loader *l = &loaders[i];

    *l = (struct loader){ .number = i,
                          .client = client_open (door, i % 2),
                          .random = peer_random (&dice) | 1 };
    l->client.may_end = may_end;
    assert (pthread_create (&l->thread, NULL, load, l) == 0);
  }
}

static void
join_load (void)
{
  for (unsigned i = 0; i < CLIENTS; i++)
    pthread_join (loaders[i].thread, NULL);
}

static void
stop_load (void)
{
  load_stop = true;
  join_load ();
}

static void
wait_answers (unsigned more)
{
  unsigned goal = load_answers + more;
  time_t until = time (NULL) + SITE_DEADLINE_S;

  while (load_answers < goal) {
    assert (time (NULL) < until);
    poll (NULL, 0, 1);
  }
}

static void
test_load (void)
{
  time_t until;

  bring_up (2, 1000);
  start_load (false);
  until = time (NULL) + 2;
  do
    wait_answers (500);
  while (time (NULL) < until);
  stop_load ();
  for (uint32_t i = 0; i < site.nr_peers; i++)
    assert (site_status (&site, i).state == NBDM_IN_SYNC);
  take_down ();
}

/* --- remotes that come and go --------------------------------------------- */

static void
lose_remote (uint32_t i, uint64_t r)
{
  if (r & 1) { /* with answers on their way */
    peer_hold (site.peers[i], r & 2 ? PEER_HOLD_ANSWERS : PEER_HOLD_ALL);
    if (r & 4)
      poll (NULL, 0, (int)(r >> 8 & 15));
  }
  if (r & 8)
    peer_cut (site.peers[i], false);
  else
    nbdm_disk_drop (site.volume, i + 1, "the test said so");
  peer_hold (site.peers[i], PEER_GO);
  if (r & 16) /* longer than the hold */
    site_wait_state (&site, i, NBDM_OUT_OF_SYNC);
}

static atomic_bool trouble_over;

/* What the policy thread of a remote that fails all the time does. */
static void *
trouble (void *opaque)
{
  uint32_t i = (uint32_t)(uintptr_t)opaque;
  uint64_t random = site.seed * (i + 3);

  while (!trouble_over) {
    struct nbdm_resync batch = { .max_bytes = 1u << 20, .pace.depth = 4 };
    uint64_t r = peer_random (&random);

    lose_remote (i, r);
    site_connect (&site, i);
    if (r & 32)
      site_resync_to_end (&site, i);
    else if (site_status (&site, i).state == NBDM_RESYNCING)
      assert (site_resync (&site, i, &batch) == 0);
    wait_answers (r >> 16 & 127);
  }
  return NULL;
}

static void
run_trouble (uint32_t hold_ms)
{
  pthread_t threads[SITE_MAX_PEERS];
  time_t until;

  bring_up (2, hold_ms);
  trouble_over = false;
  start_load (false);
  for (uintptr_t i = 0; i < site.nr_peers; i++)
    assert (pthread_create (&threads[i], NULL, trouble, (void *)i) == 0);
  until = time (NULL) + 3;
  do
    wait_answers (100);
  while (time (NULL) < until);
  /* They wait for answers of the load, so they end first. */
  trouble_over = true;
  for (uint32_t i = 0; i < site.nr_peers; i++)
    pthread_join (threads[i], NULL);
  stop_load ();
  take_down ();
}

static void
test_remotes_come_and_go (void)
{
  run_trouble (20);
}

/* The hold is so long that every lost command is sent again. */
static void
test_remotes_are_held (void)
{
  run_trouble (400);
}

/* A client closes the connection within a header, within a small or a large
 * payload, after closing only its sending side, or with all answers unread.
 */
static void
go_abruptly (unsigned how)
{
  static const uint32_t lengths[] = { 4096, 4096, LARGEST, LARGEST };
  static uint8_t buf[LARGEST];
  struct client c = client_open (door, how % 2);
  uint32_t length = lengths[how % 4];
  struct nbd_request header = client_header (NBD_CMD_WRITE, 0, 9, 4096, length);

  for (uint64_t i = 0; i < 20; i++) {
    assert (client_request (&c, NBD_CMD_WRITE, 0, i, i * 2048, 4096, buf));
    assert (client_request (&c, i % 3 ? NBD_CMD_READ : NBD_CMD_FLUSH, 0,
                            100 + i, 0, i % 3 ? REGION : 0, NULL));
  }
  if (how % 4 == 0)
    client_send (&c, &header, sizeof header / 2);
  else {
    client_send (&c, &header, sizeof header);
    client_send (&c, buf, how & 4 ? length / 2 : 0);
  }
  if (how & 8)
    assert (shutdown (c.fd, SHUT_WR) == 0);
  client_close (&c);
}

static void
test_clients_vanish (void)
{
  bring_up (1, 1000);
  start_load (false);
  for (unsigned i = 0; i < 64; i++) {
    go_abruptly (i % 16);
    if (i % 8 == 0)
      wait_answers (20);
  }
  stop_load ();
  wait_no_clients ();
  take_down ();
}

/* --- the end -------------------------------------------------------------- */

static void
test_end_under_load (void)
{
  bring_up (2, 1000);
  for (unsigned round = 0; round < 8; round++) {
    start_load (true);
    wait_answers (100 + round * 20);
    door_close (&served);
    join_load ();
    wait_no_clients ();
    open_door ();
  }
  take_down ();
}

/* Requests wait for a remote that does not come back, and one client is still
 * in the handshake: the stop of the volume ends both waits.
 */
static void
test_end_while_held (void)
{
  struct client waiting;

  bring_up (1, 3600 * 1000);
  start_load (true);
  waiting = client_connect (door, NBD_FLAG_FIXED_NEWSTYLE);
  wait_answers (100);
  peer_cut (site.peers[0], false);
  site_wait_state (&site, 0, NBDM_HOLDING);
  end_held ();
  join_load ();
  client_close (&waiting);
  nbdm_close (site.volume);
  site_remove (&site);
}

int
main (void)
{
  dice = site_seed (1);
  RUN (test_load);
  RUN (test_remotes_come_and_go);
  RUN (test_remotes_are_held);
  RUN (test_clients_vanish);
  RUN (test_end_under_load);
  RUN (test_end_while_held);
  return 0;
}
