/* SPDX-License-Identifier: BSD-3-Clause */

#ifndef NBDM_ATOMICS_H
#define NBDM_ATOMICS_H

#include <stdatomic.h>
#include <stdint.h>

typedef _Atomic uint64_t atomic_u64;

#endif /* NBDM_ATOMICS_H */
