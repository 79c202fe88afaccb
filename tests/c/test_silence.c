/* SPDX-License-Identifier: BSD-3-Clause */

/* When a connection is given up, and when it is not: silence counts, and not
 * how long the work takes.  A server says nothing while no client asks it
 * anything, takes or gives a byte now and then, or works for longer than the
 * deadline with bytes that move.  Each case is a process; they run at the same
 * time, as most of it is waiting.
 */

#define _GNU_SOURCE

#include "base/clock.h"
#include "wire/conn.h"
#include "villain.h"

#include <poll.h>
#include <time.h>

#define MS UINT64_C (1000000)
#define DEADLINE_MS 400u
#define SLACK_MS 5000u /* of a machine that is busy; the faults never end */
#define KIB 1024u
#define RECORD_MS 2100u /* a record of 16 KiB at 8 KiB/s */

static struct villain v;

/* --- time ---------------------------------------------------------------- */

static uint64_t
now_ms (void)
{
  return now_ns () / MS;
}

/* The ticker's work, for so long or until the connection is dead. */
static bool
tick_for (uint32_t ms, uint32_t deadline_ms)
{
  uint64_t until = now_ms () + ms;

  do {
    conn_tick (v.conn, deadline_ms, 0);
    if (conn_dead (v.conn))
      return false;
    poll (NULL, 0, 5);
  } while (now_ms () < until);
  return true;
}

static void
assert_dead_within (uint32_t at_least_ms, uint32_t ms, uint32_t deadline_ms,
                    const char *why)
{
  uint64_t start = now_ms ();
  struct conn_report report;

  assert (!tick_for (ms + SLACK_MS, deadline_ms));
  assert (now_ms () - start >= at_least_ms);
  report = conn_report (v.conn);
  if (strstr (report.why, why) == NULL)
    fprintf (stderr, "\"%s\" is not in \"%s\"\n", why, report.why);
  assert (strstr (report.why, why));
}

static struct errand *
begin (enum command_kind kind, uint64_t length)
{
  struct errand *e = errand_make (kind, length);

  assert (conn_issue (v.conn, &e->cmd, &e->waiter) == 0);
  conn_push (v.conn);
  return e;
}

static void
assert_succeeded (struct errand *e)
{
  assert (errand_done (&v, e) && e->cmd.error == 0);
  free (e);
}

/* The connection is dead; the command may have been answered before that. */
static int
end (struct errand *e)
{
  int error;

  for (int i = 0; i < 3 && !errand_done (&v, e); i++)
    conn_tick (v.conn, DEADLINE_MS, 0);
  assert (errand_done (&v, e));
  error = e->cmd.error;
  free (e);
  return error;
}

static void
assert_lost (struct errand *e)
{
  assert (end (e) == ENOTCONN);
}

/* --- idle ---------------------------------------------------------------- */

static bool
is_readable (void)
{
  struct pollfd pfd = { .fd = v.fd, .events = POLLIN };

  return poll (&pfd, 1, 0) == 1;
}

/* What the ticker asks the server while no command is under way. */
static struct wire_request
take_ask (void)
{
  struct wire_request request;

  assert (is_readable ());
  request = villain_request (&v);
  assert (be16toh (request.type) == 0 && request.offset == 0);
  assert (be32toh (request.length) == 512);
  return request;
}

static void
answer_ask (uint32_t error)
{
  static const uint8_t block[512];

  villain_reply (&v, take_ask ().cookie, error);
  assert (!is_readable ());
  if (error == 0)
    assert (wire_transmit (v.fd, block, sizeof block));
}

/* The ticker sends a probe again and again, and any answer will do; the reports
 * count only other threads' commands.
 */
static void
test_idle (void)
{
  const uint32_t deadline_ms = 1000;
  struct conn_report report;

  for (int i = 0; i < 2; i++) {
    assert (tick_for (900, deadline_ms) && !is_readable ());
    assert (tick_for (250, deadline_ms));
    report = conn_report (v.conn);
    assert (report.outstanding == 0);
    answer_ask (i == 0 ? EIO : 0);
    assert (tick_for (20, deadline_ms));
    report = conn_report (v.conn);
    assert (report.answered == 0 && report.outstanding == 0);
  }
  assert (tick_for (900, deadline_ms));
  assert_dead_within (900, 1100, deadline_ms, "has not answered for 2");
  take_ask ();
  /* No thread has waited for it. */
  assert (!conn_report (v.conn).overdue);
}

/* The ticker acts within ten seconds, however long a command may take. */
static void
test_idle_with_a_long_deadline (void)
{
  assert (tick_for (4200, 600000) && !is_readable ());
  assert_dead_within (4400, 10000 - 4200 - SLACK_MS, 600000,
                      "has not answered for 9");
}

