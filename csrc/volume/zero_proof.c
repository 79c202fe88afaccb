/* SPDX-License-Identifier: BSD-3-Clause */

/* Prove that a disk reads as zeroes, so that two new nodes need no copy.
 *
 * Holes are proof by themselves.  Everything else is read, up to a limit: a
 * disk with content shows it early, and a large device that was written with
 * zeroes only costs a resync, whose zeroes are cheap.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

#include "volume/zero_proof.h"

#define MOST_READ (UINT64_C (256) << 20) /* bytes; about a second */
#define STEP ((size_t)1 << 20)

static bool
is_zero (const char *bytes, size_t size)
{
  return size == 0
         || (bytes[0] == 0 && memcmp (bytes, bytes + 1, size - 1) == 0);
}

/* Read [at, end). */
static bool
data_is_zero (int fd, char *buf, uint64_t at, uint64_t end)
{
  while (at < end) {
    size_t step = end - at < STEP ? (size_t)(end - at) : STEP;
    ssize_t n = pread (fd, buf, step, (off_t)at);

    if (n < 0 && errno == EINTR)
      continue;
    if (n <= 0 || !is_zero (buf, (size_t)n))
      return false;
    at += (uint64_t)n;
  }
  return true;
}

/* The next run of data from `at` on, within `size`.  A file system that knows
 * no holes calls everything data.  False: there is none, or an error, which
 * `*failed` tells.
 */
static bool
next_data (int fd, uint64_t at, uint64_t size, uint64_t *begin, uint64_t *end,
           bool *failed)
{
  off_t data = at < size ? lseek (fd, (off_t)at, SEEK_DATA) : -1;
  off_t hole;

  *failed = at < size && data < 0 && errno != ENXIO;
  if (data < 0 || (uint64_t)data >= size)
    return false;
  hole = lseek (fd, data, SEEK_HOLE);
  *failed = hole <= data;
  *begin = (uint64_t)data;
  *end = (uint64_t)hole < size ? (uint64_t)hole : size;
  return !*failed;
}

bool
reads_as_zeroes (int fd, uint64_t size)
{
  uint64_t begin = 0, end = 0, left = MOST_READ;
  char *buf = malloc (STEP);
  bool proven = buf != NULL, failed = false;

  while (proven && next_data (fd, end, size, &begin, &end, &failed)) {
    proven = end - begin <= left && data_is_zero (fd, buf, begin, end);
    left -= proven ? end - begin : 0;
  }
  free (buf);
  return proven && !failed;
}
