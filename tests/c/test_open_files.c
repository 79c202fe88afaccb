/* SPDX-License-Identifier: BSD-3-Clause */

/* Servers and clients that send open files along with their bytes, as a unix
 * socket lets them.  A file whose last close waits (here a TCP socket with
 * SO_LINGER, whose other end reads nothing) must keep no thread that others
 * wait for: not the ticker, and not one that holds a range.
 */

#define _GNU_SOURCE
#include <sys/syscall.h>

#include "api.h"
#include "base/clock.h"
#include "wire/conn.h"
#include "wire/protocol.h"
#include "wire/transport.h"
#include "direct_site.h"
#include "villain.h"

#define LINGER_S 40 /* of the close */
#define SOON_S 15   /* nothing else takes so long, also on a busy host */
#define LONG_MS 60000u
#define MAX_WALLS 8

#ifndef SO_PASSRIGHTS
#define SO_PASSRIGHTS 83 /* Linux 6.16 */
#endif

/* On a kernel without the option files arrive, and must be dealt with. */
static atomic_bool old_kernel;

int
setsockopt (int fd, int level, int name, const void *value, socklen_t size)
{
  if (level == SOL_SOCKET && name == SO_PASSRIGHTS && old_kernel) {
    errno = ENOPROTOOPT;
    return -1;
  }
  return (int)syscall (SYS_setsockopt, fd, level, name, value, size);
}

static uint64_t began_ns;

static void
begin (void)
{
  began_ns = now_ns ();
}

static void
assert_soon (void)
{
  assert (now_ns () - began_ns < SOON_S * UINT64_C (1000000000));
}

/* --- files whose close waits ------------------------------------------------
 */

static int walls[MAX_WALLS]; /* the other ends, which read nothing */
static unsigned nr_walls;

