/* SPDX-License-Identifier: BSD-3-Clause */

/* Waits in poll, so that a time bounds the whole and not each step: a socket's
 * own time-out begins anew with each byte, and a peer could send one at a time.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sys/socket.h>

#include "base/clock.h"
#include "wire/stream.h"
#include "wire/stream_whole.h"

static int
await (const struct stream *stream, short events, uint64_t until_ns)
{
  struct pollfd fd = { .fd = stream->fd, .events = events };
  uint64_t now = now_ns ();

  if (now >= until_ns)
    return -ETIMEDOUT;
  if (poll (&fd, 1, (int)((until_ns - now) / NS_PER_MS) + 1) < 0
      && errno != EINTR)
    return -errno;
  return 0;
}

int
stream_receive_whole (struct stream *stream, void *to, size_t size,
                      uint64_t until_ns)
{
  int rc = 0;

  while (size > 0 && rc == 0) {
    struct iovec iov = { to, size };
    ssize_t n = stream_receive (stream, &iov, 1, MSG_DONTWAIT);

    if (n == 0)
      return -ECONNRESET;
    if (n > 0) {
      to = (char *)to + n;
      size -= (size_t)n;
      rc = size > 0 && now_ns () >= until_ns ? -ETIMEDOUT : 0;
    }
    else if (errno == EAGAIN)
      rc = await (stream, POLLIN, until_ns);
    else if (errno != EINTR)
      return -errno;
  }
  return rc;
}

static void
advance (struct iovec **iov, int *nr, size_t bytes)
{
  while (*nr > 0 && bytes >= (*iov)->iov_len) {
    bytes -= (*iov)->iov_len;
    ++*iov;
    --*nr;
  }
  if (*nr > 0) {
    (*iov)->iov_base = (char *)(*iov)->iov_base + bytes;
    (*iov)->iov_len -= bytes;
  }
}

int
stream_send_whole (struct stream *stream, struct iovec *iov, int nr,
                   uint64_t until_ns)
{
  int rc = 0;

  while (nr > 0 && rc == 0) {
    const struct msghdr msg = { .msg_iov = iov, .msg_iovlen = (size_t)nr };
    ssize_t n = stream_send (stream, &msg, MSG_DONTWAIT);

    if (n >= 0) {
      advance (&iov, &nr, (size_t)n);
      rc = nr > 0 && now_ns () >= until_ns ? -ETIMEDOUT : 0;
    }
    else if (errno == EAGAIN)
      rc = await (stream, POLLOUT, until_ns);
    else if (errno != EINTR)
      return -errno;
  }
  return rc;
}
