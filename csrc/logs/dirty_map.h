/* SPDX-License-Identifier: BSD-3-Clause */

/* The file `dirty.<remote>`; see dirty_map.c. */

#ifndef NBDM_DIRTY_MAP_H
#define NBDM_DIRTY_MAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "logs/bitmap.h"
#include "logs/layout.h"

/* The file `dirty.<remote>`: its four maps, of a node five, over one shared
 * mapping, and the volatile `copied` map.  A region is in `copied` from the
 * answer of its resync copy to the flush that lets its dirty bit be cleared:
 * between the two, writes treat it as clean (both legs), and a crash or loss as
 * dirty.
 */
struct dirty_map {
  int fd;
  char file[80];
  void *mapping;
  size_t mapping_size;
  struct disk_log_header header;
  struct bitmap map[NR_NODE_MAPS];
  int nr_maps; /* in the file: NR_MAPS, or NR_NODE_MAPS */
  struct bitmap copied;
  /* Volatile; a subset of the dirty regions: the remote answered bytes there
   * and may have lost them with its cache.  A region that is late and lost must
   * not wait for the end of its late window.  A region that is only late may
   * wait: its bytes were sent again, and the later copy is for safety.
   */
  struct bitmap lost;
  /* Volatile; empty unless a takeover is under way (state.c).  For a remote:
   * marks that it did not get because it was the only source; it gets them if
   * local is the source after all.  For dirty.local: the regions that the
   * takeover has made local miss.
   */
  struct bitmap owed, owed_late;
  void *volatile_words; /* of these four */
  bool changed;         /* since the last dirty_map_persist */
  uint64_t persists;    /* msyncs that were made */
};

/* What a new map holds; 0: nothing is dirty. */
#define NEW_MAP_DIRTY 1u    /* every region is dirty */
#define NEW_MAP_LATE 2u     /* every region is late */
#define NEW_MAP_RENEWED 4u  /* LOG_RENEWED, until dirty_map_begin */
#define NEW_MAP_NODE 8u     /* of another node: with a map of doubts */
#define NEW_MAP_DOUBTED 16u /* every region is doubted */

/* Make the file; durable. */
int dirty_map_create (int dirfd, const char *remote, const uint8_t *uuid,
                      uint64_t session, uint64_t nr_regions,
                      uint32_t region_size, unsigned contents);

/* Would dirty_map_open accept it?  Maps and changes nothing, and works beside a
 * running server.  Returns its header; -ENOENT, -EUCLEAN: as dirty_map_open.
 */
int dirty_map_check (int dirfd, const char *remote, const uint8_t *uuid,
                     uint64_t session, uint64_t nr_regions,
                     uint32_t region_size, struct disk_log_header *header);
/* Map and check it.  -ENOENT, -EUCLEAN: as log_header_load, or the session is
 * neither `session` nor one more, or LOG_CLEAN and bits_crc does not match.
 * `*clean` says whether LOG_CLEAN was set.
 */
int dirty_map_open (struct dirty_map *dm, int dirfd, const char *remote,
                    const uint8_t *uuid, uint64_t session, uint64_t nr_regions,
                    uint32_t region_size, bool *clean);
/* Clear LOG_CLEAN in a map that a start will change, and stamp it with
 * `session`; durable.  Otherwise a start that ends early would leave bits that
 * do not match `bits_crc`, and the next start would not believe the map.
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

/* Mark regions dirty and not copied; with `late` also late. */
void dirty_map_mark (struct dirty_map *dm, uint64_t first, uint64_t count,
                     bool late);
/* Regions of a node's map are doubted from now on. */
void dirty_map_doubt (struct dirty_map *dm, uint64_t first, uint64_t count);
/* A flush has covered the copies of these regions: clear dirty, and doubts,
 * where they are still copied.  Late regions stay dirty, and only their `lost`
 * bits are cleared.  Returns how many became clean.
 */
uint64_t dirty_map_clean (struct dirty_map *dm, uint64_t first, uint64_t count);
/* Set `lost` on those of these regions that are dirty. */
void dirty_map_mark_lost (struct dirty_map *dm, uint64_t first, uint64_t count);
/* dirty_map_owe defers a mark of a region, dirty_map_pay makes the deferred
 * mark, dirty_map_forgive drops all deferred marks, and takes the regions that
 * got theirs out of the unflushed maps.
 */
void dirty_map_owe (struct dirty_map *dm, uint64_t region, bool late);
void dirty_map_pay (struct dirty_map *dm, uint64_t region);
void dirty_map_forgive (struct dirty_map *dm);
/* A flush has covered an unflushed map: empty it.  Regions with a deferred mark
 * stay in it: the remote lost them before any flush that succeeds later, and
 * after a kill no other record shows that.
 */
void dirty_map_empty (struct dirty_map *dm, enum dirty_map_index unflushed);
/* Take the dirty regions out of an unflushed map. */
void dirty_map_settle (struct dirty_map *dm, enum dirty_map_index unflushed);
/* The connection is lost: unflushed regions become dirty and lost, and the
 * copied map is cleared.
 */
void dirty_map_lost (struct dirty_map *dm);

#endif /* NBDM_DIRTY_MAP_H */