/* The caller's to close: waits only if that is the last one. */
static int
lingering_file (void)
{
  struct sockaddr_in in
      = { .sin_family = AF_INET, .sin_addr.s_addr = htonl (INADDR_LOOPBACK) };
  const struct linger linger = { 1, LINGER_S };
  socklen_t size = sizeof in;
  static const uint8_t bytes[65536];
  int listener = socket (AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  int fd = socket (AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

  assert (nr_walls < MAX_WALLS);
  assert (listener >= 0 && fd >= 0);
  assert (bind (listener, (struct sockaddr *)&in, sizeof in) == 0);
  assert (listen (listener, 1) == 0);
  assert (getsockname (listener, (struct sockaddr *)&in, &size) == 0);
  assert (connect (fd, (struct sockaddr *)&in, sizeof in) == 0);
  walls[nr_walls] = accept4 (listener, NULL, NULL, SOCK_CLOEXEC);
  assert (walls[nr_walls++] >= 0);
  close (listener);
  while (send (fd, bytes, sizeof bytes, MSG_DONTWAIT) > 0)
    ;
  assert (setsockopt (fd, SOL_SOCKET, SO_LINGER, &linger, sizeof linger) == 0);
  return fd;
}

static void
tear_down_walls (void)
{
  while (nr_walls > 0)
    close (walls[--nr_walls]);
}

/* 0 or -errno.  The file stays the caller's. */
static int
try_send_file (int fd, const void *bytes, size_t size, int flags, int file)
{
  union {
    char room[CMSG_SPACE (sizeof (int))];
    struct cmsghdr header;
  } control = { .room = { 0 } };
  struct iovec iov = { (void *)(uintptr_t)bytes, size };
  struct msghdr msg = { .msg_iov = &iov,
                        .msg_iovlen = 1,
                        .msg_control = control.room,
                        .msg_controllen = sizeof control.room };

  control.header.cmsg_level = SOL_SOCKET;
  control.header.cmsg_type = SCM_RIGHTS;
  control.header.cmsg_len = CMSG_LEN (sizeof file);
  memcpy (CMSG_DATA (&control.header), &file, sizeof file);
  if (sendmsg (fd, &msg, flags | MSG_NOSIGNAL) < 0)
    return -errno;
  return 0;
}

static void
send_with_file (int fd, const void *bytes, size_t size, int flags)
{
  int file = lingering_file ();

  assert (try_send_file (fd, bytes, size, flags, file) == 0);
  close (file); /* it is in the message, and in no other place */
}

/* A byte that a receiver passes over unless it asks for it: the kernel throws
 * it away, and closes its files, on the way to the bytes behind it.
 */
static void
send_urgent_with_file (int fd)
{
  send_with_file (fd, "!", 1, MSG_OOB);
}

/* --- a remote ----------------------------------------------------------------
 */

static struct villain v;

static void
answer_with_file (uint64_t cookie)
{
  const struct wire_reply reply
      = { .magic = htobe32 (REPLY_MAGIC), .cookie = cookie };

  send_with_file (v.fd, &reply, sizeof reply, 0);
}

/* The files come with an answer or with the bytes of a read: the ticker
 * receives them.
 */
static void
test_files_with_answers (void)
{
  for (int with_payload = 0; with_payload < 2; with_payload++) {
    struct errand *e = errand_make (COMMAND_READ, SECTOR);
    uint64_t cookie;

    villain_connect (&v);
    assert (conn_issue (v.conn, &e->cmd, &e->waiter) == 0);
    conn_push (v.conn);
    cookie = villain_request (&v).cookie;
    if (with_payload) {
      villain_reply (&v, cookie, 0);
      conn_tick (v.conn, LONG_MS, 0);
      send_with_file (v.fd, e->data, SECTOR, 0);
    }
    else
      answer_with_file (cookie);
    begin ();
    for (unsigned i = 0; i < 10; i++)
      conn_tick (v.conn, LONG_MS, 0);
    assert_soon ();
    assert (errand_done (&v, e) && e->cmd.error == ENOTCONN);
    assert (strstr (conn_report (v.conn).why, "open files"));
    villain_end (&v);
    assert_soon ();
    free (e);
    tear_down_walls ();
  }
}

static void
test_files_with_urgent_bytes (void)
{
  struct errand *e = errand_make (COMMAND_READ, SECTOR);

  villain_connect (&v);
  assert (conn_issue (v.conn, &e->cmd, &e->waiter) == 0);
  conn_push (v.conn);
  (void)villain_request (&v);
  send_urgent_with_file (v.fd);
  begin ();
  for (unsigned i = 0; i < 10; i++)
    conn_tick (v.conn, LONG_MS, 0);
  assert_soon ();
  assert (errand_done (&v, e) && e->cmd.error == ENOTCONN);
  assert (strstr (conn_report (v.conn).why, "open files"));
  villain_end (&v);
  free (e);
  tear_down_walls ();
}

/* The files are still in the socket when the connection is killed: a tick
 * receives them, or nothing does.
 */
static void
test_files_left_in_a_dead_connection (void)
{
  for (int read = 0; read < 2; read++) {
    villain_connect (&v);
    answer_with_file (1);
    answer_with_file (2);
    begin ();
    conn_kill (v.conn, "the end");
    if (read)
      conn_tick (v.conn, LONG_MS, 0);
    conn_put (v.conn);
    assert_soon ();
    villain_hang_up (&v);
    tear_down_walls ();
  }
}

/* --- a client ----------------------------------------------------------------
 */

static uint8_t sector[SECTOR];

static void
send_request_with_file (struct client *hostile, int urgent)
{
  struct nbd_request header = client_header (NBD_CMD_READ, 0, 2, 0, SECTOR);

  if (urgent)
    send_urgent_with_file (hostile->fd);
  else
    send_with_file (hostile->fd, &header, sizeof header, 0);
}

/* It has a write under way, and sends a file.  Others write to the same range,
 * and the server ends.
 */
static void
send_files_with_requests (int urgent)
{
  struct client hostile, c;

  bring_up (1, 1000);
  c = client_open (door, false);
  /* Its extent is hot from here on. */
  assert (client_do (&c, NBD_CMD_WRITE, 0, 0, SECTOR, sector) == 0);
  hostile = client_open (door, false);
  hostile.may_end = true;
  peer_hold (site.peers[0], PEER_HOLD_ANSWERS);
  assert (client_request (&hostile, NBD_CMD_WRITE, 0, 1, 0, SECTOR, sector));
  WAIT_FOR (site_status (&site, 0).remote.outstanding > 0);
  send_request_with_file (&hostile, urgent);
  poll (NULL, 0, 100); /* either order is right; this is the worse one */
  peer_hold (site.peers[0], PEER_GO);
  begin ();
  assert (client_do (&c, NBD_CMD_WRITE, 0, 0, SECTOR, sector) == 0);
  assert_soon ();
  client_close (&hostile);
  client_leave (&c);
  take_down ();
  assert_soon ();
  tear_down_walls ();
}

static void
test_files_with_requests (void)
{
  send_files_with_requests (0);
  send_files_with_requests (1);
}

/* The files come where the door receives bytes in the handshake, or where it
 * never receives them.
 */
static void
test_files_at_other_places (void)
{
  const uint32_t flags = htobe32 (NBD_FLAG_FIXED_NEWSTYLE);
  struct client greeting, leaving, c;
  struct sockaddr_un address;
  int unmet;

  bring_up (1, 1000);
  greeting = client_connect (door, NBD_FLAG_FIXED_NEWSTYLE);
  send_with_file (greeting.fd, &flags, sizeof flags, 0);
  leaving = client_open (door, false);
  assert (client_request (&leaving, NBD_CMD_DISC, 0, 0, 0, 0, NULL));
  leaving.may_end = true;
  address = served.address;
  unmet = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  assert (connect (unmet, (struct sockaddr *)&address, sizeof address) == 0);
  send_with_file (unmet, &flags, sizeof flags, 0);
  c = client_open (door, false);
  assert (client_do (&c, NBD_CMD_READ, 0, 0, SECTOR, sector) == 0);
  client_leave (&c);
  client_close (&leaving);
  begin ();
  take_down (); /* the greeting one is still connected */
  assert_soon ();
  client_close (&greeting);
  close (unmet);
  tear_down_walls ();
}

/* --- a kernel that refuses files ---------------------------------------------
 */

static bool
kernel_refuses_files (void)
{
  const int off = 0;
  int fd = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  int rc = setsockopt (fd, SOL_SOCKET, SO_PASSRIGHTS, &off, sizeof off);

  close (fd);
  return rc == 0;
}

/* As of a process that sends nothing but an ordinary file: nothing arrives, and
 * the connection goes on.
 */
static void
assert_file_refused (int fd)
{
  int file = open ("/dev/null", O_RDONLY | O_CLOEXEC);

  assert (file >= 0);
  assert (try_send_file (fd, "!", 1, 0, file) == -EPERM);
  assert (try_send_file (fd, "!", 1, MSG_OOB, file) == -EPERM);
  close (file);
}

static void
test_files_of_a_remote_are_refused (void)
{
  struct errand *e = errand_make (COMMAND_READ, SECTOR);
  uint64_t cookie;

  villain_connect (&v);
  assert (conn_issue (v.conn, &e->cmd, &e->waiter) == 0);
  conn_push (v.conn);
  cookie = villain_request (&v).cookie;
  assert_file_refused (v.fd);
  villain_reply (&v, cookie, 0);
  assert_file_refused (v.fd);
  assert (wire_transmit (v.fd, sector, SECTOR));
  WAIT_FOR ((conn_tick (v.conn, LONG_MS, 0), errand_done (&v, e)));
  assert (e->cmd.error == 0);
  villain_end (&v);
  free (e);
}

/* From the connect on: the socket that listens has the option. */
static void
test_files_of_a_client_are_refused (void)
{
  struct sockaddr_un address;
  struct client c;

  bring_up (1, 1000);
  address = served.address;
  for (unsigned i = 0; i < 20; i++) {
    int early = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    assert (connect (early, (struct sockaddr *)&address, sizeof address) == 0);
    assert_file_refused (early);
    close (early);
  }
  c = client_open (door, false);
  assert_file_refused (c.fd);
  assert (client_do (&c, NBD_CMD_READ, 0, 0, SECTOR, sector) == 0);
  client_leave (&c);
  take_down ();
}

int
main (void)
{
  dice = site_seed (1);
  if (kernel_refuses_files ()) {
    RUN (test_files_of_a_remote_are_refused);
    RUN (test_files_of_a_client_are_refused);
  }
  old_kernel = true;
  RUN (test_files_with_answers);
  RUN (test_files_with_urgent_bytes);
  RUN (test_files_left_in_a_dead_connection);
  RUN (test_files_with_requests);
  RUN (test_files_at_other_places);
  return 0;
}
