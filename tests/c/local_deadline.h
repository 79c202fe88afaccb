/* SPDX-License-Identifier: BSD-3-Clause */

/* A deadline for the local disk of every volume of a test: so its calls are
 * made by other threads (csrc/volume/local_io.c), and the test is another one.
 */

#ifndef NBDM_TEST_LOCAL_DEADLINE_H
#define NBDM_TEST_LOCAL_DEADLINE_H

#include <stdint.h>
#include <stdlib.h>

/* Milliseconds; 0: none.  Of run-one. */
static inline uint32_t
local_deadline_of_tests (void)
{
  const char *text = getenv ("NBDM_TEST_LOCAL_DEADLINE");

  return text ? (uint32_t)strtoul (text, NULL, 0) : 0;
}

#endif /* NBDM_TEST_LOCAL_DEADLINE_H */
