/* SPDX-License-Identifier: BSD-3-Clause */

/* A remote that breaks the protocol at each byte of its answers: they are cut,
 * garbled, early, sent twice, or answer nothing that was sent. In each case
 * every command ends, the unanswered ones as lost, and no thread touches a
 * command after its end.
 */

#define _GNU_SOURCE

#include "api.h"
#include "base/error.h"
#include "wire/conn.h"
#include "wire/protocol.h"
#include "wire/transport.h"
#include "villain.h"

#define SECTOR 512u
#define REPLY sizeof (struct wire_reply)
#define ERRANDS 4u
#define LONG_MS 60000u

static bool is_libnbd;
static struct villain v;

/* --- what is asked -------------------------------------------------------- */

static struct errand *errands[ERRANDS];
static const enum command_kind kinds[ERRANDS]
    = { COMMAND_READ, COMMAND_WRITE, COMMAND_FLUSH, COMMAND_READ };

static void
issue_all (void)
{
  for (unsigned i = 0; i < ERRANDS; i++) {
    errands[i] = errand_make (kinds[i], SECTOR);
    memset (errands[i]->data, 0xaa, kinds[i] == COMMAND_FLUSH ? 0 : SECTOR);
    assert (conn_issue (v.conn, &errands[i]->cmd, &errands[i]->waiter) == 0);
  }
  conn_push (v.conn);
}

/* Only tick, with a deadline that is never reached: the server's act alone must
 * end the commands.
 */
static void
let_end (void)
{
  for (unsigned i = 0; i < ERRANDS; i++)
    for (unsigned n = 0; !errand_done (&v, errands[i]); n++) {
      assert (n < 10000);
      conn_tick (v.conn, LONG_MS, 0);
    }
}

static void
free_all (void)
{
  for (unsigned i = 0; i < ERRANDS; i++)
    free (errands[i]);
}

/* --- answers, byte by byte ------------------------------------------------ */

static uint8_t answers[ERRANDS * (REPLY + SECTOR)];
static size_t ends[ERRANDS + 1]; /* of each answer, in these bytes */

/* Receive all requests, and write down the answers of an honest server. */
static void
prepare_answers (void)
{
  uint8_t payload[SECTOR];
  size_t at = 0;

  for (unsigned i = 0; i < ERRANDS; i++) {
    const struct wire_request request = villain_request (&v);
    const struct wire_reply reply
        = { .magic = htobe32 (REPLY_MAGIC), .cookie = request.cookie };

    memcpy (answers + at, &reply, REPLY);
    at += REPLY;
    if (kinds[i] == COMMAND_WRITE)
      assert (wire_receive (v.fd, payload, SECTOR));
    if (kinds[i] == COMMAND_READ) {
      memset (answers + at, 0x11, SECTOR);
      at += SECTOR;
    }
    ends[i + 1] = at;
  }
}

static size_t
header_end (unsigned i)
{
  return ends[i] + REPLY;
}

/* A bit of a payload, or of the error of a command without one: the client
 * cannot notice.
 */
static bool
is_plausible (size_t at)
{
  for (unsigned i = 0; i < ERRANDS; i++)
    if ((at >= header_end (i) && at < ends[i + 1])
        || (kinds[i] != COMMAND_READ && at >= ends[i] + 4 && at < ends[i] + 8))
      return true;
  return false;
}

/* Nothing but `whole` bytes of the answers were honest. */
static void
judge (size_t whole)
{
  for (unsigned i = 0; i < ERRANDS; i++) {
    const struct errand *e = errands[i];

    if (ends[i + 1] <= whole)
      assert (e->cmd.error == 0);
    /* A payload may be anything; a header may not. */
    if (e->cmd.error == 0)
      assert (header_end (i) <= whole);
    if (e->cmd.error == 0 && kinds[i] == COMMAND_READ)
      for (size_t n = 0; n < SECTOR; n++)
        assert (header_end (i) + n >= whole || e->data[n] == 0x11);
  }
}

enum harm {
  CUT,     /* the connection ends */
  GARBLED, /* all bits from here on are turned over */
  FLIPPED, /* one bit is */
  MORE,    /* bytes too many, before what follows */
  PIECES,  /* none: but each byte comes by itself */
  NR_HARMS
};

