/* SPDX-License-Identifier: BSD-3-Clause */

/* A stream without TLS: the socket itself. */

#define _GNU_SOURCE
#include <sys/socket.h>

#include "wire/receive.h"
#include "wire/stream.h"
#include "wire/transport_plain.h"

static ssize_t
plain_receive (struct stream *stream, struct iovec *iov, size_t nr, int flags)
{
  return receive_iov (stream->fd, iov, nr, flags);
}

static ssize_t
plain_send (struct stream *stream, const struct msghdr *msg, int flags)
{
  return conn_sendmsg (stream->fd, msg, flags | MSG_NOSIGNAL);
}

static bool
plain_has_input (const struct stream *stream)
{
  (void)stream;
  return false;
}

static size_t
plain_partial (const struct stream *stream)
{
  (void)stream;
  return 0;
}

/* The end of the stream says it. */
static void
plain_part (struct stream *stream)
{
  (void)stream;
}

static void
plain_end (struct stream *stream)
{
  (void)stream;
}

const struct stream_kind plain_stream = {
  .receive = plain_receive,
  .send = plain_send,
  .has_input = plain_has_input,
  .partial = plain_partial,
  .part = plain_part,
  .end = plain_end,
};
