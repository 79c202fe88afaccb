/* SPDX-License-Identifier: BSD-3-Clause */

/* The recorded calls of remotes, over each transport, and what their servers
 * carry out.  See loss.h.
 */

#define _GNU_SOURCE

#include <endian.h>
#include <libnbd.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "wire/silence.h"
#include "loss_calls.h"

#define MAX_HANDLES 256

static struct handle {
  struct nbd_handle *nbd;
  uint32_t remote;
  uint64_t serial;
} handles[MAX_HANDLES];
static unsigned nr_handles;

static uint64_t serials[SITE_MAX_PEERS]; /* of connections; under the lock */

/* --- libnbd's transport ------------------------------------------------- */

WRAPPED (int, nbd_aio_connect_uri, struct nbd_handle *nbd, const char *uri)
{
  unsigned i;

  loss_lock ();
  for (i = 0; i < nr_handles && handles[i].nbd != nbd; i++)
    ;
  assert (i < MAX_HANDLES);
  nr_handles += i == nr_handles;
  handles[i].nbd = nbd;
  handles[i].remote = (uint32_t)(uri[strlen (uri) - 1] - '0');
  handles[i].serial = ++serials[handles[i].remote];
  loss_unlock ();
  return __real_nbd_aio_connect_uri (nbd, uri);
}

/* The caller holds the lock, and there is an event before the command is really
 * sent: the peer cannot receive it before its cookie is known here.
 */
static struct write_op *
begin_remote (struct nbd_handle *nbd, uint64_t offset, uint64_t length,
              const void *data, uint32_t *disk)
{
  struct write_op *op;
  unsigned i;

  for (i = 0; handles[i].nbd != nbd; i++)
    assert (i + 1 < nr_handles);
  *disk = 1 + handles[i].remote;
  op = disk_begin (*disk, offset, length, data, handles[i].serial);
  loss_look (false);
  return op;
}

static void
sent (uint32_t disk, struct write_op *op, int64_t cookie)
{
  if (cookie == -1)
    disk_cancel (disk, op);
  else
    disk_set_cookie (op, (uint64_t)cookie);
}

WRAPPED (int64_t, nbd_aio_pwrite, struct nbd_handle *nbd, const void *buf,
         size_t count, uint64_t offset, nbd_completion_callback callback,
         uint32_t flags)
{
  struct write_op *op;
  int64_t cookie;
  uint32_t disk;

  loss_lock ();
  op = begin_remote (nbd, offset, count, buf, &disk);
  cookie = __real_nbd_aio_pwrite (nbd, buf, count, offset, callback, flags);
  sent (disk, op, cookie);
  loss_unlock ();
  return cookie;
}

WRAPPED (int64_t, nbd_aio_zero, struct nbd_handle *nbd, uint64_t count,
         uint64_t offset, nbd_completion_callback callback, uint32_t flags)
{
  struct write_op *op;
  int64_t cookie;
  uint32_t disk;

  loss_lock ();
  op = begin_remote (nbd, offset, count, NULL, &disk);
  cookie = __real_nbd_aio_zero (nbd, count, offset, callback, flags);
  sent (disk, op, cookie);
  loss_unlock ();
  return cookie;
}

/* --- the plain transport ------------------------------------------------ */

/* Headers and payloads of several commands, each in an
 * element of its own.  What of a command left before has no header here.
 */
#define REQUEST_SIZE 28
#define REQUEST_MAGIC 0x25609513u
#define MAX_SENT 32

struct sent_op {
  struct write_op *op;
  size_t start; /* where its header begins in what is sent */
};

static uint64_t
field (const uint8_t *header, unsigned at, unsigned size)
{
  uint64_t value = 0;

  for (unsigned i = at; i < at + size; i++)
    value = value << 8 | header[i];
  return value;
}

/* As the last character of its URI, which is its socket's path. */
static uint32_t
remote_of (int fd)
{
  struct sockaddr_un address = { 0 };
  socklen_t length = sizeof address;

  assert (getpeername (fd, (struct sockaddr *)&address, &length) == 0);
  return (uint32_t)(address.sun_path[strlen (address.sun_path) - 1] - '0');
}

static struct write_op *
begin_sent (uint32_t remote, const uint8_t *header, const void *payload)
{
  unsigned type = (unsigned)field (header, 6, 2);
  struct write_op *op;

  if (type != PEER_WRITE && type != PEER_ZERO)
    return NULL;
  op = disk_begin (1 + remote, field (header, 16, 8), field (header, 24, 4),
                   type == PEER_WRITE ? payload : NULL, serials[remote]);
  disk_set_cookie (op, field (header, 8, 8));
  loss_look (false);
  return op;
}

WRAPPED (ssize_t, conn_sendmsg, int fd, const struct msghdr *msg, int flags)
{
  struct sent_op ops[MAX_SENT];
  uint32_t remote = remote_of (fd);
  unsigned nr = 0;
  size_t at = 0;
  ssize_t n;

  loss_lock ();
  for (size_t i = 0; i < msg->msg_iovlen; at += msg->msg_iov[i++].iov_len) {
    const uint8_t *header = msg->msg_iov[i].iov_base;
    const void *payload
        = i + 1 < msg->msg_iovlen ? msg->msg_iov[i + 1].iov_base : NULL;
    struct write_op *op = NULL;

    if (msg->msg_iov[i].iov_len == REQUEST_SIZE
        && field (header, 0, 4) == REQUEST_MAGIC)
      op = begin_sent (remote, header, payload);
    if (op)
      ops[nr++] = (struct sent_op){ op, at };
  }
  loss_unlock ();
  n = __real_conn_sendmsg (fd, msg, flags);
  loss_lock ();
  while (nr-- > 0)
    if (n < 0 || ops[nr].start >= (size_t)n)
      disk_cancel (1 + remote, ops[nr].op); /* not a byte of it has left */
  loss_unlock ();
  return n;
}

/* --- the servers -------------------------------------------------------- */

void
loss_enter (void *remote TEST_UNUSED)
{
  loss_lock ();
}

void
loss_applied (void *remote, const struct peer_command *cmd)
{
  uint32_t disk = 1 + (uint32_t)(uintptr_t)remote;
  struct write_op *op;

  if (cmd->type == PEER_FLUSH)
    disk_flushed (disk, disk_stamp ());
  else if (cmd->type != PEER_READ) {
    op = disk_find (disk, be64toh (cmd->cookie), cmd->offset, cmd->length);
    assert (op);
    assert (disk_brings (op, cmd->type == PEER_WRITE ? cmd->data : NULL));
    disk_end (disk, op, cmd->fua);
  }
  loss_look (cmd->type == PEER_FLUSH || cmd->fua);
}

void
loss_leave (void *remote TEST_UNUSED)
{
  loss_unlock ();
}

void
loss_forget_old (uint32_t remote)
{
  loss_lock ();
  disk_forget (1 + remote, serials[remote]);
  loss_unlock ();
}
