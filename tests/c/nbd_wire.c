/* SPDX-License-Identifier: BSD-3-Clause */

/* See nbd_wire.h. */

#include <endian.h>
#include <errno.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "nbd_wire.h"

#define IHAVEOPT UINT64_C (0x49484156454f5054)
#define OPT_REPLY_MAGIC UINT64_C (0x3e889045565a9)
#define HANDSHAKE_FLAGS 3 /* fixed newstyle, no zeroes */
#define OPT_ABORT 2
#define OPT_STARTTLS 5
#define INFO_BLOCK_SIZE 3
#define OPT_INFO 6
#define OPT_GO 7
#define REP_ACK 1
#define REP_INFO 3
#define REP_UNSUPPORTED 0x80000001u
#define EXPORT_FUA 8
#define EXPORT_ZEROES (64 | 2048) /* and fast zero */
/* has flags, flush, FUA, trim, write zeroes */
#define EXPORT_FLAGS (1 | 4 | EXPORT_FUA | 32 | EXPORT_ZEROES)

bool
wire_receive (int fd, void *buf, size_t count)
{
  char *p = buf;

  while (count > 0) {
    ssize_t n = recv (fd, p, count, 0);
    if (n < 0 && errno == EINTR)
      continue;
    if (n <= 0)
      return false;
    p += n;
    count -= (size_t)n;
  }
  return true;
}

/* The other side may have received all of it, and a test may change `p`, before
 * send returns. The sanitizer's send reads the bytes a second time after the
 * call, so the system call is made directly; a send of no bytes gives the
 * sanitizer the order of events.
 */
static ssize_t
send_bytes (int fd, const char *p, size_t count)
{
#ifdef __SANITIZE_THREAD__
  (void)send (fd, NULL, 0, MSG_DONTWAIT | MSG_NOSIGNAL);
  return syscall (SYS_sendto, fd, p, count, MSG_NOSIGNAL, NULL, 0);
#else
  return send (fd, p, count, MSG_NOSIGNAL);
#endif
}

bool
wire_transmit (int fd, const void *buf, size_t count)
{
  const char *p = buf;

  while (count > 0) {
    ssize_t n = send_bytes (fd, p, count);
    if (n < 0 && errno == EINTR)
      continue;
    if (n <= 0)
      return false;
    p += n;
    count -= (size_t)n;
  }
  return true;
}

struct __attribute__ ((packed)) option {
  uint64_t magic;
  uint32_t option, length;
};

struct __attribute__ ((packed)) option_reply {
  uint64_t magic;
  uint32_t option, type, length;
};

struct __attribute__ ((packed)) export_info {
  uint16_t type;
  uint64_t size;
  uint16_t flags;
};

struct __attribute__ ((packed)) block_info {
  uint16_t type;
  uint32_t min, preferred, max;
};

static bool
option_reply (int fd, uint32_t option, uint32_t type, const void *data,
              uint32_t length)
{
  const struct option_reply reply = { .magic = htobe64 (OPT_REPLY_MAGIC),
                                      .option = htobe32 (option),
                                      .type = htobe32 (type),
                                      .length = htobe32 (length) };

  return wire_transmit (fd, &reply, sizeof reply)
         && (length == 0 || wire_transmit (fd, data, length));
}

static bool
skip (int fd, uint32_t length)
{
  char byte;

  while (length-- > 0)
    if (!wire_receive (fd, &byte, 1))
      return false;
  return true;
}

void (*_Atomic wire_secure) (int fd);
struct wire_block_sizes wire_block_sizes;

static bool
say_block_sizes (int fd, uint32_t option)
{
  const struct block_info info
      = { .type = htobe16 (INFO_BLOCK_SIZE),
          .min = htobe32 (wire_block_sizes.min),
          .preferred = htobe32 (wire_block_sizes.preferred),
          .max = htobe32 (wire_block_sizes.max) };

  return wire_block_sizes.max == 0
         || option_reply (fd, option, REP_INFO, &info, sizeof info);
}

bool
wire_handshake_plain (int fd, uint64_t size, bool no_fua, bool no_zeroes)
{
  const uint64_t magics[2]
      = { htobe64 (UINT64_C (0x4e42444d41474943)), htobe64 (IHAVEOPT) };
  const uint16_t flags = htobe16 (HANDSHAKE_FLAGS);
  const struct export_info info
      = { .size = htobe64 (size),
          .flags = htobe16 (EXPORT_FLAGS & ~(no_fua ? EXPORT_FUA : 0)
                            & ~(no_zeroes ? EXPORT_ZEROES : 0)) };
  void (*const secure) (int) = wire_secure;
  struct option option;
  uint32_t client_flags;

  if (!wire_transmit (fd, magics, sizeof magics)
      || !wire_transmit (fd, &flags, sizeof flags)
      || !wire_receive (fd, &client_flags, sizeof client_flags))
    return false;
  for (;;) {
    if (!wire_receive (fd, &option, sizeof option)
        || option.magic != htobe64 (IHAVEOPT)
        || !skip (fd, be32toh (option.length)))
      return false;
    uint32_t number = be32toh (option.option);
    bool wanted = number == OPT_GO || number == OPT_INFO;

    if (number == OPT_STARTTLS && secure) {
      if (!option_reply (fd, number, REP_ACK, NULL, 0))
        return false;
      secure (fd);
      continue;
    }
    if (wanted
        && (!option_reply (fd, number, REP_INFO, &info, sizeof info)
            || !say_block_sizes (fd, number)))
      return false;
    if (!option_reply (
            fd, number,
            wanted || number == OPT_ABORT ? REP_ACK : REP_UNSUPPORTED, NULL, 0))
      return false;
    if (number == OPT_GO || number == OPT_ABORT)
      return number == OPT_GO;
  }
}

bool
wire_handshake (int fd, uint64_t size, bool no_fua)
{
  return wire_handshake_plain (fd, size, no_fua, false);
}
