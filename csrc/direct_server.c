/* SPDX-License-Identifier: BSD-3-Clause */

/* The direct door: listens, and has a thread for each client and workers for
 * what may block.
 *
 * Why a server of our own beside nbdkit: nbdkit gives each request a thread
 * for as long as it lasts.  A request that waits for a remote then costs two
 * wake-ups, which are dearer than all else a mirror does: half of the writes a
 * second (docs/performance.md).  Who wants nbdkit's filters, or TLS, has the
 * native door.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "direct.h"

#define MAX_WORKERS 128u /* of a pool, that are given what has not begun */
#define IDLE_S 10        /* and a worker ends */
#define STACK_BYTES (512u << 10)
#define MAX_SESSIONS 256    /* so that remotes and logs have descriptors left */
#define LINES_A_SECOND 100  /* of the log: a client could fill a disk */
#define ACCEPT_PAUSE_MS 100 /* without descriptors or memory for a client */

/* Workers, and what waits for one. */
struct pool {
  struct direct_server *server;
  pthread_cond_t work; /* an op, or the end */
  struct op *first, *last;
  uint32_t nr_workers, nr_idle;
};

/* Two, as writes may wait for a remote, all of them and for long, and reads
 * come from local.
 */
enum { READERS, WRITERS, NR_POOLS };

struct direct_server {
  struct nbdm *volume;
  int listen_fd; /* not ours to close */
  int end_fd;    /* an eventfd: nbdm_server_end */
  uint64_t accepted;

  pthread_mutex_t lock; /* protects all below; none is taken under it */
  pthread_cond_t gone;  /* a thread has ended */
  struct session *sessions;
  uint32_t nr_sessions;
  struct pool pools[NR_POOLS];
  bool flushing;      /* a worker is, or is about to */
  struct op *flushes; /* that came meanwhile; in no order */
  bool ending;

  uint64_t said_at; /* the second of the last line of the log */
  uint64_t nr_said; /* lines there were in it */
};

/* --- The log ---------------------------------------------------------- */

static void
write_line (const char *level, const char *words)
{
  struct timespec now;
  struct tm tm;
  char when[32];

  clock_gettime (CLOCK_REALTIME, &now);
  gmtime_r (&now.tv_sec, &tm);
  strftime (when, sizeof when, "%Y-%m-%dT%H:%M:%S", &tm);
  dprintf (STDERR_FILENO, "%s.%03ldZ %s %s\n", when, now.tv_nsec / 1000000,
           level, words);
}

/* Is there room for a line in this second?  `*missed`: lines there was none for
 * in the last one that had too many.
 */
static bool
may_say_locked (struct direct_server *server, uint64_t *missed)
{
  uint64_t second = now_ns () / 1000000000;

  *missed = 0;
  if (server->said_at != second) {
    if (server->nr_said > LINES_A_SECOND)
      *missed = server->nr_said - LINES_A_SECOND;
    server->said_at = second;
    server->nr_said = 0;
  }
  return ++server->nr_said <= LINES_A_SECOND;
}

void
direct_log (const struct session *s, const char *fmt, ...)
{
  struct direct_server *server = s->server;
  char words[NBDM_REASON_LEN + 96];
  uint64_t missed;
  bool may;
  va_list args;
  int n = snprintf (words, sizeof words,
                    "client %llu: ", (unsigned long long)s->number);

  va_start (args, fmt);
  vsnprintf (words + n, sizeof words - (size_t)n, fmt, args);
  va_end (args);
  pthread_mutex_lock (&server->lock);
  may = may_say_locked (server, &missed);
  pthread_mutex_unlock (&server->lock);
  if (may)
    write_line ("error", words);
  if (missed > 0) {
    snprintf (words, sizeof words, "%llu more lines of that kind were left out",
              (unsigned long long)missed);
    write_line ("warning", words);
  }
}

/* --- Workers ---------------------------------------------------------- */

