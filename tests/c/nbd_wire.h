/* SPDX-License-Identifier: BSD-3-Clause */

/* The parts of the NBD protocol that nbd_peer.c speaks: fixed newstyle, simple
 * replies. libnbd can talk to it as to any server; the other parts are refused.
 */

#ifndef NBDM_NBD_WIRE_H
#define NBDM_NBD_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define REQUEST_MAGIC 0x25609513u
#define REPLY_MAGIC 0x67446698u
#define TYPE_DISCONNECT 2
#define FLAG_FUA 1

/* Big-endian, except the cookie, which is the client's. */
struct __attribute__ ((packed)) wire_request {
  uint32_t magic;
  uint16_t flags, type;
  uint64_t cookie, offset;
  uint32_t length;
};

struct __attribute__ ((packed)) wire_reply {
  uint32_t magic, error;
  uint64_t cookie;
};

/* Both move all `size` bytes, or return false when the connection is over. */
bool wire_receive (int fd, void *buf, size_t count);
bool wire_transmit (int fd, const void *buf, size_t count);
/* Put TLS around the socket after an ACK of STARTTLS; the descriptor stays the
 * same.  NULL: the servers have none.
 */
extern void (*_Atomic wire_secure) (int fd);
/* What the servers say of block sizes; all 0: nothing.  Set it before any is
 * started.
 */
struct wire_block_sizes {
  uint32_t min, preferred, max;
};
extern struct wire_block_sizes wire_block_sizes;
/* Up to the transmission phase; false: the client wants none. */
bool wire_handshake (int fd, uint64_t size, bool no_fua);
/* The same of a server that may know no zeroes either. */
bool wire_handshake_plain (int fd, uint64_t size, bool no_fua, bool no_zeroes);

#endif /* NBDM_NBD_WIRE_H */
