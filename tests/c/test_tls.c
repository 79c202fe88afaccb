/* SPDX-License-Identifier: BSD-3-Clause */

/* TLS of the direct door: which clients get in, and what holds on the way.
 *
 * The clients are GnuTLS in its usual use, through tls_relay.c; tests/e2e has
 * nbdkit's, libnbd's and qemu's.  The other direct tests run over TLS as well:
 * TLS_TESTS in the Makefile.
 */

#define _GNU_SOURCE

#include <dirent.h>
#include <gnutls/gnutls.h>
#include <sys/resource.h>

#include "api.h"
#include "base/clock.h"
#include "wire/conn.h"
#include "wire/protocol.h"
#include "wire/stream.h"
#include "wire/tls.h"
#include "wire/tls_secrets.h"
#include "direct_secured.h"
#include "nbd_wire.h"

#define TLS13_ONLY "NORMAL:-VERS-ALL:+VERS-TLS1.3:+ECDHE-PSK"
#define UNFINISHED 10000
#define KEPT_OPEN 400 /* of these at a time */
/* More than before: in 64 handshakes, in 64 that end, and each closes a socket
 * on another thread.
 */
#define MAX_THREADS 320
#ifdef __SANITIZE_THREAD__ /* its own memory counts too */
#define MAX_GROWTH_KB (320 * 1024)
#else
#define MAX_GROWTH_KB (96 * 1024)
#endif

static struct tls_options options;

static int
secure_with_options (int fd)
{
  return tls_relay_with (fd, &options);
}

/* --- who gets in -----------------------------------------------------------
 */

/* Before TLS a client learns nothing and changes nothing. */
static void
test_tls_is_required (void)
{
  static const uint8_t long_option[20000];
  struct client c;

  bring_up_secured ();
  c = connect_plain ();
  for (uint32_t option = 0; option < 20; option++)
    if (option != NBD_OPT_ABORT && option != NBD_OPT_STARTTLS
        && option != NBD_OPT_EXPORT_NAME)
      assert (client_ask (&c, option, "\0\0\0\0\0\0", 6)
              == NBD_REP_ERR_TLS_REQD);
  assert (client_ask (&c, NBD_OPT_INFO, long_option, sizeof long_option)
          == NBD_REP_ERR_TLS_REQD);
  assert (client_ask (&c, NBD_OPT_STARTTLS, "data", 4) == NBD_REP_ERR_INVALID);
  client_start_tls (&c);
  assert (client_ask (&c, NBD_OPT_STARTTLS, NULL, 0) == NBD_REP_ERR_INVALID);
  client_go (&c);
  round_trip (&c, 1);
  client_leave (&c);

  c = connect_plain ();
  assert (client_ask (&c, NBD_OPT_ABORT, NULL, 0) == NBD_REP_ACK);
  client_assert_closed (&c);
  client_close (&c);
  c = connect_plain ();
  client_option (&c, NBD_OPT_EXPORT_NAME, NULL, 0);
  client_assert_closed (&c); /* this option has no error reply */
  client_close (&c);
  take_down ();
}

/* Bytes that come with STARTTLS are no part of what TLS protects. */
static void
test_nothing_plain_counts_after_tls (void)
{
  const struct nbd_option_header both[]
      = { { htobe64 (NBD_OPTION), htobe32 (NBD_OPT_STARTTLS), 0 },
          { htobe64 (NBD_OPTION), htobe32 (NBD_OPT_STRUCTURED_REPLY), 0 } };
  struct nbd_option_reply reply;
  struct client c;

  bring_up_secured ();
  c = connect_plain ();
  client_send (&c, both, sizeof both);
  client_receive (&c, &reply, sizeof reply);
  assert (reply.type == htobe32 (NBD_REP_ACK));
  assert (tls_relay_with (c.fd, &options) == -1);
  take_down ();
}

