/* SPDX-License-Identifier: BSD-3-Clause */

/* What the engine's parts know of each other.
 *
 * From the bottom up: the logs and maps (superblock, activity, inflight,
 * dirty_map on bitmap, rangelock, classify) are plain data structures without
 * a thread or a lock in them; remote.c is one connection; engine.c is the
 * volume that ties them together.
 *
 * Lock order, the only place it is written:
 *
 *   0. session->lock, server->lock  of the direct door: leaves, nothing of
 *                         the engine is called with them held
 *   1. volume->lock       every log, map and state of the volume
 *   2. libnbd's own lock  inside the handle, held while it calls us back
 *   3. conn->lock         the connection's outstanding commands
 *
 * No disk or network I/O is done under volume->lock, but for the superblock
 * and msync at a change of state: those are rare, and rule 7 wants nobody
 * answered meanwhile.  The activity log is written without it, by one thread
 * at a time (volume->activity_writing).
 */

#ifndef NBDM_INTERNAL_H
#define NBDM_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "layout.h"

typedef _Atomic uint64_t atomic_u64;

/* --- error.c --------------------------------------------------------- */

/* Keep the message for nbdm_last_error and return `err` (-errno), so that a
 * function ends in `return set_error (-EIO, "bitmap: msync %s", path)`.  The
 * errno's own words are added behind.
 */
int set_error (int err, const char *fmt, ...)
    __attribute__ ((format (printf, 2, 3)));

/* The same without errno's words, where the message says it all. */
int set_message (int err, const char *fmt, ...)
    __attribute__ ((format (printf, 2, 3)));

const char *last_error (void);

/* --- crc32c.c -------------------------------------------------------- */

/* CRC32C (Castagnoli; RFC 3720, appendix B.4) of `length` bytes; `crc` is 0
 * or the CRC of the bytes before.  crc32c ("123456789") is 0xe3069283.
 */
uint32_t crc32c (uint32_t crc, const void *data, size_t length);

/* --- fault.c --------------------------------------------------------- */

/* Named fault points, for crash and race tests.  NBDM_FAULT names points and
 * actions: "after_log=kill", "after_local:3=kill" (the third time),
 * "resync_after_read=wait:PATH" (make PATH.reached, go on when PATH exists,
 * or after 60 s), "superblock_sync=error:ENOSPC" (the point returns -ENOSPC).
 * Names stand in fault.c's table, which also says where an error is looked
 * at: there the result is used, elsewhere it is always 0.
 */
extern atomic_int fault_count; /* 0 until fault_init found some */
int fault_reached (const char *name);
void fault_init (void); /* reads NBDM_FAULT; idempotent */

/* Off, as everywhere but in tests: one load and a branch.  0 or -errno. */
static inline int
fault_point (const char *name)
{
  if (__builtin_expect (
          atomic_load_explicit (&fault_count, memory_order_acquire) == 0, 1))
    return 0;
  return fault_reached (name);
}

/* --- file.c ---------------------------------------------------------- */

/* All of it or an error; EINTR and short counts are handled. */
int full_pread (int fd, void *buf, size_t count, uint64_t offset);
int full_pwrite (int fd, const void *buf, size_t count, uint64_t offset);

/* Is every byte zero?  `length` is at least 1. */
bool all_zero (const uint8_t *buf, uint64_t length);

/* Make `name` in the directory with `size` bytes of written zeroes after the
 * `header` page, durable, in one step (a rename), so that no half-made file
 * is ever seen.  The space is really allocated: a later store into the map
 * cannot fail for want of it.
 */
int file_make (int dirfd, const char *name, const void *header, uint64_t size);

/* The same of `size` bytes in all, where `fill` writes what is not zero, with
 * full_pwrite, before the file is seen; it returns 0 or -errno.
 */
typedef int (*file_fill) (int fd, const void *opaque);
int file_make_filled (int dirfd, const char *name, uint64_t size,
                      file_fill fill, const void *opaque);

/* Headers are kept as on disk, little-endian.  Fill one in, flags 0, and
 * seal it: compute its CRC, to be done again after any change.
 */
void log_header_init (struct disk_log_header *header, const char *magic,
                      const char *name, const uint8_t *uuid, uint64_t session,
                      uint64_t entries, uint64_t entry_size);
void log_header_seal (struct disk_log_header *header);

/* Read and check a log's header: -ENOENT, or -EUCLEAN with a message if its
 * magic, version, CRC, uuid, name, entries or entry size are not as in
 * `expect` (of log_header_init), or the file, header included, is shorter than
 * `size`.  The session is the caller's to check.
 */
int log_header_load (int fd, const char *name,
                     const struct disk_log_header *expect, uint64_t size,
                     struct disk_log_header *header);