static int
start_thread (void *(*main) (void *), void *opaque)
{
  pthread_attr_t attr;
  pthread_t thread;
  int err = pthread_attr_init (&attr);

  if (err)
    return -err;
  pthread_attr_setdetachstate (&attr, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize (&attr, STACK_BYTES);
  err = pthread_create (&thread, &attr, main, opaque);
  pthread_attr_destroy (&attr);
  return -err;
}

static struct pool *
pool_of (struct direct_server *server, const struct op *op)
{
  bool reads = op->type == NBD_CMD_READ || op->type == NBD_CMD_CACHE
               || op->type == NBD_CMD_BLOCK_STATUS;

  return &server->pools[reads ? READERS : WRITERS];
}

static struct op *
take_first_locked (struct pool *pool)
{
  struct op *op = pool->first;

  if (op && (pool->first = op->next) == NULL)
    pool->last = NULL;
  return op;
}

/* Wait for an op; NULL: this worker is to end. */
static struct op *
next_op_locked (struct pool *pool)
{
  struct direct_server *server = pool->server;
  struct timespec until;

  clock_gettime (CLOCK_MONOTONIC, &until);
  until.tv_sec += IDLE_S;
  pool->nr_idle++;
  while (pool->first == NULL && !server->ending) {
    if (pthread_cond_timedwait (&pool->work, &server->lock, &until)
        != ETIMEDOUT)
      continue;
    if (pool->nr_workers > 1)
      break;
    until.tv_sec += IDLE_S; /* one stays: another may not be to be had */
  }
  pool->nr_idle--;
  return take_first_locked (pool);
}

/* Flushes that come while one is under way share the next: a client that sends
 * them among its writes has several under way, and a thread for each would
 * only wait for the others.
 */
static void
flush_all (struct direct_server *server, struct op *op)
{
  op->next = NULL;
  while (op) {
    session_flush (op);
    pthread_mutex_lock (&server->lock);
    op = server->flushes;
    server->flushes = NULL;
    server->flushing = op != NULL;
    pthread_mutex_unlock (&server->lock);
  }
}

/* True: another flush will do for it. */
static bool
join_flush_locked (struct direct_server *server, struct op *op)
{
  if (op->type != NBD_CMD_FLUSH)
    return false;
  if (!server->flushing) {
    server->flushing = true;
    return false;
  }
  op->next = server->flushes;
  server->flushes = op;
  return true;
}

static void *
worker_main (void *opaque)
{
  struct pool *pool = opaque;
  struct direct_server *server = pool->server;
  struct op *op;

  pthread_mutex_lock (&server->lock);
  while ((op = next_op_locked (pool))) {
    pthread_mutex_unlock (&server->lock);
    if (op->type == NBD_CMD_FLUSH)
      flush_all (server, op);
    else
      session_work (op);
    pthread_mutex_lock (&server->lock);
  }
  pool->nr_workers--;
  pthread_cond_broadcast (&server->gone);
  pthread_mutex_unlock (&server->lock);
  return NULL;
}

static uint32_t
nr_queued_locked (const struct pool *pool)
{
  uint32_t nr = 0;

  for (const struct op *op = pool->first; op && nr <= pool->nr_idle;
       op = op->next)
    nr++;
  return nr;
}

/* Take the op out of the queue; false: a worker has it already. */
static bool
take_back_locked (struct pool *pool, const struct op *op)
{
  struct op *before = NULL, *at = pool->first;

  for (; at && at != op; at = at->next)
    before = at;
  if (at == NULL)
    return false;
  if (before)
    before->next = op->next;
  else
    pool->first = op->next;
  if (pool->last == op)
    pool->last = before;
  return true;
}

/* No thread could be made.  What has not begun holds nothing, and waits for a
 * worker: one is always there.  What has begun may be what that one waits for;
 * completing it waits for no other request.
 */
static void
do_without_worker (struct pool *pool, struct op *op, bool begun)
{
  struct direct_server *server = pool->server;
  bool ours;

  pthread_mutex_lock (&server->lock);
  pool->nr_workers--;
  ours = begun && take_back_locked (pool, op);
  pthread_mutex_unlock (&server->lock);
  if (ours)
    session_work (op);
}

void
direct_submit (struct direct_server *server, struct op *op)
{
  struct pool *pool = pool_of (server, op);
  bool missing, begun = op->begun;

  op->next = NULL;
  pthread_mutex_lock (&server->lock);
  if (join_flush_locked (server, op)) {
    pthread_mutex_unlock (&server->lock);
    return;
  }
  if (begun) {
    op->next = pool->first;
    pool->first = op;
    if (pool->last == NULL)
      pool->last = op;
  }
  else if (pool->last)
    pool->last = pool->last->next = op;
  else
    pool->first = pool->last = op;
  missing = nr_queued_locked (pool) > pool->nr_idle
            && (begun || pool->nr_workers < MAX_WORKERS);
  if (missing)
    pool->nr_workers++;
  pthread_cond_signal (&pool->work);
  pthread_mutex_unlock (&server->lock);
  if (missing && start_thread (worker_main, pool) < 0)
    do_without_worker (pool, op, begun);
}

/* --- Clients ---------------------------------------------------------- */

static void
session_free (struct session *s)
{
  if (s->box)
    mailbox_put (s->box);
  free (s->inbox);
  close (s->fd);
  pthread_mutex_destroy (&s->lock);
  free (s);
}

static struct session *
session_new (struct direct_server *server, int fd)
{
  struct session *s = calloc (1, sizeof *s);
  const int on = 1;

  if (s == NULL) {
    close (fd);
    return NULL;
  }
  s->server = server;
  s->volume = server->volume;
  s->fd = fd;
  s->number = ++server->accepted;
  atomic_init (&s->shaking_hands, true);
  pthread_mutex_init (&s->lock, NULL);
  s->box = mailbox_new ();
  s->inbox = malloc (DIRECT_INBOX);
  /* Not on a unix socket; a client whose machine is gone is noticed. */
  (void)setsockopt (fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  (void)setsockopt (fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
  if (s->box && s->inbox)
    return s;
  session_free (s);
  return NULL;
}

static void
forget (struct session *s)
{
  struct direct_server *server = s->server;
  struct session **p = &server->sessions;

  pthread_mutex_lock (&server->lock);
  while (*p != s)
    p = &(*p)->next;
  *p = s->next;
  pthread_mutex_unlock (&server->lock);
}

static void *
session_main (void *opaque)
{
  struct session *s = opaque;
  struct direct_server *server = s->server;

  session_run (s);
  forget (s);
  session_free (s);
  pthread_mutex_lock (&server->lock);
  server->nr_sessions--;
  pthread_cond_broadcast (&server->gone);
  pthread_mutex_unlock (&server->lock);
  return NULL;
}

static int
begin_session (struct direct_server *server, int fd)
{
  struct session *s = session_new (server, fd);
  bool room;
  int rc;

  if (s == NULL)
    return -ENOMEM;
  pthread_mutex_lock (&server->lock);
  room = server->nr_sessions < MAX_SESSIONS;
  if (room) {
    s->next = server->sessions;
    server->sessions = s;
    server->nr_sessions++;
  }
  pthread_mutex_unlock (&server->lock);
  if (!room) {
    direct_log (s, "turned away: there are %u clients", MAX_SESSIONS);
    session_free (s);
    return 0;
  }
  rc = start_thread (session_main, s);
  if (rc == 0)
    return 0;
  forget (s);
  session_free (s);
  pthread_mutex_lock (&server->lock);
  server->nr_sessions--;
  pthread_mutex_unlock (&server->lock);
  return rc;
}

/* False: not now. */
static bool
accept_one (struct direct_server *server)
{
  int fd = accept4 (server->listen_fd, NULL, NULL, SOCK_CLOEXEC);

  if (fd < 0)
    return errno == EAGAIN || errno == EINTR || errno == ECONNABORTED;
  return begin_session (server, fd) == 0;
}

static void
accept_all (struct direct_server *server)
{
  struct pollfd fds[] = { { .fd = server->end_fd, .events = POLLIN },
                          { .fd = server->listen_fd, .events = POLLIN } };

  while (!fds[0].revents) {
    int found = poll (fds, 2, -1);

    if (found > 0 && fds[1].revents && !accept_one (server))
      (void)poll (fds, 1, ACCEPT_PAUSE_MS);
  }
}

/* --- The API ---------------------------------------------------------- */

int
nbdm_server_open (struct nbdm *v, int listen_fd, struct direct_server **out)
{
  struct direct_server *server = calloc (1, sizeof *server);
  int flags = fcntl (listen_fd, F_GETFL);
  pthread_condattr_t attr;

  if (server == NULL)
    return set_error (-ENOMEM, "the direct door");
  /* A client that is gone again must not keep us in accept. */
  if (flags >= 0)
    (void)fcntl (listen_fd, F_SETFL, flags | O_NONBLOCK);
  server->volume = v;
  server->listen_fd = listen_fd;
  server->end_fd = eventfd (0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (server->end_fd < 0) {
    int err = errno;

    free (server);
    return set_error (-err, "the direct door");
  }
  pthread_mutex_init (&server->lock, NULL);
  pthread_condattr_init (&attr);
  pthread_condattr_setclock (&attr, CLOCK_MONOTONIC);
  for (int i = 0; i < NR_POOLS; i++) {
    server->pools[i].server = server;
    pthread_cond_init (&server->pools[i].work, &attr);
  }
  pthread_condattr_destroy (&attr);
  pthread_cond_init (&server->gone, NULL);
  *out = server;
  return 0;
}

/* The one of each pool that is always there. */
static int
start_workers (struct direct_server *server)
{
  for (int i = 0; i < NR_POOLS; i++) {
    struct pool *pool = &server->pools[i];
    int rc;

    pool->nr_workers = 1; /* nobody else knows of the pool yet */
    rc = start_thread (worker_main, pool);
    if (rc < 0) {
      pool->nr_workers = 0;
      return set_error (rc, "the direct door: a thread");
    }
  }
  return 0;
}

static void
end_workers (struct direct_server *server)
{
  pthread_mutex_lock (&server->lock);
  server->ending = true;
  for (int i = 0; i < NR_POOLS; i++)
    pthread_cond_broadcast (&server->pools[i].work);
  for (int i = 0; i < NR_POOLS; i++)
    while (server->pools[i].nr_workers > 0)
      pthread_cond_wait (&server->gone, &server->lock);
  pthread_mutex_unlock (&server->lock);
}

/* No more requests; what is under way is answered.  Who is still shaking hands
 * has nothing under way, and may not read what it is told.
 */
static void
end_sessions (struct direct_server *server)
{
  pthread_mutex_lock (&server->lock);
  for (struct session *s = server->sessions; s; s = s->next) {
    atomic_store (&s->ending, true);
    shutdown (s->fd, atomic_load (&s->shaking_hands) ? SHUT_RDWR : SHUT_RD);
    mailbox_ring (s->box);
  }
  mailbox_ring_all ();
  while (server->nr_sessions > 0)
    pthread_cond_wait (&server->gone, &server->lock);
  pthread_mutex_unlock (&server->lock);
}

int
nbdm_server_run (struct direct_server *server)
{
  int rc = start_workers (server);

  if (rc == 0)
    accept_all (server);
  end_sessions (server);
  end_workers (server);
  return rc;
}

void
nbdm_server_end (struct direct_server *server)
{
  (void)eventfd_write (server->end_fd, 1);
}

void
nbdm_server_close (struct direct_server *server)
{
  close (server->end_fd);
  pthread_mutex_destroy (&server->lock);
  for (int i = 0; i < NR_POOLS; i++)
    pthread_cond_destroy (&server->pools[i].work);
  pthread_cond_destroy (&server->gone);
  free (server);
}
