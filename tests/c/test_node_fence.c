/* SPDX-License-Identifier: BSD-3-Clause */

/* The fence: once it has returned, no write of a connection that it cut lands.
 *
 * Each schedule holds a write of the earlier session at one point of its way,
 * and fences.  The fence must not return while the write can still land.  Then
 * the write is let go, the fence returns, and a later session writes the same
 * place: its bytes stay.
 */

#define _GNU_SOURCE

#include "api.h"
#include "wire/protocol.h"
#include "schedules.h"
#include "door.h"
#include "nbd_client.h"
#include "tls_relay.h"
#include "node_door.h"

#include "doors/direct.h"
#include "doors/handshake.h"

#define SHORT_MS 200u
#define LONG_MS 30000u
#define AT (5u * REGION) /* where both sessions write */
#define LARGE (1u << 20) /* bytes; a worker writes them */
#define OLD 1
#define NEW 2

static struct door served;
static uint8_t data[LARGE];

/* --- points on the way of a request -------------------------------------- */

static atomic_bool hold_submit, hold_worker, hold_granted;

void __real_op_submit (struct op *op);
void __wrap_op_submit (struct op *op);
int __real_nbdm_pwrite (struct nbdm *v, const void *buf, uint32_t count,
                        uint64_t offset, uint32_t flags);
int __wrap_nbdm_pwrite (struct nbdm *v, const void *buf, uint32_t count,
                        uint64_t offset, uint32_t flags);
int __real_handshake_enter (struct handshake *h, struct exported *e,
                            bool block_size, bool description);
int __wrap_handshake_enter (struct handshake *h, struct exported *e,
                            bool block_size, bool description);

/* All of the request has come, and the session's thread has not begun it. */
void
__wrap_op_submit (struct op *op)
{
  if (atomic_exchange (&hold_submit, false))
    stand_at ("gate");
  __real_op_submit (op);
}

/* A worker has taken the request out of its queue. */
int
__wrap_nbdm_pwrite (struct nbdm *v, const void *buf, uint32_t count,
                    uint64_t offset, uint32_t flags)
{
  if (atomic_exchange (&hold_worker, false))
    stand_at ("gate");
  return __real_nbdm_pwrite (v, buf, count, offset, flags);
}

/* The claim is granted, and the session's thread does not know yet. */
int
__wrap_handshake_enter (struct handshake *h, struct exported *e,
                        bool block_size, bool description)
{
  if (atomic_exchange (&hold_granted, false))
    stand_at ("gate");
  return __real_handshake_enter (h, e, block_size, description);
}

/* --- the node ------------------------------------------------------------- */

static void
open_node (void)
{
  char path[96];

  if (getenv ("NBDM_TEST_TLS")) {
    door_psk = tls_relay_psk_file ();
    client_secure = tls_relay;
  }
  snprintf (path, sizeof path, "%s/direct", site.dir);
  door_open (&served, site.volume, path);
  node_door_begin (&served, grant_all);
}

static void
bring_up_node (void)
{
  bring_up (0, 1000);
  open_node ();
}

/* A write of the earlier session whose answer no one awaits. */
static struct client
begin_write (uint32_t length)
{
  struct client c = node_open (&served, CLAIM);

  memset (data, OLD, length);
  assert (client_request (&c, NBD_CMD_WRITE, 0, 1, AT, length, data));
  return c;
}

static int
fence (uint32_t timeout_ms)
{
  return nbdm_server_fence (served.server, 0, timeout_ms);
}

/* The fence has returned: what the later session writes stays. */
static void
assert_fenced (struct client *old)
{
  struct client c;

  WAIT_FOR (atomic_load (&nr_ended) == 1);
  assert (atomic_load (&nr_clean) == 0);
  c = node_open (&served, NEXT_CLAIM);
  memset (data, NEW, LARGE);
  assert (client_do (&c, NBD_CMD_WRITE, NBD_CMD_FLAG_FUA, AT, LARGE, data)
          == 0);
  client_leave (&c);
  client_close (old);
  WAIT_FOR (atomic_load (&nr_ended) == 2);
  assert (atomic_load (&nr_clean) == 1);
  node_door_end (&served);
  for (uint32_t i = 0; i < LARGE; i++)
    assert (site.image[AT + i] == NEW);
}

/* A write stands at the gate: the fence waits for it, as often as it is tried.
 */
static void
fence_at_gate (struct client *old)
{
  wait_at_gate ();
  assert (fence (SHORT_MS) == -ETIMEDOUT);
  ASSERT_SAYS ("still at the disk");
  assert (fence (SHORT_MS) == -ETIMEDOUT);
  open_gate ();
  assert (fence (LONG_MS) >= 0);
  assert_fenced (old);
}

/* --- the schedules -------------------------------------------------------- */

static void
a_hung_disk (void)
{
  struct client old;

  bring_up_node ();
  old = begin_write (SECTOR);
  fence_at_gate (&old);
}

static void
a_hung_disk_under_a_worker (void)
{
  struct client old;

  bring_up_node ();
  old = begin_write (LARGE);
  fence_at_gate (&old);
}

/* Another thread makes the call: the session's request must last as long. */
static void
a_hung_disk_with_a_deadline (void)
{
  struct client old;

  make_volume (SIZE, REGION, 0, 1000);
  site.params.local_deadline_ms = SHORT_MS / 2;
  open_volume ();
  open_node ();
  old = begin_write (SECTOR);
  fence_at_gate (&old);
}

static void
received_and_not_begun (void)
{
  struct client old;

  bring_up_node ();
  atomic_store (&hold_submit, true);
  old = begin_write (SECTOR);
  fence_at_gate (&old);
}