/* Seal and write it, with fdatasync. */
int log_header_store (int fd, const char *name, struct disk_log_header *header);

/* --- bitmap.c -------------------------------------------------------- */

/* A bitmap over memory that is somebody else's (a mapped file or anonymous),
 * bit i in bit i % 8 of byte i / 8.  A count per page of bits makes empty
 * stretches cheap to skip, to clear and to merge.  No locking: the caller
 * holds volume->lock.  Plain readers of the memory (Python's bitarray) may
 * see a change half made across bytes, never within one.
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

/* Wrap `words` (bitmap_bytes long), which are not touched and count as zeros
 * until bitmap_count says more.  -ENOMEM.
 */
int bitmap_init (struct bitmap *map, void *words, uint64_t nr_bits);
/* Count the set bits of a page of `words`, which `content` is known to hold:
 * the page itself is not touched.
 */
void bitmap_count (struct bitmap *map, uint64_t page, const void *content);
/* Clear what lies past nr_bits up to the end of the last page: a file may hold
 * anything there, and nothing else looks at it.
 */
void bitmap_clear_padding (struct bitmap *map);
void bitmap_free (struct bitmap *map); /* not the words */

bool bitmap_test (const struct bitmap *map, uint64_t bit);
/* Both return how many bits changed. */
uint64_t bitmap_set (struct bitmap *map, uint64_t first, uint64_t count);
uint64_t bitmap_clear (struct bitmap *map, uint64_t first, uint64_t count);
void bitmap_set_all (struct bitmap *map);
void bitmap_clear_all (struct bitmap *map);
/* into |= from, of the same nr_bits; returns how many bits of into changed. */
uint64_t bitmap_merge (struct bitmap *into, const struct bitmap *from);
/* The first bit in [from, end) that is set (clear), or `end` if none. */
uint64_t bitmap_next_set (const struct bitmap *map, uint64_t from,
                          uint64_t end);
uint64_t bitmap_next_clear (const struct bitmap *map, uint64_t from,
                            uint64_t end);

/* --- dirty_map.c ----------------------------------------------------- */

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
  void *copied_words;
  bool changed;      /* since the last dirty_map_persist */
  uint64_t persists; /* msyncs that were made */
};

/* Make the file: nothing dirty, or everything (`all_dirty`); durable. */
int dirty_map_create (int dirfd, const char *remote, const uint8_t *uuid,
                      uint64_t session, uint64_t nr_regions,
                      uint32_t region_size, bool all_dirty);

/* Map and check it.  -ENOENT, -EUCLEAN: as log_header_load, or the session is
 * neither `session` nor one more, or LOG_CLEAN and bits_crc does not match.
 * `*clean` says whether LOG_CLEAN was set.
 */
int dirty_map_open (struct dirty_map *dm, int dirfd, const char *remote,
                    const uint8_t *uuid, uint64_t session, uint64_t nr_regions,
                    uint32_t region_size, bool *clean);
/* Stamp the header with `session`, not clean; durable. */
int dirty_map_begin (struct dirty_map *dm, uint64_t session);
/* Make the bits durable (msync) if they changed. */
int dirty_map_persist (struct dirty_map *dm);
/* Persist, compute bits_crc, set LOG_CLEAN; durable. */
int dirty_map_finish (struct dirty_map *dm);
void dirty_map_close (struct dirty_map *dm);

/* Regions become dirty, and no longer copied; with `late` also late. */
void dirty_map_mark (struct dirty_map *dm, uint64_t first, uint64_t count,
                     bool late);
/* Regions whose copy a flush has covered: clear dirty where still copied.
 * Returns how many became clean.
 */
uint64_t dirty_map_clean (struct dirty_map *dm, uint64_t first, uint64_t count);
/* The connection is lost: unflushed becomes dirty, copied is forgotten. */
void dirty_map_lost (struct dirty_map *dm);

/* --- inflight.c ------------------------------------------------------ */

/* The in-flight log: a ring of slots in a shared mapping, one a request. */
struct inflight {
  int fd;
  void *mapping;
  size_t mapping_size;
  struct disk_log_header header;
  struct disk_slot *slots;
  uint32_t nr_slots;
  uint32_t nr_open;
  uint32_t next;     /* where reserve looks first */
  uint64_t sequence; /* of the last slot reserved */
};

enum slot_kind { SLOT_WRITE = 1, SLOT_TRIM = 2, SLOT_ZERO = 3 };

struct slot_view {
  uint64_t sequence;
  uint64_t offset;
  uint64_t length;
  uint8_t kind;
  uint8_t flags;
};

int inflight_create (int dirfd, const uint8_t *uuid, uint64_t session,
                     uint32_t nr_slots);
