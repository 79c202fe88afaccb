/* SPDX-License-Identifier: BSD-3-Clause */

/* The NBD protocol's numbers and its structures on the wire, big-endian; the
 * source is doc/proto.md of the NBD project.  The plain transport uses them as
 * a client, the direct door as a server.
 */

#ifndef NBDM_PROTOCOL_H
#define NBDM_PROTOCOL_H

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>

/* --- Handshake, fixed newstyle ----------------------------------------- */

#define NBD_MAGIC UINT64_C (0x4e42444d41474943)  /* "NBDMAGIC" */
#define NBD_OPTION UINT64_C (0x49484156454f5054) /* "IHAVEOPT" */
#define NBD_OPTION_REPLY UINT64_C (0x0003e889045565a9)

#define NBD_FLAG_FIXED_NEWSTYLE 1u /* the server's, and the client's */
#define NBD_FLAG_NO_ZEROES 2u

enum nbd_option {
  NBD_OPT_EXPORT_NAME = 1,
  NBD_OPT_ABORT = 2,
  NBD_OPT_LIST = 3,
  NBD_OPT_STARTTLS = 5,
  NBD_OPT_INFO = 6,
  NBD_OPT_GO = 7,
  NBD_OPT_STRUCTURED_REPLY = 8,
  NBD_OPT_LIST_META_CONTEXT = 9,
  NBD_OPT_SET_META_CONTEXT = 10
};

#define NBD_REP_ACK 1u
#define NBD_REP_SERVER 2u
#define NBD_REP_INFO 3u
#define NBD_REP_META_CONTEXT 4u
#define NBD_REP_ERR_UNSUP 0x80000001u
#define NBD_REP_ERR_POLICY 0x80000002u
#define NBD_REP_ERR_INVALID 0x80000003u
#define NBD_REP_ERR_TLS_REQD 0x80000005u
#define NBD_REP_ERR_TOO_BIG 0x80000009u

#define NBD_INFO_EXPORT 0u
#define NBD_INFO_DESCRIPTION 2u
#define NBD_INFO_BLOCK_SIZE 3u

/* Transmission flags: what the export can do. */
#define NBD_FLAG_HAS_FLAGS 0x001u
#define NBD_FLAG_READ_ONLY 0x002u
#define NBD_FLAG_SEND_FLUSH 0x004u
#define NBD_FLAG_SEND_FUA 0x008u
#define NBD_FLAG_SEND_TRIM 0x020u
#define NBD_FLAG_SEND_WRITE_ZEROES 0x040u
#define NBD_FLAG_SEND_DF 0x080u
#define NBD_FLAG_CAN_MULTI_CONN 0x100u
#define NBD_FLAG_SEND_CACHE 0x400u
#define NBD_FLAG_SEND_FAST_ZERO 0x800u

struct nbd_greeting {
  uint64_t magic;
  uint64_t option; /* NBD_OPTION */
  uint16_t flags;
} __attribute__ ((packed));

struct nbd_option_header {
  uint64_t magic; /* NBD_OPTION */
  uint32_t option;
  uint32_t length;
} __attribute__ ((packed));

struct nbd_option_reply {
  uint64_t magic; /* NBD_OPTION_REPLY */
  uint32_t option;
  uint32_t type;
  uint32_t length;
} __attribute__ ((packed));

struct nbd_info_export {
  uint16_t type;
  uint64_t size;
  uint16_t flags;
} __attribute__ ((packed));

struct nbd_info_block_size {
  uint16_t type;
  uint32_t minimum, preferred, maximum;
} __attribute__ ((packed));

/* The answer to NBD_OPT_EXPORT_NAME. */
struct nbd_export {
  uint64_t size;
  uint16_t flags;
  uint8_t zeroes[124]; /* unless both agreed on NBD_FLAG_NO_ZEROES */
} __attribute__ ((packed));

/* --- Transmission ------------------------------------------------------- */

#define NBD_REQUEST_MAGIC 0x25609513u
#define NBD_SIMPLE_REPLY_MAGIC 0x67446698u
#define NBD_CHUNK_MAGIC 0x668e33efu

enum nbd_command {
  NBD_CMD_READ = 0,
  NBD_CMD_WRITE = 1,
  NBD_CMD_DISC = 2,
  NBD_CMD_FLUSH = 3,
  NBD_CMD_TRIM = 4,
  NBD_CMD_CACHE = 5,
  NBD_CMD_WRITE_ZEROES = 6,
  NBD_CMD_BLOCK_STATUS = 7
};

#define NBD_CMD_FLAG_FUA 1u
#define NBD_CMD_FLAG_NO_HOLE 2u
#define NBD_CMD_FLAG_DF 4u
#define NBD_CMD_FLAG_REQ_ONE 8u
#define NBD_CMD_FLAG_FAST_ZERO 16u

#define NBD_CHUNK_DONE 1u /* its only flag */
#define NBD_CHUNK_OFFSET_DATA 1u
#define NBD_CHUNK_BLOCK_STATUS 5u
#define NBD_CHUNK_ERROR 0x8001u

struct nbd_request {
  uint32_t magic;
  uint16_t flags;
  uint16_t type;
  uint64_t cookie;
  uint64_t offset;
  uint32_t length;
} __attribute__ ((packed));

struct nbd_simple_reply {
  uint32_t magic;
  uint32_t error;
  uint64_t cookie;
} __attribute__ ((packed));

/* Is it an error that a reply may carry?  The numbers are those of Linux. */
static inline bool
nbd_has_error (uint32_t error)
{
  switch (error) {
  case 0:
  case EPERM:
  case EIO:
  case ENOMEM:
  case EINVAL:
  case ENOSPC:
  case EOVERFLOW:
  case EOPNOTSUPP:
  case ESHUTDOWN:
    return true;
  default:
    return false;
  }
}

struct nbd_chunk {
  uint32_t magic;
  uint16_t flags;
  uint16_t type;
  uint64_t cookie;
  uint32_t length; /* of the payload that follows */
} __attribute__ ((packed));

struct nbd_block_descriptor {
  uint32_t length;
  uint32_t status; /* NBDM_EXTENT_* are the protocol's own */
} __attribute__ ((packed));

_Static_assert(sizeof (struct nbd_request) == 28, "protocol");
_Static_assert(sizeof (struct nbd_simple_reply) == 16, "protocol");
_Static_assert(sizeof (struct nbd_chunk) == 20, "protocol");
_Static_assert(sizeof (struct nbd_option_header) == 16, "protocol");
_Static_assert(sizeof (struct nbd_option_reply) == 20, "protocol");

#endif /* NBDM_PROTOCOL_H */
