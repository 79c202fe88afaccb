/* SPDX-License-Identifier: BSD-3-Clause */

/* The bytes to and from the other side of a connected socket: plain, or with
 * TLS around them (tls.c).  The users of a stream do not know which.
 *
 * One thread at a time sends, and one at a time receives; they may be two.
 */

#ifndef NBDM_STREAM_H
#define NBDM_STREAM_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/uio.h>

struct stream;
struct tls;

struct stream_kind {
  /* As recvmsg, perhaps with MSG_DONTWAIT.  0: the other side has said
   * that it sends no more.  EBADMSG: see receive.h.
   */
  ssize_t (*receive) (struct stream *stream, struct iovec *iov, size_t nr,
                      int flags);
  /* As sendmsg: returns how many of these bytes have left.  After EAGAIN, or if
   * only some have left, the next call must begin with the first byte that has
   * not.
   */
  ssize_t (*send) (struct stream *stream, const struct msghdr *msg, int flags);
  /* Were bytes received that poll on the socket no longer reports?  Only the
   * receiving thread calls it.
   */
  bool (*has_input) (const struct stream *stream);
  /* Bytes that have come and that the receiver cannot have yet, as their record
   * is not complete.  Any thread may call it.
   */
  size_t (*partial) (const struct stream *stream);
  /* Tell the other side that no more will be sent.  No thread sends. */
  void (*part) (struct stream *stream);
  /* Free all but the socket. */
  void (*end) (struct stream *stream);
};

struct stream {
  const struct stream_kind *kind;
  int fd;          /* the owner of the stream closes it */
  struct tls *tls; /* of that kind */
};

extern const struct stream_kind plain_stream;

static inline struct stream
stream_plain (int fd)
{
  return (struct stream){ .kind = &plain_stream, .fd = fd };
}

static inline ssize_t
stream_receive (struct stream *stream, struct iovec *iov, size_t nr, int flags)
{
  return stream->kind->receive (stream, iov, nr, flags);
}

static inline ssize_t
stream_send (struct stream *stream, const struct msghdr *msg, int flags)
{
  return stream->kind->send (stream, msg, flags);
}

static inline bool
stream_has_input (const struct stream *stream)
{
  return stream->kind->has_input (stream);
}

static inline size_t
stream_partial (const struct stream *stream)
{
  return stream->kind->partial (stream);
}

static inline void
stream_part (struct stream *stream)
{
  stream->kind->part (stream);
}

static inline void
stream_end (struct stream *stream)
{
  stream->kind->end (stream);
}

#endif /* NBDM_STREAM_H */
