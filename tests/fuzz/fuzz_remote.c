/* SPDX-License-Identifier: BSD-3-Clause */

/* A server's bytes for a connection to a remote, by libFuzzer.
 *
 * The test has the server's end of the socket, and no second thread runs by
 * itself.  An input is a list of events: a command is issued, the server takes
 * bytes, it sends an answer (right, forged or cut) or raw bytes.  Some events
 * happen in the middle of a sendmsg, which then sends all, some or nothing: so
 * answers arrive while their commands are still being sent.
 *
 * For any input: every command ends when the connection ends; a command that
 * ended is freed at once, so that a later access is found; and no command
 * succeeds that was not sent completely.
 */

#define _GNU_SOURCE

#include "wire/conn.h"
#include "../c/villain.h"

#include <sched.h>

#define MAX_ERRANDS 48u
#define MAX_UNDER_WAY 16u
#define LARGEST (600u << 10) /* more than a socket takes */
#define MINUTE_MS 60000u

int LLVMFuzzerInitialize (int *argc, char ***argv);
int LLVMFuzzerTestOneInput (const uint8_t *data, size_t size);
ssize_t __real_conn_sendmsg (int fd, const struct msghdr *msg, int flags);
ssize_t __wrap_conn_sendmsg (int fd, const struct msghdr *msg, int flags);

enum event {
  ISSUE,
  PUSH,
  TICK,
  TAKE,      /* the server takes bytes */
  ANSWER,    /* with a cookie, an error or a payload, or some of it */
  RAW,       /* bytes of the input */
  CUT,       /* the server closes */
  KILL,      /* we do */
  MEANWHILE, /* the next events happen in a sendmsg */
  NR_EVENTS
};

enum outcome { ALL, SOME, FULL, INTERRUPTED, NR_OUTCOMES };

static struct villain v;
static const uint8_t *input;
static size_t left;
static bool plain;

static struct errand *errands[MAX_ERRANDS]; /* by cookie - 1; NULL: ended */
static uint64_t ends[MAX_ERRANDS];          /* of each request in the stream */
static unsigned nr, under_way;
static uint64_t stream, went; /* bytes of requests: issued, and sent */

static struct {
  unsigned events;
  enum outcome outcome;
} meanwhile;

int
LLVMFuzzerInitialize (int *argc, char ***argv)
{
  (void)argc;
  (void)argv;
  return 0;
}

static uint8_t
next (void)
{
  if (left == 0)
    return 0;
  left--;
  return *input++;
}

/* --- our side --------------------------------------------------------------
 */

/* A command that ended is gone, as if it had been on a stack. */
static void
bury (void)
{
  for (unsigned i = 0; i < nr; i++) {
    struct errand *e = errands[i];

    if (e == NULL || !errand_done (&v, e))
      continue;
    if (plain && e->cmd.error == 0)
      assert (went >= ends[i]);
    free (e);
    errands[i] = NULL;
    under_way--;
  }
}

static void
issue (void)
{
  static const uint32_t sizes[] = { 512, 4096, 65536, LARGEST };
  uint8_t how = next ();
  enum command_kind kind = how % 4;
  struct errand *e;

  if (nr == MAX_ERRANDS || under_way == MAX_UNDER_WAY)
    return;
  e = errand_make (kind, sizes[how / 4 % 4]);
  stream += sizeof (struct wire_request)
            + (kind == COMMAND_WRITE ? e->cmd.length : 0);
  ends[nr] = stream;
  errands[nr++] = e; /* now: a sendmsg of its own may answer it */
  under_way++;
  if (conn_issue (v.conn, &e->cmd, &e->waiter) < 0) {
    assert (conn_dead (v.conn));
    free (e);
    errands[--nr] = NULL;
    under_way--;
    stream = nr > 0 ? ends[nr - 1] : 0;
  }
}

/* --- the server's -----------------------------------------------------------
 */

static void
give (const void *bytes, size_t size)
{
  ssize_t n = send (v.fd, bytes, size, MSG_DONTWAIT | MSG_NOSIGNAL);

  (void)n; /* the client may be gone, or not read */
}

static void
take (void)
{
  static uint8_t buf[1u << 18];
  size_t size = (size_t)next () * next ();
  ssize_t n = recv (v.fd, buf, size, MSG_DONTWAIT);

  (void)n;
}

