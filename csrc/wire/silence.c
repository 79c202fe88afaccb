/* SPDX-License-Identifier: BSD-3-Clause */

/* How long a connection may be silent (rule 13).
 *
 * The deadline bounds silence, not the time of the work: a link of 256 kbit/s
 * needs 17 minutes for one write of 32 MiB, and ending the connection would
 * only send the same bytes again.  So an answer ends the silence, and each byte
 * that moves shortens it by the time that it takes at SLOWEST.  A server that
 * lets one byte a second pass gains next to nothing; a link at SLOWEST is never
 * silent.  So a command alone on its connection ends after its deadline and its
 * bytes at SLOWEST, whatever the server does.
 *
 * Which bytes count: all received ones, as the protocol allows only answers,
 * but not those of a TLS record that holds none, as a server may send these for
 * ever; sent ones up to the end of the oldest command.  Bytes sent after that
 * prove nothing about the server: the kernel of its host accepts megabytes for
 * a process that hangs.
 *
 * How they are counted: for TCP the kernel counts received and acknowledged
 * bytes.  For other sockets the other side has read the bytes that were sent
 * and are no longer in the socket.  That is an estimate, as the kernel counts
 * its own structures too.
 *
 * A command that starves while the server answers others must not hang its
 * client: it has NBDM_STARVED_DEADLINES, and the time of the bytes before it at
 * SLOWEST.
 *
 * The ticker asks a server that has no command: it reads one small block, the
 * same one each time.  Every server can do that, it changes nothing, and after
 * the first time it comes from a cache, where a flush might make the disk
 * write.  An error is an answer as well.
 */

#include <errno.h>
#include <netinet/in.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include <linux/sockios.h>
#include <linux/tcp.h>

#include "api.h"
#include "base/atomics.h"
#include "base/clock.h"
#include "base/error.h"
#include "wire/conn.h"
#include "wire/protocol.h"
#include "wire/silence.h"
#include "wire/stream.h"
#include "wire/transport.h"

#define SLOWEST (8u << 10)        /* bytes a second: a quarter of 256 kbit/s */
#define LOOK_NS (NS_PER_S / 25)   /* silent for so long: ask the kernel */
#define ASK_NS (9 * NS_PER_S / 2) /* ask after; and as long for the answer */
#define ASK_MIN_NS NS_PER_S /* but not sooner, however short the deadline */
#define ASK_BYTES 512u
#define ASK_MAX_BYTES (64u << 10) /* no server has larger blocks */

/* --- Bytes ------------------------------------------------------------- */

uint64_t
command_bytes (const struct command *cmd)
{
  bool data = cmd->kind == COMMAND_READ || cmd->kind == COMMAND_WRITE;

  return sizeof (struct nbd_request) + sizeof (struct nbd_simple_reply)
         + (data ? cmd->length : 0);
}

uint64_t
socket_queue (const struct conn *conn)
{
  int queue;

  return ioctl (conn->fd, SIOCOUTQ, &queue) == 0 && queue > 0 ? (uint64_t)queue
                                                              : 0;
}

void
counter_add (atomic_u64 *counter, uint64_t bytes)
{
  uint64_t before = atomic_load_explicit (counter, memory_order_relaxed);

  atomic_store_explicit (counter, before + bytes, memory_order_relaxed);
}

static bool
ask_kernel (const struct conn *conn, struct traffic *traffic)
{
  struct tcp_info info;
  socklen_t size = sizeof info;

  if (getsockopt (conn->fd, IPPROTO_TCP, TCP_INFO, &info, &size) < 0
      || size < offsetof (struct tcp_info, tcpi_bytes_received)
                    + sizeof info.tcpi_bytes_received)
    return false;
  traffic->in = info.tcpi_bytes_received;
  traffic->out = info.tcpi_bytes_acked;
  return true;
}

/* What has come over TLS: bytes that were opened, and part of a record, which
 * takes two seconds at SLOWEST.
 */
static uint64_t
came_by_tls (const struct conn *conn, uint64_t before)
{
  uint64_t bytes = atomic_load_explicit (&conn->came, memory_order_relaxed);

  bytes += stream_partial (&conn->stream);
  return bytes > before ? bytes : before;
}

/* Bytes that have moved since the last time. */
static struct traffic
new_traffic (struct conn *conn)
{
  struct silence *s = &conn->silence;
  struct traffic before = s->seen, delta;
  uint64_t queue = 0;

  if (!conn->kernel_counts || !ask_kernel (conn, &s->seen)) {
    s->seen.in = atomic_load_explicit (&conn->came, memory_order_relaxed);
    s->seen.out = atomic_load_explicit (&conn->went, memory_order_relaxed);
    queue = socket_queue (conn);
  }
  if (conn->secrets)
    s->seen.in = came_by_tls (conn, before.in);
  delta.in = s->seen.in - before.in;
  delta.out = s->seen.out - before.out + s->queue;
  delta.out = delta.out > queue ? delta.out - queue : 0;
  s->queue = queue;
  return delta;
}

static uint64_t
slowest_ns (uint64_t bytes)
{
  return bytes / SLOWEST * NS_PER_S + bytes % SLOWEST * NS_PER_S / SLOWEST;
}