static void
send_bytes (const uint8_t *bytes, size_t size)
{
  for (size_t i = 0; i < size; i++) {
    assert (send (v.fd, bytes + i, 1, MSG_NOSIGNAL) == 1);
    if (i % 7 == 0)
      conn_tick (v.conn, LONG_MS, 0);
  }
}

static void
do_harm (enum harm harm, size_t at)
{
  static const uint8_t more[3] = { 0xf1, 0xf2, 0xf3 };
  size_t size = ends[ERRANDS];
  ssize_t n;

  if (harm == GARBLED)
    for (size_t i = at; i < size; i++)
      answers[i] ^= 0xff;
  if (harm == FLIPPED)
    answers[at] ^= 0x20;
  if (harm == PIECES) {
    send_bytes (answers, at);
    conn_tick (v.conn, LONG_MS, 0);
    send_bytes (answers + at, size - at);
    return;
  }
  if (at > 0)
    assert (wire_transmit (v.fd, answers, at));
  if (at % 2) /* it may see the two parts apart */
    conn_tick (v.conn, LONG_MS, 0);
  if (harm == MORE)
    n = send (v.fd, more, sizeof more, MSG_NOSIGNAL);
  if (harm != CUT)
    n = send (v.fd, answers + at, size - at, MSG_NOSIGNAL);
  (void)n;
}

static void
harm_answers (enum harm harm, size_t at)
{
  villain_connect (&v);
  issue_all ();
  prepare_answers ();
  do_harm (harm, at);
  if (harm != PIECES)
    villain_hang_up (&v);
  let_end ();
  if (harm == PIECES)
    assert (!conn_dead (v.conn));
  if (harm != FLIPPED || !is_plausible (at))
    judge (harm == PIECES ? ends[ERRANDS] : at);
  villain_end (&v);
  free_all ();
}

static void
test_answers (void)
{
  size_t size;

  harm_answers (PIECES, 1);
  size = ends[ERRANDS];
  for (enum harm harm = 0; harm < NR_HARMS; harm++)
    for (size_t at = 0; at < size; at++) {
      bool header = false;

      for (unsigned i = 0; i < ERRANDS; i++)
        header = header || (at + 1 >= ends[i] && at <= header_end (i) + 1);
      if (header || at % 61 == 0)
        harm_answers (harm, at);
    }
}

/* An answer to no command, a second answer to one, an answer to a later one. */
static void
test_answers_to_nothing (void)
{
  for (unsigned way = 0; way < 3; way++) {
    villain_connect (&v);
    issue_all ();
    prepare_answers ();
    if (way == 0)
      villain_reply (&v, htobe64 (77777), 0);
    else
      assert (wire_transmit (v.fd, answers + ends[1], ends[2] - ends[1]));
    if (way == 1)
      assert (wire_transmit (v.fd, answers + ends[1], ends[2] - ends[1]));
    if (way == 2) {
      uint64_t cookie;

      memcpy (&cookie, answers + ends[3] + 8, sizeof cookie);
      villain_reply (&v, htobe64 (be64toh (cookie) + 1), 0);
    }
    let_end ();
    assert (conn_dead (v.conn));
    assert (strlen (conn_report (v.conn).why) > 0);
    for (unsigned i = 0; i < ERRANDS; i++)
      assert (errands[i]->cmd.error == (i == 1 && way > 0 ? 0 : ENOTCONN));
    villain_end (&v);
    free_all ();
  }
}

/* --- answers before the request has left -----------------------------------
 */

/* The result of a sendmsg, during which the server answers. */
enum outcome { ALL, SHORT, FULL, INTERRUPTED, NR_OUTCOMES };

static bool intercept;
static enum outcome outcome;
static struct errand *early;
static bool with_payload;

ssize_t __real_conn_sendmsg (int fd, const struct msghdr *msg, int flags);
ssize_t __wrap_conn_sendmsg (int fd, const struct msghdr *msg, int flags);

static void
answer_early (void)
{
  static const uint8_t payload[SECTOR];

  villain_reply (&v, htobe64 (1), 0); /* it guesses the first cookie */
  if (early->cmd.kind == COMMAND_READ && with_payload)
    assert (wire_transmit (v.fd, payload, SECTOR));
  conn_tick (v.conn, LONG_MS, 0);
  conn_tick (v.conn, LONG_MS, 0);
}

