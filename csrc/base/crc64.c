/* SPDX-License-Identifier: BSD-3-Clause */

/* CRC64 of the content of a sample of the local disk.  With 32 bits one of four
 * billion foreign blocks would look the same, and a volume starts many times.
 */

#include <isa-l/crc64.h>

#include "base/crc64.h"

uint64_t
crc64 (const void *data, size_t length)
{
  return crc64_ecma_refl (0, data, length);
}