static void
in_the_queue_of_a_worker (void)
{
  struct client old;

  bring_up_node ();
  atomic_store (&hold_worker, true);
  old = begin_write (LARGE);
  fence_at_gate (&old);
}

/* The half that has come never lands, and is not waited for. */
static void
half_received (void)
{
  struct client old;
  struct nbd_request head;

  bring_up_node ();
  old = node_open (&served, CLAIM);
  old.may_end = true;
  memset (data, OLD, LARGE);
  head = client_header (NBD_CMD_WRITE, 0, 1, AT, LARGE);
  assert (client_send (&old, &head, sizeof head));
  assert (client_send (&old, data, LARGE / 2));
  assert (fence (LONG_MS) == 1);
  (void)client_send (&old, data, LARGE / 2);
  assert_fenced (&old);
}

/* Granted, and cut before its thread runs: no request of it is taken. */
static void
granted_and_not_entered (void)
{
  const char *name = CLAIM;
  struct client old;
  uint8_t option[512];
  uint32_t length = (uint32_t)strlen (name), size = htobe32 (length);

  bring_up_node ();
  atomic_store (&hold_granted, true);
  old = node_greet (&served);
  old.may_end = true;
  memcpy (option, &size, sizeof size);
  memcpy (option + sizeof size, name, length);
  memset (option + sizeof size + length, 0, 2);
  client_option (&old, NBD_OPT_GO, option, (uint32_t)sizeof size + length + 2);
  memset (data, OLD, LARGE);
  assert (client_request (&old, NBD_CMD_WRITE, 0, 1, AT, SECTOR, data));
  fence_at_gate (&old);
}

/* A write behind one that hangs: both are in before the fence, or neither. */
static void
two_connections (void)
{
  struct client old, second;

  bring_up_node ();
  second = node_open (&served, CLAIM);
  old = begin_write (SECTOR);
  wait_at_gate ();
  assert (fence (SHORT_MS) == -ETIMEDOUT);
  second.may_end = true;
  client_assert_closed (&second);
  client_close (&second);
  assert (fence (SHORT_MS) == -ETIMEDOUT);
  open_gate ();
  assert (fence (LONG_MS) >= 0);
  assert_fenced (&old);
}

/* The connections of the kept call stay, and nothing else does. */
static uint64_t kept;

static void
grant_and_note (struct direct_server *server, const struct nbdm_call *call)
{
  if (call->kind == NBDM_CALL_CLAIM
      && memcmp (call->words, NEXT_CLAIM, call->size) == 0)
    kept = call->number;
  grant_all (server, call);
}

static void
keep_one (void)
{
  struct client old, c;

  bring_up_node ();
  node_judge = grant_and_note;
  old = node_open (&served, CLAIM);
  c = node_open (&served, NEXT_CLAIM);
  assert (nbdm_server_fence (served.server, kept, LONG_MS) == 1);
  old.may_end = true;
  client_assert_closed (&old);
  assert (client_do (&c, NBD_CMD_FLUSH, 0, 0, 0, NULL) == 0);
  client_leave (&c);
  client_close (&old);
  WAIT_FOR (atomic_load (&nr_ended) == 2);
  assert (atomic_load (&nr_clean) == 1);
  node_door_end (&served);
}

/* It says goodbye before its write is answered: that is no clean end, and the
 * end is told once the write is no longer under way.  Both come together, so
 * the thread that has given the write to a worker reads the goodbye next.
 */
static void
goodbye_while_it_writes (void)
{
  struct __attribute__ ((packed)) {
    struct nbd_request write;
    uint8_t payload[SECTOR];
    struct nbd_request goodbye;
  } all = { .write = client_header (NBD_CMD_WRITE, 0, 1, AT, SECTOR),
            .goodbye = client_header (NBD_CMD_DISC, 0, 2, 0, 0) };
  struct answer answer;
  struct client c;
  bool simple;

  make_volume (SIZE, REGION, 0, 1000);
  site.params.local_deadline_ms = LONG_MS; /* a worker executes it */
  open_volume ();
  open_node ();
  atomic_store (&hold_worker, true);
  c = node_open (&served, CLAIM);
  assert (client_send (&c, &all, sizeof all));
  wait_at_gate ();
  poll (NULL, 0, SHORT_MS);
  assert (atomic_load (&nr_ended) == 0);
  open_gate ();
  assert (client_answer (&c, &answer, NULL, 0, &simple) && answer.error == 0);
  WAIT_FOR (atomic_load (&nr_ended) == 1);
  assert (atomic_load (&nr_clean) == 0);
  client_close (&c);
  node_door_end (&served);
}

static const struct schedule schedules[] = {
  { "a hung disk", "local_write:1=wait:gate", a_hung_disk },
  { "a hung disk under a worker", "local_write:1=wait:gate",
    a_hung_disk_under_a_worker },
  { "a hung disk with a deadline", "local_write:1=wait:gate",
    a_hung_disk_with_a_deadline },
  { "received and not begun", NULL, received_and_not_begun },
  { "in the queue of a worker", NULL, in_the_queue_of_a_worker },
  { "half received", NULL, half_received },
  { "granted and not entered", NULL, granted_and_not_entered },
  { "two connections", "local_write:1=wait:gate", two_connections },
  { "keep one", NULL, keep_one },
  { "goodbye while it writes", NULL, goodbye_while_it_writes },
};

int
main (int argc, char *argv[])
{
  return run_schedules (schedules, sizeof schedules / sizeof *schedules, argc,
                        argv);
}
