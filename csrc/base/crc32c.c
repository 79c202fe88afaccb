/* SPDX-License-Identifier: BSD-3-Clause */

/* CRC32C, by isa-l: it picks the CPU's own instructions at run time and works
 * at memory speed, which matters where a clean stop sums up gigabytes of maps.
 *
 * isa-l takes and returns the bare register; the inversions before and after,
 * which RFC 3720 asks for, are made here.
 */

#include <isa-l/crc.h>

#include "base/crc32c.h"

/* isa-l's length is an int.  A power of two keeps the chunks aligned. */
#define CHUNK (UINT64_C (1) << 30)

uint32_t
crc32c (uint32_t crc, const void *data, size_t length)
{
  const unsigned char *p = data;
  uint32_t state = ~crc;

  while (length > 0) {
    size_t n = length < CHUNK ? length : CHUNK;

    /* The cast: isa-l forgot a const, and only reads. */
    state = crc32_iscsi ((unsigned char *)p, (int)n, state);
    p += n;
    length -= n;
  }
  return ~state;
}