/* --- Silence ----------------------------------------------------------- */

static void
heard (struct silence *s, uint64_t when)
{
  if (when > s->heard_ns)
    s->heard_ns = when;
}

/* What has moved since the last look shortens the silence. */
static void
look_locked (struct conn *conn, uint64_t now)
{
  struct silence *s = &conn->silence;
  struct traffic moved = new_traffic (conn);
  uint64_t since = s->heard_ns;

  if (s->judged_ns != TAILQ_FIRST (&conn->commands)->issued_ns) {
    s->judged_ns = TAILQ_FIRST (&conn->commands)->issued_ns;
    s->owed
        = 2 * (socket_queue (conn) + conn->transport->unsent_of_oldest (conn));
    moved.out = 0;
  }
  if (moved.out > s->owed)
    moved.out = s->owed;
  s->owed -= moved.out;
  since += slowest_ns (moved.in + moved.out);
  heard (s, since < now ? since : now);
}

bool
is_ask (const struct conn *conn, const struct command *cmd)
{
  return cmd == &conn->silence.ask;
}

static double
seconds (uint64_t ns)
{
  return (double)(ns / (NS_PER_S / 10)) / 10;
}

/* Must the connection be given up?  Then `why` has the reason. */
static bool
overdue_locked (struct conn *conn, uint64_t deadline_ns, uint64_t hurry_ns,
                uint64_t now, char *why)
{
  const struct command *oldest = TAILQ_FIRST (&conn->commands);
  struct silence *s = &conn->silence;
  bool ask = is_ask (conn, oldest);
  uint64_t limit = ask && deadline_ns > ASK_NS ? ASK_NS : deadline_ns;
  uint64_t starved
      = NBDM_STARVED_DEADLINES * deadline_ns + slowest_ns (oldest->bytes);

  heard (s, conn->answered_ns);
  heard (s, oldest->issued_ns);
  heard (s, hurry_ns);
  if (hurry_ns == 0 && now > s->heard_ns + LOOK_NS)
    look_locked (conn, now);
  if (now > s->heard_ns && now - s->heard_ns > limit) {
    if (ask)
      snprintf (why, NBDM_REASON_LEN, "the server has not answered for %g s",
                seconds (now - conn->answered_ns));
    else
      snprintf (why, NBDM_REASON_LEN, "a command was not answered within %g s",
                (double)deadline_ns / NS_PER_S);
    return true;
  }
  if (now < oldest->issued_ns || now - oldest->issued_ns <= starved)
    return false;
  snprintf (why, NBDM_REASON_LEN, "a command was not answered within %g s",
            seconds (now - oldest->issued_ns));
  return true;
}

static bool
ask_is_due_locked (const struct conn *conn, uint64_t deadline_ns, uint64_t now)
{
  uint64_t after = deadline_ns < ASK_NS ? deadline_ns : ASK_NS;
  uint64_t since = conn->answered_ns;

  if (after < ASK_MIN_NS)
    after = ASK_MIN_NS;
  return conn->silence.buf && now > since && now - since > after;
}

/* Only the ticker asks, and only when nothing is outstanding. */
static void
ask (struct conn *conn)
{
  struct silence *s = &conn->silence;
  uint64_t length
      = conn->info.min_block > ASK_BYTES ? conn->info.min_block : ASK_BYTES;

  if (length > conn->info.size)
    length = conn->info.size;
  s->waiter = (struct waiter)WAITER_INIT;
  s->ask = (struct command){ .kind = COMMAND_READ,
                             .buf = s->buf,
                             .length = length };
  (void)conn_issue (conn, &s->ask, &s->waiter);
  conn_push (conn);
}

void
silence_tick (struct conn *conn, uint64_t deadline_ns, uint64_t hurry_ns)
{
  char why[NBDM_REASON_LEN];
  bool overdue = false, due = false;
  uint64_t now;

  pthread_mutex_lock (&conn->lock);
  now = now_ns ();
  if (!conn->dead && !TAILQ_EMPTY (&conn->commands))
    overdue = overdue_locked (conn, deadline_ns, hurry_ns, now, why);
  else if (!conn->dead)
    due = ask_is_due_locked (conn, deadline_ns, now);
  /* Clients have waited for it already, so no hold follows: see state.c. */
  if (overdue && !is_ask (conn, TAILQ_FIRST (&conn->commands)))
    conn->overdue = true;
  pthread_mutex_unlock (&conn->lock);
  if (overdue)
    conn_kill (conn, why);
  else if (due)
    ask (conn);
}

/* --- Coming and going -------------------------------------------------- */

int
silence_init (struct conn *conn)
{
  struct silence *s = &conn->silence;
  struct traffic traffic;
  uint32_t block = conn->info.min_block;

  conn->answered_ns = s->heard_ns = now_ns ();
  conn->kernel_counts = ask_kernel (conn, &traffic);
  if (block > ASK_MAX_BYTES || conn->info.size == 0)
    return 0;
  s->buf = malloc (block > ASK_BYTES ? block : ASK_BYTES);
  return s->buf ? 0 : set_error (-ENOMEM, "connect");
}

void
silence_free (struct conn *conn)
{
  free (conn->silence.buf);
}