static void
answer (void)
{
  static const uint8_t payload[LARGEST];
  uint8_t cookie = next () % (MAX_ERRANDS + 2), how = next ();
  const struct wire_reply reply = { .magic = htobe32 (REPLY_MAGIC),
                                    .error = htobe32 (how & 1 ? how : 0),
                                    .cookie = htobe64 (cookie) };
  size_t size = 0;

  if (cookie > 0 && cookie <= nr && errands[cookie - 1]
      && errands[cookie - 1]->cmd.kind == COMMAND_READ)
    size = errands[cookie - 1]->cmd.length;
  give (&reply, how & 2 ? how % sizeof reply : sizeof reply);
  if (!(how & 1) && size > 0)
    give (payload, how & 4 ? size / (how | 1) : size);
}

static void
raw (void)
{
  size_t size = next () % 64;

  if (size > left)
    size = left;
  give (input, size);
  input += size;
  left -= size;
}

/* --- a thread that takes in answers while another one sends ------------------
 */

static pthread_t helper;
static bool helping;
static atomic_bool helped;

static void *
help (void *opaque)
{
  (void)opaque;
  conn_tick (v.conn, MINUTE_MS, 0);
  helped = true;
  return NULL;
}

static void
join_helper (void)
{
  if (helping)
    pthread_join (helper, NULL);
  helping = false;
}

/* One that finds the end waits for the sendmsg, and is left to it. */
static void
tick_meanwhile (void)
{
  if (helping)
    return;
  helped = false;
  helping = true;
  assert (pthread_create (&helper, NULL, help, NULL) == 0);
  while (!helped && !conn_dead (v.conn))
    sched_yield ();
  if (helped)
    join_helper ();
}

/* --- events -----------------------------------------------------------------
 */

static void
happen (bool nested)
{
  switch (next () % NR_EVENTS) {
  case ISSUE:
    if (!nested)
      issue ();
    break;
  case PUSH:
    if (!nested)
      conn_push (v.conn);
    break;
  case TICK:
    if (nested)
      tick_meanwhile ();
    else
      conn_tick (v.conn, MINUTE_MS, 0);
    break;
  case TAKE:
    take ();
    break;
  case ANSWER:
    answer ();
    break;
  case RAW:
    raw ();
    break;
  case CUT:
    shutdown (v.fd, SHUT_RDWR);
    break;
  case KILL:
    if (!nested)
      conn_kill (v.conn, "the fuzzer did");
    break;
  case MEANWHILE:
    if (nested)
      break;
    meanwhile.events = next () % 8;
    meanwhile.outcome = next () % NR_OUTCOMES;
  }
}

ssize_t
__wrap_conn_sendmsg (int fd, const struct msghdr *msg, int flags)
{
  struct iovec iov = msg->msg_iov[0];
  struct msghdr some = { .msg_iov = &iov, .msg_iovlen = 1 };
  enum outcome outcome = meanwhile.outcome;
  unsigned events = meanwhile.events;
  ssize_t n = -1;
  int err = outcome == FULL ? EAGAIN : EINTR;

  meanwhile.events = 0;
  meanwhile.outcome = ALL;
  if (outcome == SOME)
    iov.iov_len = iov.iov_len / 2 + 1;
  if (outcome == ALL || outcome == SOME) {
    n = __real_conn_sendmsg (fd, outcome == ALL ? msg : &some, flags);
    err = errno;
  }
  went += n > 0 ? (size_t)n : 0;
  while (events-- > 0) {
    happen (true);
    bury ();
  }
  errno = err;
  return n;
}

static void
finish (void)
{
  villain_hang_up (&v);
  for (unsigned n = 0; under_way > 0 || n < 2; n++) {
    assert (n < 10000);
    conn_tick (v.conn, MINUTE_MS, 0);
    join_helper ();
    bury ();
  }
  assert (conn_dead (v.conn));
}

int
LLVMFuzzerTestOneInput (const uint8_t *data, size_t size)
{
  if (size < 2)
    return 0;
  input = data;
  left = size;
  nr = under_way = 0;
  stream = went = 0;
  meanwhile.events = meanwhile.outcome = 0;
  plain = next () % 4 != 0;
  setenv ("NBDM_TRANSPORT", plain ? "" : "libnbd", 1);
  v = (struct villain){ .room = 0 };
  villain_connect (&v);
  while (left > 0) {
    happen (false);
    join_helper ();
    bury ();
  }
  finish ();
  villain_end (&v);
  return 0;
}
