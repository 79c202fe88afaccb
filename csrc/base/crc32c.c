/* SPDX-License-Identifier: BSD-3-Clause */

/* CRC32C, by isa-l: it selects the CPU's instructions at run time and works at
 * memory speed.  A clean stop of a large volume sums gigabytes of maps.
 *
 * isa-l takes and returns the bare register; this file adds the inversions
 * before and after that RFC 3720 requires.
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

    /* The cast is safe: isa-l only reads, its prototype lacks the const. */
    state = crc32_iscsi ((unsigned char *)p, (int)n, state);
    p += n;
    length -= n;
  }
  return ~state;
}