ssize_t
__wrap_conn_sendmsg (int fd, const struct msghdr *msg, int flags)
{
  struct iovec part = { msg->msg_iov[0].iov_base, 5 };
  struct msghdr shorter = { .msg_iov = &part, .msg_iovlen = 1 };
  ssize_t n;

  if (!intercept)
    return __real_conn_sendmsg (fd, msg, flags);
  intercept = false;
  switch (outcome) {
  case ALL:
    n = __real_conn_sendmsg (fd, msg, flags);
    answer_early ();
    return n;
  case SHORT:
    n = __real_conn_sendmsg (fd, &shorter, flags);
    answer_early ();
    return n;
  default:
    answer_early ();
    errno = outcome == FULL ? EAGAIN : EINTR;
    return -1;
  }
}

static void
be_early (enum command_kind kind)
{
  bool honest = outcome == ALL;
  struct errand *next;

  villain_connect (&v);
  early = errand_make (kind, SECTOR);
  intercept = true;
  assert (conn_issue (v.conn, &early->cmd, &early->waiter) == 0);
  assert (!intercept);
  if (honest && kind == COMMAND_READ && !with_payload) {
    uint8_t payload[SECTOR] = { 0 };

    assert (!errand_done (&v, early));
    assert (wire_transmit (v.fd, payload, SECTOR));
  }
  for (int i = 0; i < 5; i++)
    conn_tick (v.conn, LONG_MS, 0);
  assert (errand_done (&v, early));
  assert (early->cmd.error == (honest ? 0 : ENOTCONN));
  assert (conn_dead (v.conn) == !honest);
  if (!honest)
    assert (strstr (conn_report (v.conn).why,
                    "it answered a command before it had it"));
  free (early);
  next = errand_make (COMMAND_FLUSH, 0);
  assert (conn_issue (v.conn, &next->cmd, &next->waiter)
          == (honest ? 0 : -ENOTCONN));
  villain_end (&v);
  free (next);
}

static void
test_early_answers (void)
{
  if (is_libnbd)
    return; /* it knows by itself: see below */
  for (outcome = 0; outcome < NR_OUTCOMES; outcome++)
    for (unsigned i = 0; i < ERRANDS; i++) {
      with_payload = i == 3;
      be_early (kinds[i]);
    }
}

/* The same without a wrapper: only a part of a large write has left. */
static void
test_early_answer_to_a_large_write (void)
{
  static const size_t taken[] = { 0, 1, 4096, 1u << 20, 3u << 20 };
  uint8_t *buf = malloc (4u << 20);

  for (unsigned i = 0; i < sizeof taken / sizeof *taken; i++) {
    struct errand *e = errand_make (COMMAND_WRITE, 4u << 20);
    size_t got = 0;
    ssize_t n;

    villain_connect (&v);
    assert (conn_issue (v.conn, &e->cmd, &e->waiter) == 0);
    uint64_t cookie = villain_request (&v).cookie;
    while (got < taken[i]) {
      conn_tick (v.conn, LONG_MS, 0);
      n = recv (v.fd, buf, taken[i] - got, MSG_DONTWAIT);
      got += n > 0 ? (size_t)n : 0;
    }
    villain_reply (&v, cookie, 0);
    for (n = 0; !errand_done (&v, e); n++) {
      assert (n < 1000);
      conn_tick (v.conn, LONG_MS, 0);
    }
    assert (conn_dead (v.conn) && e->cmd.error == ENOTCONN);
    villain_end (&v);
    free (e);
  }
  free (buf);
}

/* --- a size that no disk can have ----------------------------------------- */

static void
test_impossible_size (void)
{
  static const uint64_t sizes[] = { UINT64_C (1) << 63, UINT64_MAX };

  for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; i++) {
    v = (struct villain){ .size = sizes[i] };
    assert (villain_attempt (&v) == -EPROTO);
    assert (strstr (last_error (), "2^63 bytes or more"));
    villain_hang_up (&v);
  }
}

int
main (void)
{
  const char *transport = getenv ("NBDM_TRANSPORT");

  alarm (150); /* nothing here may hang */
  is_libnbd = transport && strcmp (transport, "libnbd") == 0;
  RUN (test_answers);
  RUN (test_answers_to_nothing);
  if (!getenv ("NBDM_TEST_TLS")) { /* they watch the bytes that leave */
    RUN (test_early_answers);
    RUN (test_early_answer_to_a_large_write);
  }
  RUN (test_impossible_size);
  return 0;
}
