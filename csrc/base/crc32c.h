/* SPDX-License-Identifier: BSD-3-Clause */

/* The checksum of the state files.  See crc32c.c. */

#ifndef NBDM_CRC32C_H
#define NBDM_CRC32C_H

#include <stddef.h>
#include <stdint.h>

/* CRC32C (Castagnoli; RFC 3720, appendix B.4) of `length` bytes; `crc` is 0 or
 * the CRC of the preceding bytes.  crc32c ("123456789") is 0xe3069283.
 */
uint32_t crc32c (uint32_t crc, const void *data, size_t length);

#endif /* NBDM_CRC32C_H */
