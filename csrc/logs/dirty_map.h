/* SPDX-License-Identifier: BSD-3-Clause */

/* The file `dirty.<remote>`: what a disk misses.  See dirty_map.c. */

#ifndef NBDM_DIRTY_MAP_H
#define NBDM_DIRTY_MAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "logs/bitmap.h"
#include "logs/layout.h"

/* The file `dirty.<remote>`: its four maps over one shared mapping, and the
 * volatile `copied` map.  A region is in `copied` from the answer of its
 * resync copy to the flush that lets its dirty bit be cleared: meanwhile
 * writes treat it as clean (both legs), a crash or loss as dirty.
 */
struct dirty_map {
  int fd;
  char file[80];
  void *mapping;
  size_t mapping_size;
  struct disk_log_header header;
  struct bitmap map[NR_MAPS];
  struct bitmap copied;
  /* Volatile as well, and of the dirty ones: the remote answered bytes there
   * and may have lost them with its cache.  One that is late as well may not
   * wait for its window, as one may that is late alone: what was sent to that
   * was sent again, and it is copied once more for safety.
   */
  struct bitmap lost;
  /* Volatile too.  Empty unless a takeover is under way (state.c).  Of a
   * remote: the marks that it was spared as the only source; it gets them if
   * local is the source after all.  Of dirty.local: the regions that the
   * takeover has made local miss.
   */
  struct bitmap owed, owed_late;
  void *volatile_words; /* of these four */
  bool changed;         /* since the last dirty_map_persist */
  uint64_t persists;    /* msyncs that were made */
};

/* What a new map holds; 0: nothing is dirty. */
#define NEW_MAP_DIRTY 1u   /* every region is dirty */
#define NEW_MAP_LATE 2u    /* every region is late */
#define NEW_MAP_RENEWED 4u /* LOG_RENEWED, until dirty_map_begin */

/* Make the file; durable. */
int dirty_map_create (int dirfd, const char *remote, const uint8_t *uuid,
                      uint64_t session, uint64_t nr_regions,
                      uint32_t region_size, unsigned contents);

/* Map and check it.  -ENOENT, -EUCLEAN: as log_header_load, or the session is
 * neither `session` nor one more, or LOG_CLEAN and bits_crc does not match.
 * `*clean` says whether LOG_CLEAN was set.
 */
int dirty_map_open (struct dirty_map *dm, int dirfd, const char *remote,
                    const uint8_t *uuid, uint64_t session, uint64_t nr_regions,
                    uint32_t region_size, bool *clean);
/* Take LOG_CLEAN from a map that a start is about to change, and stamp it with
 * `session`; durable.  Without it a start that ends early would leave bits that
 * `bits_crc` does not fit, and the next one would not believe the map.
 */
int dirty_map_unseal (struct dirty_map *dm, uint64_t session);
/* Make the bits durable, then stamp the header with `session`, no flag set;
 * durable.
 */
int dirty_map_begin (struct dirty_map *dm, uint64_t session);
/* Make the bits durable (msync) if they changed. */
int dirty_map_persist (struct dirty_map *dm);
/* Persist, compute bits_crc, set LOG_CLEAN; durable. */
int dirty_map_finish (struct dirty_map *dm);
void dirty_map_close (struct dirty_map *dm);

/* Regions become dirty, and no longer copied; with `late` also late. */
void dirty_map_mark (struct dirty_map *dm, uint64_t first, uint64_t count,
                     bool late);
/* Regions whose copy a flush has covered: clear dirty where still copied, but
 * of late ones only what they had lost.  Returns how many became clean.
 */
uint64_t dirty_map_clean (struct dirty_map *dm, uint64_t first, uint64_t count);
/* The dirty ones of the regions miss bytes that were answered. */
void dirty_map_mark_lost (struct dirty_map *dm, uint64_t first, uint64_t count);
/* Put a region's mark by; make it, if there is one; forget all of them. */
void dirty_map_owe (struct dirty_map *dm, uint64_t region, bool late);
void dirty_map_pay (struct dirty_map *dm, uint64_t region);
void dirty_map_forgive (struct dirty_map *dm);
/* The connection is lost: unflushed becomes dirty and lost, copied is
 * forgotten.
 */
void dirty_map_lost (struct dirty_map *dm);

#endif /* NBDM_DIRTY_MAP_H */
