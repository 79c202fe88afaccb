/* SPDX-License-Identifier: BSD-3-Clause */

/* What a sendmsg is to carry, when some of it has left before. */

#ifndef NBDM_GATHER_H
#define NBDM_GATHER_H

#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/uio.h>

/* Append what of [base, base + size) lies behind the first `*skip` bytes; there
 * must be room for it in msg_iov.  `*skip` becomes what is still to be skipped.
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
