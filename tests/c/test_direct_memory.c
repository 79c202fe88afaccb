/* SPDX-License-Identifier: BSD-3-Clause */

/* The memory that all clients of the direct door share: which clients get it,
 * and how those that wait for it are woken.
 */

#define _GNU_SOURCE

#include "api.h"
#include "base/clock.h"
#include "doors/direct.h"
#include "doors/direct_answer.h"
#include "doors/direct_memory.h"
#include "wire/protocol.h"
#include "direct_site.h"

#define STALL_MS 400

static uint8_t *buf; /* BIG bytes */

/* --- a session whose thread the test can hold --------------------------------
 */

#define MARK (SHARED + SECTOR)     /* a read of it marks the session */
#define HANG (SHARED + 2 * SECTOR) /* its next read of the disk hangs */
#define PRESS_MS 250               /* its poll while it waits for memory */

static _Thread_local bool is_session, is_held; /* of the door's threads */
static atomic_bool marked, gate, at_gate, may_pass, hang, hanging, waits;

int __real_poll (struct pollfd *fds, nfds_t nr, int timeout);
int __wrap_poll (struct pollfd *fds, nfds_t nr, int timeout);
int
__wrap_poll (struct pollfd *fds, nfds_t nr, int timeout)
{
  is_session = nr >= 2;
  if (timeout == PRESS_MS)
    waits = true;
  while (is_held && gate && !may_pass) {
    at_gate = true;
    __real_poll (NULL, 0, 1);
  }
  if (is_held) {
    at_gate = false;
    may_pass = false;
  }
  return __real_poll (fds, nr, timeout);
}

ssize_t __real_pread (int fd, void *bytes, size_t count, off_t offset);
ssize_t __wrap_pread (int fd, void *bytes, size_t count, off_t offset);
ssize_t
__wrap_pread (int fd, void *bytes, size_t count, off_t offset)
{
  if (offset == MARK && is_session)
    marked = is_held = true;
  while (offset == HANG && is_held && hang) {
    hanging = true;
    __real_poll (NULL, 0, 1);
  }
  return __real_pread (fd, bytes, count, offset);
}

static void
wait_for (atomic_bool *what)
{
  time_t until = time (NULL) + SITE_DEADLINE_S;

  while (!*what) {
    assert (time (NULL) < until);
    __real_poll (NULL, 0, 1);
  }
}

/* --- memory that is not counted ------------------------------------------ */

/* Every sanitizer has it: the bytes that the process has allocated. */
size_t __sanitizer_get_current_allocated_bytes (void);

/* Send at once as many small requests as a client may have under way. */
static void
fill_up (const struct client *c, uint16_t type)
{
  static uint8_t out[DIRECT_MAX_OPS * (sizeof (struct nbd_request) + SECTOR)];
  size_t size = 0;

  for (uint64_t i = 0; i < DIRECT_MAX_OPS; i++) {
    struct nbd_request header = client_header (type, 0, i, i * SECTOR, SECTOR);

    memcpy (out + size, &header, sizeof header);
    size += sizeof header;
    if (type == NBD_CMD_WRITE)
      size += SECTOR;
  }
  assert (client_send (c, out, size));
  for (unsigned i = 0; i < DIRECT_MAX_OPS; i++) {
    struct answer answer;
    bool simple;

    assert (client_answer (c, &answer, NULL, 0, &simple) && !answer.error);
    if (type == NBD_CMD_READ)
      assert (client_receive (c, buf, SECTOR));
  }
}

/* Small requests take no more than the bytes that each client has free. */
static void
test_small_requests_take_little (void)
{
  enum { NR = 16 };
  struct client clients[NR];
  size_t before;

  bring_up_limited (100, STALL_MS);
  for (int i = 0; i < NR; i++) {
    clients[i] = client_open (door, false);
    assert_works (&clients[i]);
  }
  before = __sanitizer_get_current_allocated_bytes ();
  for (int i = 0; i < NR; i++) {
    fill_up (&clients[i], NBD_CMD_WRITE);
    fill_up (&clients[i], NBD_CMD_READ);
  }
  assert (__sanitizer_get_current_allocated_bytes ()
          < before + NR * DIRECT_FREE_BYTES);
  for (int i = 0; i < NR; i++)
    client_leave (&clients[i]);
  take_down ();
}

/* --- many that share it ------------------------------------------------------
 */

