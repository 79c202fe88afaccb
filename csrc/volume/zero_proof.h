/* SPDX-License-Identifier: BSD-3-Clause */

/* Prove that a disk reads as zeroes.  See zero_proof.c. */

#ifndef NBDM_ZERO_PROOF_H
#define NBDM_ZERO_PROOF_H

#include <stdbool.h>
#include <stdint.h>

/* True: each of the first `size` bytes of `fd` was read as zero, or lies in a
 * hole.  False: one is not, or cannot be read, or the proof would take too
 * long.
 */
bool reads_as_zeroes (int fd, uint64_t size);

#endif /* NBDM_ZERO_PROOF_H */
