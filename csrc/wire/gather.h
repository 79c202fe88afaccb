/* SPDX-License-Identifier: BSD-3-Clause */

/* Collect the bytes for a sendmsg when a part of them has left already. */

#ifndef NBDM_GATHER_H
#define NBDM_GATHER_H

#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/uio.h>

/* Append [base, base + size) without its first `*skip` bytes; msg_iov must have
 * room.  `*skip` becomes the bytes that are still to skip.
 */
static inline void
gather (struct msghdr *msg, void *base, size_t size, size_t *skip)
{
  if (*skip >= size) {
    *skip -= size;
    return;
  }
  msg->msg_iov[msg->msg_iovlen++]
      = (struct iovec){ .iov_base = (uint8_t *)base + *skip,
                        .iov_len = size - *skip };
  *skip = 0;
}

#endif /* NBDM_GATHER_H */
