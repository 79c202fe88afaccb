/* SPDX-License-Identifier: BSD-3-Clause */

/* Move a number of bytes through a stream, all of them, by a time. */

#ifndef NBDM_STREAM_WHOLE_H
#define NBDM_STREAM_WHOLE_H

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

struct stream;

/* 0, -ETIMEDOUT, -ECONNRESET at the end of the stream, or another -errno, all
 * without a message.  The iovecs are used up.
 */
int stream_receive_whole (struct stream *stream, void *to, size_t size,
                          uint64_t until_ns);
int stream_send_whole (struct stream *stream, struct iovec *iov, int nr,
                       uint64_t until_ns);

#endif /* NBDM_STREAM_WHOLE_H */