int inflight_open (struct inflight *log, int dirfd, const uint8_t *uuid,
                   uint64_t session, uint32_t nr_slots, bool *clean);
int inflight_begin (struct inflight *log, uint64_t session);
int inflight_finish (struct inflight *log); /* no slot may be open */
void inflight_close (struct inflight *log);

/* Open a slot; its index, or -EAGAIN if all are open. */
int inflight_reserve (struct inflight *log, uint64_t offset, uint64_t length,
                      enum slot_kind kind, uint8_t flags);
/* The offsets of the last `max` writes at most, latest first: a slot keeps
 * its range after it is retired.  Returns how many.
 */
uint32_t inflight_recent (const struct inflight *log, uint64_t *offsets,
                          uint32_t max);
/* Note a leg's part (bit 0: local, 1 + i: remote i); for inspection. */
void inflight_issued (struct inflight *log, int slot, uint32_t legs);
void inflight_done (struct inflight *log, int slot, uint32_t legs);
void inflight_retire (struct inflight *log, int slot);
/* Call `visit` for every open slot; then free them all.  -EUCLEAN before any
 * visit if a slot is garbled (bad CRC, kind, or a range past `size`).
 */
int inflight_replay (struct inflight *log, uint64_t size,
                     void (*visit) (void *opaque, const struct slot_view *),
                     void *opaque);

/* --- activity.c, activity_file.c -------------------------------------- */

/* The write-intent log: the set of active extents, and the LRU order.  An
 * extent is in one of the states below; only PENDING to ACTIVE, and the
 * reuse of a cold one's place, needs a write.  This file decides and
 * serialises; the caller does the waiting and calls activity_write outside
 * the volume's lock.
 */
enum activity_state {
  ACTIVITY_COLD = 0, /* not in the set */
  ACTIVITY_PENDING,  /* put in, not durable yet: no write may start */
  ACTIVITY_ACTIVE    /* durable */
};

/* Entry i is place i % ACTIVITY_PER_SECTOR of sector i / ACTIVITY_PER_SECTOR.
 * An extent that went cold stays in its place, on disk and in the hash, until
 * the place is taken: coming back before that, it is durable already.
 */
struct activity_entry {
  uint64_t extent;       /* undefined where the place is empty */
  uint64_t used_ns;      /* when last released, CLOCK_MONOTONIC */
  uint32_t users;        /* requests that hold it */
  uint8_t state;         /* enum activity_state */
  bool cooling;          /* picked to go cold; a new user calls it off */
  bool writing;          /* in the sectors being written right now */
  uint32_t hash_next;    /* 1 + index; 0: end */
  uint32_t newer, older; /* in one of the two lists, 1 + index; 0: end */
};

struct activity_lru {
  uint32_t newest, oldest; /* 1 + index; 0: empty */
};

struct activity {
  int fd;
  struct disk_log_header header;
  uint64_t nr_extents;
  uint32_t nr_entries;
  uint32_t nr_sectors;
  struct activity_entry *entries;
  struct disk_activity_sector *sectors; /* what is or will be on disk */
  bool *sector_changed;
  uint32_t *hash; /* 1 + index; 0: end */
  uint32_t hash_mask;
  struct disk_activity_sector *staged; /* what a batch points to */
  uint32_t *staged_index;
  struct activity_lru used;  /* the set, by last use */
  struct activity_lru spare; /* the other places, in the order to take them */
  uint32_t nr_free;          /* spare places */
  uint64_t persists;         /* batches written */
};

int activity_create (int dirfd, const uint8_t *uuid, uint64_t session,
                     uint32_t nr_entries, uint32_t extent_size);
/* Load; then `activity_visit` tells what was active.  -EUCLEAN as above, or
 * a sector is torn, or an extent lies past `nr_extents` or stands twice in it.
 */
int activity_open (struct activity *act, int dirfd, const uint8_t *uuid,
                   uint64_t session, uint32_t nr_entries, uint32_t extent_size,
                   uint64_t nr_extents, bool *clean);
void activity_visit (const struct activity *act,
                     void (*visit) (void *opaque, uint64_t extent),
                     void *opaque);
/* Make the loaded extents, which stay in the set, surely durable, and stamp
 * the session.  Before it nobody may hold an extent.
 */
int activity_begin (struct activity *act, uint64_t session);
/* Write an empty set and LOG_CLEAN, durable; nobody may hold an extent. */
int activity_finish (struct activity *act);
void activity_close (struct activity *act);

/* Take a user's hold on every extent in [first, last].  All or none:
 *  0        all held and durable: go on
 *  -EINPROGRESS  all held, some not durable yet: have them written
 *           (activity_stage, _write, _written) or wait until they are
 *           (activity_durable), then go on
 *  -EAGAIN  no room: none held; have extents go cold, try again
 *  -EINVAL  wider than the whole set: it will never fit
 */