static void *
greedy (void *opaque)
{
  struct client c = client_open (door, false);
  uint8_t *bytes = malloc (BIG);
  uint64_t random = dice + (uintptr_t)opaque, answered = 0;

  assert (bytes);
  for (unsigned round = 0; round < 3; round++) {
    unsigned nr = 3 + (unsigned)(peer_random (&random) % 6);

    for (uint64_t i = 0; i < nr; i++) {
      uint32_t length
          = i == 0 ? SECTOR
                   : (uint32_t)(peer_random (&random) % (BIG / SECTOR) + 1)
                         * SECTOR;

      assert (client_request (&c, NBD_CMD_READ, 0, length, 0, length, NULL));
    }
    for (unsigned i = 0; i < nr; i++) {
      struct answer answer;
      bool simple;

      assert (client_answer (&c, &answer, NULL, 0, &simple));
      assert (answer.error == 0);
      assert (client_receive (&c, bytes, (size_t)answer.cookie));
      answered++;
    }
    assert (client_do (&c, NBD_CMD_WRITE, 0, 0, BIG / 2, bytes) == 0);
  }
  assert (answered >= 9);
  client_leave (&c);
  free (bytes);
  return NULL;
}

/* The requests of sixteen clients are several times the budget: each is served
 * in its turn, and none is taken for a client that does not move.
 */
static void
test_many_share_it (void)
{
  pthread_t threads[16];

  bring_up_limited (100, CLIENT_DEADLINE_S * 1000);
  for (uintptr_t i = 0; i < 16; i++)
    assert (pthread_create (&threads[i], NULL, greedy, (void *)i) == 0);
  for (int i = 0; i < 16; i++)
    pthread_join (threads[i], NULL);
  take_down ();
}

/* A client waits for memory and then finds that its own buffer is large enough:
 * the memory it waited for is given back, however long the client stays.
 */
static void
test_waited_in_vain (void)
{
  enum { NR = 64, FIRST = 200 << 10, SECOND = 100 << 10 };
  struct client deafs[8], idle[NR], c;

  bring_up_limited (100, CLIENT_DEADLINE_S * 1000);
  for (int i = 0; i < 8; i++)
    deafs[i] = client_deaf (BIG);
  for (int i = 0; i < NR; i++) {
    struct answer answer;
    bool simple;

    idle[i] = client_open (door, false);
    assert (client_request (&idle[i], NBD_CMD_READ, 0, 1, 0, FIRST, NULL));
    assert (client_request (&idle[i], NBD_CMD_READ, 0, 2, 0, SECOND, NULL));
    assert (client_answer (&idle[i], &answer, NULL, 0, &simple));
    assert (client_receive (&idle[i], buf, FIRST));
    assert (client_answer (&idle[i], &answer, NULL, 0, &simple));
    assert (client_receive (&idle[i], buf, SECOND));
  }
  for (int i = 0; i < 8; i++)
    client_close (&deafs[i]);
  c = client_open (door, false);
  assert (client_do (&c, NBD_CMD_READ, 0, 0, BIG, buf) == 0);
  client_leave (&c);
  for (int i = 0; i < NR; i++)
    client_leave (&idle[i]);
  take_down ();
}

/* What has arrived. */
static size_t
drain (const struct client *c)
{
  size_t bytes = 0;
  ssize_t n;

  while ((n = recv (c->fd, buf, BIG, MSG_DONTWAIT)) > 0)
    bytes += (size_t)n;
  return bytes;
}

static uint64_t
nr_reads (void)
{
  struct nbdm_status status;

  nbdm_get_status (site.volume, &status);
  return status.reads;
}

/* Takes a whole budget with another client, and waits until it is taken. */
static void
take_all (const struct client *c, const struct client *other)
{
  time_t until = time (NULL) + SITE_DEADLINE_S;
  uint64_t before = nr_reads ();

  assert (client_request (c, NBD_CMD_READ, 0, 1, 0, BIG, NULL));
  for (uint64_t i = 0; i < 7; i++)
    assert (client_request (other, NBD_CMD_READ, 0, i, 0, BIG, NULL));
  while (nr_reads () < before + 8) {
    assert (time (NULL) < until);
    __real_poll (NULL, 0, 1);
  }
}

/* Hold the session's thread before its poll, at the point where the next send
 * sends the last of its answers.
 */
static void
hold_before_last_send (const struct client *c)
{
  size_t left = sizeof (struct nbd_simple_reply) * 2 + BIG + SECTOR, came;

  gate = true;
  assert (client_request (c, NBD_CMD_READ, 0, 2, MARK, SECTOR, NULL));
  for (;;) {
    wait_for (&at_gate);
    came = drain (c);
    left -= came;
    assert (left > 0);
    if (left <= came)
      return;
    may_pass = true;
    while (may_pass)
      __real_poll (NULL, 0, 1);
  }
}

/* A session gives memory back for which another one waits, and then the local
 * disk keeps the session: it wakes the other session before that call, and
 * later wake-ups arrive too.
 */