static void
test_other_clients (void)
{
  const struct tls_options others[] = {
    { .priority = "NORMAL:-VERS-ALL:+VERS-TLS1.2:+ECDHE-PSK" },
    { .priority = "NORMAL:-VERS-ALL:+VERS-TLS1.0:+VERS-TLS1.1:+ECDHE-PSK" },
    { .priority = "NORMAL:-VERS-ALL:+VERS-TLS1.3:-KX-ALL:+PSK" },
    { .key = "00112233445566778899aabbccddeeff" },
    { .user = "another" },
    { .user = "another", .key = "00112233445566778899aabbccddeeff" },
    { .user = "" },
    { .user = "", .priority = "NORMAL:+ANON-ECDH" },
  };
  const struct tls_options one = { .priority = TLS13_ONLY };
  struct client c;

  bring_up_secured ();
  for (unsigned i = 0; i < sizeof others / sizeof *others; i++)
    assert_turned_away (&others[i]);
  options = one;
  client_secure = secure_with_options;
  c = client_open (door, true);
  round_trip (&c, 3);
  client_leave (&c);
  take_down ();
}

/* --- what holds on the way -------------------------------------------------
 */

/* The client may want short records: each byte arrives all the same. */
static void
test_short_records (void)
{
  options = (struct tls_options){ .max_record = 512 };
  bring_up_secured ();
  client_secure = secure_with_options;
  for (unsigned structured = 0; structured < 2; structured++) {
    struct client c = client_open (door, structured);

    round_trip (&c, (uint8_t)(20 + structured));
    client_leave (&c);
  }
  options = (struct tls_options){ 0 };
  take_down ();
}

/* New keys in both directions, while both move bytes. */
static void
test_new_keys (void)
{
  static uint8_t out[LARGEST], in[LARGEST];
  time_t until = time (NULL) + 5;
  struct client c;

  /* GnuTLS takes one update a second. */
  options = (struct tls_options){ .update_ms = 1300 };
  bring_up_secured ();
  client_secure = secure_with_options;
  c = client_open (door, true);
  for (uint8_t value = 1; time (NULL) < until; value++) {
    struct answer answer;
    bool simple;

    memset (out, value, sizeof out);
    assert (client_do (&c, NBD_CMD_WRITE, 0, 0, sizeof out, out) == 0);
    /* The next write arrives while the answer to the read leaves. */
    assert (client_request (&c, NBD_CMD_READ, 0, 1, 0, sizeof in, NULL));
    assert (client_request (&c, NBD_CMD_WRITE, 0, 2, LARGEST, LARGEST, out));
    for (int i = 0; i < 2; i++)
      assert (client_answer (&c, &answer, in, sizeof in, &simple)
              && answer.error == 0);
    assert_filled (in, value, sizeof in);
  }
  client_leave (&c);
  options = (struct tls_options){ 0 };
  take_down ();
}

/* A client that does not read, with more answers than any buffer holds; then it
 * reads them.
 */
static void
test_unread_answers (void)
{
  static uint8_t data[LARGEST];
  const unsigned nr = 24;
  struct client c;

  bring_up_secured ();
  c = client_open (door, true);
  memset (data, 77, sizeof data);
  assert (client_do (&c, NBD_CMD_WRITE, 0, 0, sizeof data, data) == 0);
  for (unsigned i = 0; i < nr; i++)
    assert (client_request (&c, NBD_CMD_READ, 0, i, 0, LARGEST, NULL));
  poll (NULL, 0, 300); /* the door's worker gives up, and its session too */
  for (unsigned i = 0; i < nr; i++) {
    struct answer answer;
    bool simple;

    memset (data, 0, sizeof data);
    assert (client_answer (&c, &answer, data, sizeof data, &simple));
    assert (answer.error == 0 && answer.length == sizeof data);
    assert_filled (data, 77, sizeof data);
  }
  client_leave (&c);
  take_down ();
}

/* A write that is cut off is not carried out, and the others are. */
static void
test_cut (void)
{
  uint8_t sectors[8 * SECTOR];
  struct nbd_request header;
  struct client c;

  bring_up_secured ();
  c = client_open (door, false);
  memset (sectors, 5, sizeof sectors);
  assert (client_request (&c, NBD_CMD_WRITE, 0, 1, 0, sizeof sectors, sectors));
  header = client_header (NBD_CMD_WRITE, 0, 2, REGION, sizeof sectors);
  client_send (&c, &header, sizeof header);
  client_send (&c, sectors, sizeof sectors - 1);
  client_close (&c);
  wait_no_clients ();
  c = client_open (door, false);
  assert (client_do (&c, NBD_CMD_READ, 0, 0, sizeof sectors, sectors) == 0);
  assert_filled (sectors, 5, sizeof sectors);
  assert (client_do (&c, NBD_CMD_READ, 0, REGION, sizeof sectors, sectors)
          == 0);
  assert_filled (sectors, 0, sizeof sectors);
  client_leave (&c);
  take_down ();
}