int activity_hold (struct activity *act, uint64_t first, uint64_t last);
bool activity_durable (const struct activity *act, uint64_t first,
                       uint64_t last);
void activity_release (struct activity *act, uint64_t first, uint64_t last,
                       uint64_t now_ns);

/* A write in three steps.  Under the lock: copy the changed sectors into
 * `batch`; 1, or 0: nothing to write.  Without it: write them and fdatasync.
 * Under it: what was staged is ACTIVE now.  One at a time, for the copies lie
 * in memory of the log's that was taken when it was opened: a write must not
 * need any (it may be what the kernel frees memory with).  If the write failed,
 * activity_discard in the place of _written, and never write again (rule 10):
 * nothing becomes ACTIVE.
 */
struct activity_batch {
  struct disk_activity_sector *sectors;
  uint32_t *index;
  uint32_t count;
};
int activity_stage (struct activity *act, struct activity_batch *batch);
int activity_write (struct activity *act, const struct activity_batch *batch);
void activity_written (struct activity *act, struct activity_batch *batch);
void activity_discard (struct activity_batch *batch);

/* Going cold, in two steps around the caller's flush.  Pick up to `max`
 * extents without users, longest unused first, used last before `before_ns`;
 * returns how many.  Then drop those nobody took meanwhile; returns how many.
 * One pick and drop at a time.  A pick forgets the one before: if its flush
 * failed, just do not drop.
 */
uint32_t activity_pick (struct activity *act, uint32_t max, uint64_t before_ns);
uint32_t activity_drop (struct activity *act);
/* Take the cold extents out of their places, so that the next write leaves
 * only the set on disk: for an idle volume, which would otherwise copy what
 * went cold long ago after lost power.
 */
void activity_forget (struct activity *act);
uint32_t activity_count (const struct activity *act); /* in the set */
uint32_t activity_list (const struct activity *act, uint64_t *extents,
                        uint32_t max); /* latest used first */

/* --- rangelock.c ----------------------------------------------------- */

/* Who may touch which bytes: first come, first served.  The list holds
 * holders and waiters in the order they came; a range waits for every
 * overlapping one ahead of it, waiters included, so nobody is overtaken.  While
 * a range is in the list its offset and length stay as they are.
 */
struct range {
  uint64_t offset, length;
  uint32_t blockers;       /* overlapping ranges ahead; 0: held */
  pthread_cond_t *granted; /* signalled when blockers becomes 0; or NULL */
  struct range *next, *prev;
};

#define RANGE_COUNTERS 1024u

/* All zero at first. */
struct rangelock {
  struct range *first, *last;
  uint32_t nr_wide;                /* in no counter: too many of them */
  uint32_t counts[RANGE_COUNTERS]; /* of blocks, by a hash: see rangelock.c */
};

/* Put the range in; true: held at once.  Else it is held when `blockers` is
 * 0.
 */
bool rangelock_add (struct rangelock *rl, struct range *range);
/* Put it in only if it is held at once. */
bool rangelock_try (struct rangelock *rl, struct range *range);
void rangelock_remove (struct rangelock *rl, struct range *range);

/* --- classify.c ------------------------------------------------------ */

/* Where a write's bytes go on one remote: the table of design section 5. */
struct piece {
  uint64_t offset, length;
};

/* Does a region's write go to the remote, or is the region left to resync?
 * Clean and copied ones go.  Late ones go and stay dirty: only a lost
 * connection's command keeps them from being clean.  With `always` (policy
 * stop) all go, so that every answered write is on both disks.
 */
bool classify_goes_remote (const struct dirty_map *dm, uint64_t region,
                           bool always);
/* The next run of bytes in [from, end) that goes to the remote, at most
 * `max` bytes; false if there is none.
 */
bool classify_next (const struct dirty_map *dm, uint32_t region_size,
                    uint64_t from, uint64_t end, uint64_t max, bool always,
                    struct piece *piece);

/* --- superblock.c ---------------------------------------------------- */

/* Make the file with both slots written. */
int superblock_create (int dirfd, const struct disk_superblock *sb);
/* Load the newest valid slot.  `*torn`: the other one was not valid.
 * -ENOENT; -EUCLEAN: neither is valid, or the version is unknown.
 */
int superblock_load (int fd, struct disk_superblock *sb, bool *torn);
/* sequence + 1, CRC, write into the older slot, fdatasync. */
int superblock_store (int fd, struct disk_superblock *sb);
/* This boot and the mount that carries the directory. */
int superblock_identity (int dirfd, uint8_t *boot_id, uint64_t *mount_id);

#endif /* NBDM_INTERNAL_H */
