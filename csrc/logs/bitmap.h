/* SPDX-License-Identifier: BSD-3-Clause */

/* Bitmaps over the caller's memory.  See bitmap.c. */

#ifndef NBDM_BITMAP_H
#define NBDM_BITMAP_H

#include <stdbool.h>
#include <stdint.h>

#include "logs/layout.h"

/* A bitmap over the caller's memory (a mapped file or anonymous), bit i in bit
 * i % 8 of byte i / 8.  A count per page of bits makes empty stretches cheap to
 * skip, to clear and to merge.  No locking: the caller holds volume->lock.
 * Plain readers of the memory (Python's bitarray) may see one byte of a change
 * and not the next, but never half a byte.
 */
struct bitmap {
  uint64_t *words; /* little-endian */
  uint64_t nr_bits;
  uint64_t nr_set;    /* bits that are 1 */
  uint32_t *page_set; /* of these, in each LAYOUT_PAGE of words */
  uint64_t nr_pages;
};

#define BITMAP_PAGE_BITS (LAYOUT_PAGE * UINT64_C (8))

/* Bytes `nr_bits` take, padded to LAYOUT_PAGE. */
uint64_t bitmap_bytes (uint64_t nr_bits);

/* Use `words` (bitmap_bytes long), without reading them: they count as zeros
 * until bitmap_count.  -ENOMEM.
 */
int bitmap_init (struct bitmap *map, void *words, uint64_t nr_bits);
/* Count the set bits of a page of `words` from `content`, a copy of that page;
 * the page itself is not read.
 */
void bitmap_count (struct bitmap *map, uint64_t page, const void *content);
/* Clear the bits from nr_bits to the end of the last page: a file may hold
 * anything there, and no other check reads them.
 */
void bitmap_clear_padding (struct bitmap *map);
void bitmap_free (struct bitmap *map); /* not the words */

bool bitmap_test (const struct bitmap *map, uint64_t bit);
/* Both return how many bits changed. */
uint64_t bitmap_set (struct bitmap *map, uint64_t first, uint64_t count);
uint64_t bitmap_clear (struct bitmap *map, uint64_t first, uint64_t count);
void bitmap_clear_all (struct bitmap *map);
/* into |= from, of the same nr_bits; returns how many bits of into changed. */
uint64_t bitmap_merge (struct bitmap *into, const struct bitmap *from);
/* The first bit in [from, end) that is set (clear), or `end` if none. */
uint64_t bitmap_next_set (const struct bitmap *map, uint64_t from,
                          uint64_t end);
uint64_t bitmap_next_clear (const struct bitmap *map, uint64_t from,
                            uint64_t end);

#endif /* NBDM_BITMAP_H */