/* A byte that somebody changed on the way ends the connection. */
static void
test_garbled (void)
{
  const uint8_t record[]
      = { 23, 3, 3, 0, 32, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6,
          7,  8, 1, 2, 3,  4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8 };
  struct client c;
  int wire;

  bring_up_secured ();
  c = connect_plain ();
  wire = dup (c.fd);
  assert (client_ask (&c, NBD_OPT_STARTTLS, NULL, 0) == NBD_REP_ACK);
  c.fd = tls_relay (c.fd);
  client_go (&c);
  assert_works (&c);
  assert (send (wire, record, sizeof record, MSG_NOSIGNAL)
          == (ssize_t)sizeof record);
  client_assert_closed (&c);
  client_close (&c);
  close (wire);
  wait_no_clients ();
  take_down ();
}

/* The other side's alert is one that GnuTLS has no name for. */
static void
test_unknown_alert (void)
{
  const uint8_t record[] = { 21, 3, 3, 0, 2, 2, 77 };
  const struct nbdm_tls files = { .psk = tls_relay_psk_file () };
  struct tls_secrets *secrets;
  struct stream stream;
  int pair[2];

  assert (socketpair (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
  assert (send (pair[1], record, sizeof record, 0) == (ssize_t)sizeof record);
  assert (tls_secrets_load (&files, &secrets) == 0);
  stream = stream_plain (pair[0]);
  assert (tls_accept (&stream, secrets, now_ns () + 10 * NS_PER_S) == -EACCES);
  ASSERT_SAYS ("the other side refuses: an alert that GnuTLS does not know");
  tls_secrets_free (secrets);
  close (pair[0]);
  close (pair[1]);
}

/* --- handshakes that nobody finishes ---------------------------------------
 */

static unsigned
count_threads (void)
{
  DIR *dir = opendir ("/proc/self/task");
  unsigned nr = 0;

  assert (dir);
  while (readdir (dir))
    nr++;
  closedir (dir);
  return nr;
}

static long
resident_kb (void)
{
  long pages;
  FILE *file = fopen ("/proc/self/statm", "re");

  assert (file && fscanf (file, "%*d %ld", &pages) == 1);
  fclose (file);
  return pages * (sysconf (_SC_PAGESIZE) / 1024);
}

/* The first bytes of a ClientHello; all that come have the same. */
static void
begin_handshake (int fd)
{
  const uint8_t record[] = { 22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3 };

  (void)send (fd, record, sizeof record, MSG_NOSIGNAL);
}

static void
ask_for_tls (int fd, const struct sockaddr_un *address)
{
  struct {
    uint32_t flags;
    struct nbd_option_header option;
  } __attribute__ ((packed)) hello
      = { htobe32 (FLAGS), { htobe64 (NBD_OPTION), htobe32 (5), 0 } };

  assert (fd >= 0);
  assert (connect (fd, (const struct sockaddr *)address, sizeof *address) == 0);
  (void)send (fd, &hello, sizeof hello, MSG_NOSIGNAL);
  begin_handshake (fd);
}

static void
test_ten_thousand_unfinished (void)
{
  static int fds[KEPT_OPEN];
  unsigned most_threads = 0;
  struct client c, later;
  unsigned threads_before;
  long before;

  bring_up_secured ();
  c = client_open (door, true);
  assert_works (&c);
  before = resident_kb ();
  threads_before = count_threads ();
  memset (fds, -1, sizeof fds);
  for (unsigned i = 0; i < UNFINISHED; i++) {
    int *fd = &fds[i % KEPT_OPEN];

    if (*fd >= 0)
      close (*fd);
    *fd = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    ask_for_tls (*fd, &served.address);
    if (i % 100 == 0) {
      unsigned threads = count_threads ();

      most_threads = threads > most_threads ? threads : most_threads;
      assert_works (&c); /* it is served meanwhile */
    }
    if (i % 2500 == 0) { /* and so is one that comes meanwhile */
      later = client_open (door, false);
      round_trip (&later, (uint8_t)i);
      client_leave (&later);
    }
  }
  printf ("%u threads and %ld KiB more\n", most_threads - threads_before,
          resident_kb () - before);
  fflush (stdout);
  assert (most_threads - threads_before < MAX_THREADS);
  assert (resident_kb () - before < MAX_GROWTH_KB);
  for (unsigned i = 0; i < KEPT_OPEN; i++)
    close (fds[i]);
  client_leave (&c);
  take_down ();
}

/* The door ends at once, whatever is under way. */
static void
test_end_in_a_handshake (void)
{
  int fd = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  time_t begun;

  bring_up_secured ();
  ask_for_tls (fd, &served.address);
  poll (NULL, 0, 100);
  begun = time (NULL);
  take_down ();
  assert (time (NULL) - begun < 10);
  close (fd);
}

/* --- block sizes -----------------------------------------------------------
 */

#define USUAL_MAX (32u << 20) /* of a server that says none */

static const struct {
  struct wire_block_sizes said;
  uint32_t min, max; /* that count */
} block_sizes[] = {
  { { 1, 4096, 1 << 20 }, 1, 1 << 20 },
  { { 512, 512, 512 }, 512, 512 },
  { { 4096, 65536, UINT32_MAX }, 4096, USUAL_MAX },
  { { 65536, 65536, 1 << 30 }, 65536, USUAL_MAX },
  /* None of these keeps to the protocol. */
  { { 0, 4096, 1 << 20 }, 1, USUAL_MAX },
  { { 3, 4096, 3 << 20 }, 1, USUAL_MAX },
  { { 1 << 17, 1 << 17, 1 << 20 }, 1, USUAL_MAX },
  { { 4096, 512, 1 << 20 }, 1, USUAL_MAX },
  { { 1, 256, 1 << 20 }, 1, USUAL_MAX },
  { { 1, 3000, 1 << 20 }, 1, USUAL_MAX },
  { { 1, 512, 1 }, 1, USUAL_MAX },
  { { 512, 4096, 256 }, 1, USUAL_MAX },
  { { 512, 4096, 4097 }, 1, USUAL_MAX },
};

/* A remote's block sizes count if they keep to the protocol. */
static void
test_block_sizes (void)
{
  struct folder folder = folder_make ();
  char path[PATH_MAX + 16], uri[2 * PATH_MAX];
  const struct peer_params params = { .socket = path, .size = REGION };

  alarm (150);
  setenv ("NBDM_TEST_TLS", "1", 1);
  snprintf (path, sizeof path, "%s/peer", folder.path);
  peer_uri (uri, sizeof uri, path);
  for (unsigned i = 0; i < sizeof block_sizes / sizeof *block_sizes; i++) {
    struct peer *peer;
    struct conn *conn;

    wire_block_sizes = block_sizes[i].said;
    peer = peer_start (&params);
    assert (conn_open (uri, SITE_DEADLINE_S * 1000, &conn) == 0);
    assert (conn_info (conn)->min_block == block_sizes[i].min);
    assert (conn_info (conn)->max_payload == block_sizes[i].max);
    conn_put (conn);
    peer_stop (peer);
  }
  wire_block_sizes = (struct wire_block_sizes){ 0 };
  unlink (path);
  assert (rmdir (folder.path) == 0);
  close (folder.fd);
}

int
main (void)
{
  RUN (test_tls_is_required);
  RUN (test_nothing_plain_counts_after_tls);
  RUN (test_other_clients);
  RUN (test_short_records);
  RUN (test_new_keys);
  RUN (test_unread_answers);
  RUN (test_cut);
  RUN (test_garbled);
  RUN (test_unknown_alert);
  RUN (test_ten_thousand_unfinished);
  RUN (test_end_in_a_handshake);
  RUN (test_block_sizes);
  return 0;
}