static void
test_rings_before_the_disk (void)
{
  struct client kept, deaf_one, c;

  bring_up_limited (100, CLIENT_DEADLINE_S * 1000);
  kept = client_open (door, false);
  do
    assert (client_do (&kept, NBD_CMD_READ, 0, MARK, SECTOR, buf) == 0);
  while (!marked);
  deaf_one = client_open (door, false);
  take_all (&kept, &deaf_one);
  c = client_open (door, false);
  waits = false;
  assert (client_request (&c, NBD_CMD_READ, 0, 1, 0, BIG, NULL));
  wait_for (&waits);
  hold_before_last_send (&kept);
  hang = true;
  assert (client_request (&kept, NBD_CMD_READ, 0, 3, HANG, SECTOR, NULL));
  gate = false;
  wait_for (&hanging);
  assert (client_receive (&c, buf, sizeof (struct nbd_simple_reply)));
  assert (client_receive (&c, buf, BIG));
  nbdm_server_end (served.server);
  client_assert_closed (&c);
  hang = false;
  client_close (&c);
  client_close (&deaf_one);
  client_close (&kept);
  door_close (&served);
  open_door ();
  take_down ();
}

/* --- a buffer that is freed before it is taken ------------------------------
 */

static atomic_bool press, freed, uncounted;

static void *
press_main (void *opaque)
{
  budget_press (opaque);
  return NULL;
}

/* Search for memory as a waiting session does. Returns whether that freed a
 * buffer as large as `room`.
 */
static bool
press_frees (struct session *session, size_t room)
{
  pthread_t other;
  bool had, has;

  pthread_mutex_lock (&session->lock);
  had = session->kept >= room;
  pthread_mutex_unlock (&session->lock);
  assert (pthread_create (&other, NULL, press_main, session->clients) == 0);
  pthread_join (other, NULL);
  pthread_mutex_lock (&session->lock);
  has = session->kept >= room;
  pthread_mutex_unlock (&session->lock);
  return had && !has;
}

struct op *__real_op_get (struct session *session, size_t room);
struct op *__wrap_op_get (struct session *session, size_t room);
struct op *
__wrap_op_get (struct session *session, size_t room)
{
  bool watched = press && room > SECTOR && press_frees (session, room);
  struct op *op = __real_op_get (session, room);

  if (watched) {
    pthread_mutex_lock (&session->lock);
    if (session->charged + DIRECT_FREE_BYTES < session->bytes + session->kept)
      uncounted = true;
    pthread_mutex_unlock (&session->lock);
    freed = true;
  }
  return op;
}

/* A session finds a buffer of its own, and a waiting session frees it before
 * the first one takes it: the buffer that is allocated instead is counted.
 */
static void
test_spare_buffer_is_freed (void)
{
  time_t until = time (NULL) + SITE_DEADLINE_S;
  struct client c;

  bring_up_limited (100, CLIENT_DEADLINE_S * 1000);
  c = client_open (door, false);
  freed = uncounted = false;
  press = true;
  while (!freed) {
    assert (time (NULL) < until);
    assert (client_do (&c, NBD_CMD_READ, 0, 0, BIG / 2, buf) == 0);
  }
  press = false;
  assert (!uncounted);
  client_leave (&c);
  take_down ();
}

static _Atomic (struct session *) settles; /* at the second of these locks */

int __real_pthread_mutex_lock (pthread_mutex_t *mutex);
int __wrap_pthread_mutex_lock (pthread_mutex_t *mutex);
int
__wrap_pthread_mutex_lock (pthread_mutex_t *mutex)
{
  static unsigned nr;
  struct session *s = settles;

  if (s && mutex == &s->lock && ++nr == 2) {
    settles = NULL;
    __real_pthread_mutex_lock (mutex);
    budget_settle_locked (s);
    pthread_mutex_unlock (mutex);
  }
  return __real_pthread_mutex_lock (mutex);
}

/* A small request takes a large spare buffer, and another one of the session
 * ends before that is noted: the large one stays counted.
 */
static void
test_larger_buffer_stays_counted (void)
{
  struct clients clients = { 0 };
  struct session session = { .clients = &clients, .promised = SECTOR };
  struct op *op = calloc (1, sizeof *op);

  assert (op);
  budget_init (&clients.budget, 2 * BIG, STALL_MS * NS_PER_MS);
  pthread_mutex_init (&session.lock, NULL);
  op->room = session.kept = BIG;
  op->buf = malloc (BIG);
  session.spare = op;
  session.charged = clients.budget.used = BIG;
  settles = &session;
  assert (op_get (&session, SECTOR) == op && settles == NULL);
  assert (session.bytes == BIG);
  assert (session.charged + DIRECT_FREE_BYTES >= BIG);
  op_drop (op);
  pthread_mutex_lock (&session.lock);
  spare_free_locked (&session);
  pthread_mutex_unlock (&session.lock);
  assert (session.charged == 0 && clients.budget.used == 0);
  pthread_mutex_destroy (&session.lock);
  budget_end (&clients.budget);
}

int
main (void)
{
  dice = site_seed (1);
  buf = calloc (1, BIG);
  assert (buf);
  RUN (test_small_requests_take_little);
  RUN (test_many_share_it);
  RUN (test_waited_in_vain);
  RUN (test_rings_before_the_disk);
  RUN (test_spare_buffer_is_freed);
  RUN (test_larger_buffer_stays_counted);
  free (buf);
  return 0;
}