/* A command comes while the ask is under way. */
static void
test_asked_and_then_used (void)
{
  struct wire_request ask;
  struct errand *e;

  assert (tick_for (1100, 1000));
  ask = take_ask ();
  e = begin (COMMAND_FLUSH, 0);
  villain_reply (&v, ask.cookie, EIO);
  assert (tick_for (50, 1000));
  villain_reply (&v, villain_request (&v).cookie, 0);
  assert (tick_for (50, 1000));
  assert_succeeded (e);
  assert (conn_report (v.conn).answered == 1);
}

/* --- bytes that move ------------------------------------------------------ */

/* So much of what is there. */
static uint32_t
take (uint32_t max)
{
  uint8_t *buf = malloc (max);
  ssize_t n = recv (v.fd, buf, max, MSG_DONTWAIT);

  assert (n > 0 || (n < 0 && errno == EAGAIN));
  free (buf);
  return n < 0 ? 0 : (uint32_t)n;
}

/* Four times the deadline, and never silent. */
static void
test_slow_reader (void)
{
  const uint32_t length = 2u << 20, piece = 64 * KIB;
  struct errand *e = begin (COMMAND_WRITE, length);
  struct wire_request request = villain_request (&v);

  for (uint32_t taken = 0; taken < length; taken += take (piece)) {
    assert (tick_for (50, DEADLINE_MS));
    assert (!errand_done (&v, e));
  }
  villain_reply (&v, request.cookie, 0);
  assert (tick_for (50, DEADLINE_MS));
  assert_succeeded (e);
}

static void
test_slow_sender (void)
{
  const uint32_t length = 256 * KIB, piece = 8 * KIB;
  struct errand *e = begin (COMMAND_READ, length);
  uint8_t *buf = calloc (1, piece);

  villain_reply (&v, villain_request (&v).cookie, 0);
  for (uint32_t given = 0; given < length; given += piece) {
    assert (tick_for (50, DEADLINE_MS));
    assert (!errand_done (&v, e));
    assert (wire_transmit (v.fd, buf, piece));
  }
  free (buf);
  assert (tick_for (50, DEADLINE_MS));
  assert_succeeded (e);
}

/* --- bytes that gain nothing ---------------------------------------------- */

/* One byte at long intervals counts as silence. */
static void
test_trickling_sender (void)
{
  struct errand *e = begin (COMMAND_READ, 64 * KIB);
  uint64_t start = now_ms ();
  uint8_t byte = 0;

  villain_reply (&v, villain_request (&v).cookie, 0);
  while (tick_for (30, DEADLINE_MS)) {
    assert (now_ms () - start < DEADLINE_MS + SLACK_MS);
    (void)send (v.fd, &byte, 1, MSG_NOSIGNAL);
  }
  assert (now_ms () - start >= DEADLINE_MS);
  assert (conn_report (v.conn).overdue);
  assert_lost (e);
}

static void
test_trickling_reader (void)
{
  struct errand *e = begin (COMMAND_WRITE, 16u << 20);
  uint64_t start = now_ms ();
  uint8_t byte;

  while (tick_for (30, DEADLINE_MS)) {
    assert (now_ms () - start < 2 * DEADLINE_MS + SLACK_MS);
    assert (recv (v.fd, &byte, 1, 0) == 1);
  }
  assert_lost (e);
}

/* It has taken all of it, and says nothing. */
static void
test_mute (void)
{
  const uint32_t length = 4u << 20;
  struct errand *e = begin (COMMAND_WRITE, length);
  uint64_t start;

  villain_request (&v);
  for (uint32_t taken = 0; taken < length; taken += take (64 * KIB))
    assert (tick_for (6, DEADLINE_MS));
  start = now_ms ();
  assert_dead_within (DEADLINE_MS - 100, DEADLINE_MS, DEADLINE_MS,
                      "a command was not answered within 0.4 s");
  assert (now_ms () - start < DEADLINE_MS + SLACK_MS);
  assert_lost (e);
}

/* The kernel of a host receives many bytes for a process that hangs: later
 * writes do not reset the deadline.
 */
static void
test_hung_while_more_is_written (void)
{
  struct errand *all[200];
  unsigned nr = 0;
  uint64_t start = now_ms ();

  do {
    assert (nr < 200 && now_ms () - start < DEADLINE_MS + SLACK_MS);
    all[nr] = errand_make (COMMAND_WRITE, 2 * KIB);
    assert (conn_issue (v.conn, &all[nr]->cmd, &all[nr]->waiter) == 0);
    conn_push (v.conn);
    nr++;
  } while (tick_for (10, DEADLINE_MS));
  while (nr > 0)
    assert_lost (all[--nr]);
}

/* A command that starves while others are answered is given up, however long
 * it is.
 */
