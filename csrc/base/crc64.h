/* SPDX-License-Identifier: BSD-3-Clause */

/* The checksum of samples.  See crc64.c. */

#ifndef NBDM_CRC64_H
#define NBDM_CRC64_H

#include <stddef.h>
#include <stdint.h>

/* CRC64 (ECMA-182, reflected); of "123456789" it is 0x995dc9bbdf1939fa. */
uint64_t crc64 (const void *data, size_t length);

#endif /* NBDM_CRC64_H */
