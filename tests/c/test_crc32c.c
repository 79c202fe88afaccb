/* SPDX-License-Identifier: BSD-3-Clause */

/* crc32c against the published vectors and a bit-by-bit sum of our own: the
 * value is on disk, so it must be the standard's and stay so.
 */

#include "base/crc32c.h"
#include "base/crc64.h"
#include "test.h"

#include <sys/mman.h>

static uint32_t
bit_by_bit (const uint8_t *data, size_t length)
{
  uint32_t state = 0xffffffff;

  for (size_t i = 0; i < length; i++) {
    state ^= data[i];
    for (int bit = 0; bit < 8; bit++)
      state = state & 1 ? state >> 1 ^ 0x82f63b78 : state >> 1;
  }
  return ~state;
}

static void
test_crc32c_rfc3720_vectors_match (void)
{
  uint8_t buf[32];

  assert (crc32c (0, "123456789", 9) == 0xe3069283);
  memset (buf, 0, sizeof buf);
  assert (crc32c (0, buf, sizeof buf) == 0x8a9136aa);
  memset (buf, 0xff, sizeof buf);
  assert (crc32c (0, buf, sizeof buf) == 0x62a8ab43);
  for (unsigned i = 0; i < sizeof buf; i++)
    buf[i] = (uint8_t)i;
  assert (crc32c (0, buf, sizeof buf) == 0x46dd794e);
}

static void
test_crc32c_nothing_changes_nothing (void)
{
  assert (crc32c (0, NULL, 0) == 0);
  assert (crc32c (0x12345678, NULL, 0) == 0x12345678);
}

static void
test_crc32c_any_length_and_alignment_match (void)
{
  uint8_t buf[600];

  for (unsigned i = 0; i < sizeof buf; i++)
    buf[i] = (uint8_t)(i * 167 + (i >> 3));
  for (unsigned start = 0; start < 17; start++) {
    for (unsigned length = 0; length < 560; length += 13)
      assert (bit_by_bit (buf + start, length)
              == crc32c (0, buf + start, length));
  }
}

static void
test_crc32c_in_pieces_equals_whole (void)
{
  uint8_t buf[300];

  for (unsigned i = 0; i < sizeof buf; i++)
    buf[i] = (uint8_t)(i * 31 + 7);
  uint32_t whole = crc32c (0, buf, sizeof buf);
  for (unsigned cut = 0; cut <= sizeof buf; cut++) {
    uint32_t crc = crc32c (0, buf, cut);
    assert (whole == crc32c (crc, buf + cut, sizeof buf - cut));
  }
}

/* More than isa-l's int can say, signed or not; the memory is never written,
 * so there is no more of it than a page of zeroes.
 */
static void
test_crc32c_past_an_int_equals_pieces (void)
{
  size_t size = (UINT64_C (1) << 32) + 4099, cut = 123457;
  uint8_t *zeroes = mmap (NULL, size, PROT_READ,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

  assert (zeroes != MAP_FAILED);
  uint32_t crc = crc32c (0, zeroes, cut);
  assert (crc32c (0, zeroes, size) == crc32c (crc, zeroes + cut, size - cut));
  munmap (zeroes, size);
}

static void
test_crc64_check_value_matches (void)
{
  assert (crc64 ("123456789", 9) == UINT64_C (0x995dc9bbdf1939fa));
  assert (crc64 ("", 0) == 0);
}

int
main (void)
{
  RUN (test_crc32c_rfc3720_vectors_match);
  RUN (test_crc32c_nothing_changes_nothing);
  RUN (test_crc32c_any_length_and_alignment_match);
  RUN (test_crc32c_in_pieces_equals_whole);
  RUN (test_crc32c_past_an_int_equals_pieces);
  RUN (test_crc64_check_value_matches);
  return 0;
}