static void
test_starving (void)
{
  const uint32_t deadline_ms = 100;
  struct errand *starving = begin (COMMAND_FLUSH, 0);
  uint64_t start = now_ms ();
  bool alive = true;

  villain_request (&v);
  while (alive) {
    struct errand *e = begin (COMMAND_FLUSH, 0);

    villain_reply (&v, villain_request (&v).cookie, 0);
    do
      alive = tick_for (10, deadline_ms);
    while (alive && !errand_done (&v, e));
    if (alive)
      assert_succeeded (e);
    else
      end (e);
    assert (now_ms () - start < 8 * deadline_ms + SLACK_MS);
  }
  assert (now_ms () - start >= 8 * deadline_ms);
  assert_lost (starving);
}

/* Records of TLS that hold nothing are no answer, however many come. */
static void
test_babbling (void)
{
  struct errand *e = begin (COMMAND_READ, 64 * KIB);
  uint64_t start;

  villain_request (&v);
  tls_relay_babbles = true;
  start = now_ms ();
  while (tick_for (30, DEADLINE_MS))
    assert (now_ms () - start < DEADLINE_MS + RECORD_MS + SLACK_MS);
  assert (now_ms () - start >= DEADLINE_MS - 100);
  assert_lost (e);
}

/* A stop of the volume does not wait for a slow link. */
static void
test_hurry (void)
{
  struct errand *e = begin (COMMAND_READ, 1u << 20);
  uint8_t *buf = calloc (1, 16 * KIB);
  uint64_t start = now_ms (), hurry_ns = 0;

  villain_reply (&v, villain_request (&v).cookie, 0);
  while (!conn_dead (v.conn)) {
    (void)send (v.fd, buf, 8 * KIB, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (hurry_ns == 0 && now_ms () - start > 2 * DEADLINE_MS)
      hurry_ns = now_ns ();
    conn_tick (v.conn, DEADLINE_MS, hurry_ns);
    assert (now_ms () - start < 3 * DEADLINE_MS + SLACK_MS);
    poll (NULL, 0, 20);
  }
  assert (now_ms () - start >= 3 * DEADLINE_MS);
  free (buf);
  assert_lost (e);
}

/* --- running them --------------------------------------------------------- */

static const struct {
  const char *name;
  void (*run) (void);
  int room;
  bool tls;
} tests[] = {
  { "idle", test_idle, 0, false },
  { "idle, a long deadline", test_idle_with_a_long_deadline, 0, false },
  { "asked and then used", test_asked_and_then_used, 0, false },
  { "slow reader", test_slow_reader, 64 * KIB, false },
  { "slow sender", test_slow_sender, 0, false },
  { "trickling sender", test_trickling_sender, 0, false },
  { "trickling reader", test_trickling_reader, 64 * KIB, false },
  { "mute", test_mute, 64 * KIB, false },
  { "hung while more is written", test_hung_while_more_is_written, 0, false },
  { "starving", test_starving, 0, false },
  { "hurry", test_hurry, 0, false },
  { "babbling", test_babbling, 0, true },
};
#define NR (sizeof tests / sizeof *tests)

static pid_t
start (unsigned i, bool tcp)
{
  pid_t pid = fork ();

  assert (pid >= 0);
  if (pid > 0)
    return pid;
  alarm (60);
  v = (struct villain){ .tcp = tcp,
                        .tls = tests[i].tls,
                        .room = tests[i].room };
  villain_connect (&v);
  tests[i].run ();
  villain_end (&v);
  exit (0);
}

/* The longest case shows nothing about a transport, so it runs once.  libnbd's
 * TLS, which only tests use, does not tell which records hold something.
 */
static bool
is_wanted (unsigned i, const char *name)
{
  const char *transport = getenv ("NBDM_TRANSPORT");

  if (name)
    return strcmp (name, tests[i].name) == 0;
  return transport == NULL || *transport == '\0'
         || (tests[i].run != test_idle_with_a_long_deadline
             && tests[i].run != test_babbling);
}

int
main (int argc, char *argv[])
{
  pid_t pids[2][NR];
  int failed = 0;

  for (unsigned tcp = 0; tcp < 2; tcp++)
    for (unsigned i = 0; i < NR; i++)
      pids[tcp][i]
          = is_wanted (i, argc > 1 ? argv[1] : NULL) ? start (i, tcp) : 0;
  for (unsigned tcp = 0; tcp < 2; tcp++)
    for (unsigned i = 0; i < NR; i++) {
      int status;

      if (pids[tcp][i] == 0)
        continue;
      assert (waitpid (pids[tcp][i], &status, 0) == pids[tcp][i]);
      printf ("%s %s, %s\n", passed (status) ? "ok    " : "FAILED",
              tests[i].name, tcp ? "tcp" : "unix");
      failed += !passed (status);
    }
  return failed != 0;
}
