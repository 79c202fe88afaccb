/* SPDX-License-Identifier: BSD-3-Clause */

/* The volume: what ties the logs, the local disk and the remotes together.
 * Everything in struct nbdm and struct remote is under volume->lock unless
 * its comment says otherwise.  A function whose name ends in _locked is
 * called with it held.
 */

#ifndef NBDM_VOLUME_H
#define NBDM_VOLUME_H

#include "conn.h"
#include "internal.h"
#include "latency.h"
#include "nbdm.h"

#define LEG_WINDOW 8           /* commands a request has under way a leg */
#define EXTENT_SIZE (4u << 20) /* bytes an activity extent stands for */
#define ACTIVITY_EXTENTS 1024u /* in the set: 4 GiB hot */
#define RING_SLOTS 1024u
#define LOCAL_NAME "local"     /* of its dirty map; no remote is called so */
#define DISTRUST_FILE "failed" /* in the state directory: see state.c */

/* How a resync under way goes about it; see struct nbdm_pace. */
struct resync_pace {
  uint32_t depth, copy_bytes, burst_us, rest_us;
};

/* Group commit: a flush begun when `asked` was N covers every ticket up to N;
 * one runs at a time, so those who come meanwhile share the next.
 */
struct flush_group {
  uint64_t asked, done;
  bool running;
};

struct remote {
  struct nbdm *volume;
  uint32_t index;
  char name[NBDM_NAME_LEN];
  uint32_t deadline_ms;
  struct dirty_map dm;

  struct conn *conn; /* our reference; NULL: not connected */
  bool admitted;     /* the sample was the same: the connection is used */
  enum nbdm_remote_state state; /* never NBDM_PAUSED: see `paused` */
  bool paused;
  bool assumed;
  bool map_lost;       /* at the start: all dirty for want of knowing */
  uint64_t generation; /* the volume's when last in sync */
  int64_t since;
  char reason[NBDM_REASON_LEN];
  uint64_t hold_until_ns;
  uint64_t serial;
  unsigned filling; /* 0 or 1: the unflushed map that answers go into */
  struct flush_group flush;
  pthread_t flusher;
  bool flusher_running; /* of who starts and joins it alone */
  bool flusher_naps;
  pthread_cond_t flush_due; /* ends its nap */
  uint64_t unflushed_ns;    /* since when the filling map is not empty */
  uint64_t remote_size;
  uint64_t commands; /* answered on earlier connections */
  uint64_t copied_bytes;
  bool copying; /* a resync call is under way */
  struct resync_pace pace;
  uint64_t answered_bytes; /* of copies, since start */
  uint64_t answer_ns;      /* the shortest time of a copy in this call */
};

/* An open file or block device. */
struct local_disk {
  int fd; /* -1: not open */
  bool is_block;
  bool can_punch, can_zero_range; /* for certain */
};

/* How long a kind of request keeps its thread asleep, of late. */
struct sleep_average {
  atomic_u64 ns;
  atomic_uint turn; /* of requests not looked at */
};

/* The local disk as a leg.  It has a state and a dirty map as a remote has,
 * but it is the one that all reads come from: so only a failure makes it miss
 * anything (local_state.c).
 */
struct local {
  struct local_disk disk;
  struct dirty_map dm; /* dirty.local: only MAP_DIRTY and `copied` are used */
  _Atomic uint32_t state; /* enum nbdm_local_state; written under the lock */
  bool map_lost;          /* at the start: as struct remote's */
  bool attached;          /* failed, and open again */
  bool repairing;         /* was ok: it misses what it could not read */
  bool taking_over;       /* being made to miss something: nobody is answered */
  atomic_uint failures;   /* times it became failed since start */
  struct flush_group flush;
  int flush_error;     /* sticky: a failed fsync is never believed again */
  atomic_bool doubted; /* a flush failed: it may have lost writes */
  char reason[NBDM_REASON_LEN]; /* of the state; while ok the last error */
  int64_t since;
  uint64_t serial;
  uint64_t repaired, copied_bytes;
  struct resync_pace pace;
  atomic_u64 errors;
  struct sleep_average asleep[2]; /* by small reads, and writes */
};

/* One request's part on one remote. */
struct leg {
  struct remote *remote;
  struct conn *conn; /* a reference, or NULL: not connected when planned */
  bool active;       /* its answer is part of the request's */
  bool sent;         /* anything was sent: it may arrive late */
  int result;        /* 0, -errno as the server said, LEG_LOST */
  uint64_t cursor;   /* bytes planned so far, as an offset */
  unsigned nr;       /* commands of this round */
  struct command commands[LEG_WINDOW];
  struct waiter waiter;
};

#define LEG_LOST (-ENOTCONN) /* no server says this: see conn.h */

struct request {
  enum slot_kind kind;
  uint32_t flags; /* NBDM_* */
  uint64_t offset, length;
  const void *buf; /* the door's private copy of the payload, or NULL */
  bool on_local;   /* the local disk is to get it */
  bool remote_fua; /* remotes are to make it durable before they answer */
  struct range range;
  pthread_cond_t granted;
  int slot;
  uint64_t first_extent, last_extent;
  uint64_t start_ns;
  struct request *next, *prev; /* of those admitted */
  struct leg legs[NBDM_MAX_REMOTES];
};

struct nbdm {
  /* Fixed after nbdm_open. */
  char name[NBDM_NAME_LEN];
  uint8_t uuid[16];
  int dirfd;   /* state directory */
  int lock_fd; /* held: only one server a volume */
  int sb_fd;
  uint64_t size;
  uint32_t region_size;
  uint64_t nr_regions;
  uint32_t hold_ms;
  uint32_t flush_bytes; /* unflushed, and a remote is flushed */
  uint32_t flush_ms;    /* and when the oldest is of that age */
  uint32_t nr_remotes;
  uint8_t boot_id[16];
  uint64_t mount_id[3];

  pthread_mutex_t lock;
  pthread_cond_t changed; /* anything a request may wait for */
  pthread_cond_t events;  /* a remote's serial grew, or waking */
  pthread_cond_t ticking; /* ends the ticker's nap */
  pthread_t ticker;
  bool ticker_running, ticker_stop;
  bool flushers_stop;
  bool waking;

  struct disk_superblock sb;
  struct activity activity;
  struct inflight inflight;
  struct rangelock ranges;
  struct local local;
  struct remote remotes[NBDM_MAX_REMOTES];
  bool activity_writing, cooling;

  struct request *requests; /* admitted, in no order */
  uint32_t nr_requests;     /* these and flushes under way */
  uint32_t nr_waiting;      /* that wait for a slot or an extent */
  bool stopping;            /* new requests are refused */
  bool drained;             /* and the last one has ended */
  bool stopped;             /* cleanly: the logs are empty */
  bool failed;              /* rule 10: final */
  bool fenced;              /* policy stop: never under degrade */
  enum nbdm_policy policy;  /* may change at any time */
  char reason[NBDM_REASON_LEN];
  uint64_t generation;
  uint64_t writes, flushes;
  uint64_t superblock_persists;
  uint32_t clients;

  atomic_u64 reads, write_ns;
  struct latency latency;
  atomic_bool fail_fenced_reads; /* without it reads take no lock */
};

/* --- state.c: changes of state, durable before anybody is answered --- */

/* Write the superblock as things are.  A failure makes the volume failed. */
int volume_persist_locked (struct nbdm *v);
void volume_fail_locked (struct nbdm *v, const char *why);
/* New state and reason (printf), in memory; bumps the serial. */
void remote_set_locked (struct remote *r, enum nbdm_remote_state state,
                        const char *fmt, ...)
    __attribute__ ((format (printf, 3, 4)));
void remote_bump_locked (struct remote *r);
/* Its clean and late regions' writes are to be sent to it. */
bool remote_used_locked (const struct remote *r);
/* Its connection is dead: hold, or go out of sync.  No effect if it has
 * another one by now.  Drops the remote's reference.
 */
void remote_lost_locked (struct remote *r, struct conn *conn);
/* Out of sync from now on, durably: what is in flight becomes dirty. */
void remote_degrade_locked (struct remote *r);
/* It answered an error, or was dropped: kill the connection, then degrade. */
void remote_broken_locked (struct remote *r, struct conn *conn,
                           const char *why);
/* in_sync if that is proven (rule 8), else resyncing; durable. */
void remote_settle_locked (struct remote *r);
/* A write that this remote misses: a new generation begins with the first. */
void generation_advance_locked (struct nbdm *v, struct remote *r);
/* The regions a byte range touches: rounded outwards. */
void region_span (const struct nbdm *v, uint64_t offset, uint64_t length,
                  uint64_t *first, uint64_t *count);
/* Regions become dirty, but for those it is the only source of: local misses
 * them and every other remote does.  With `late` also late.
 */
void mark_regions_locked (struct remote *r, uint64_t first, uint64_t count,
                          bool late);
void mark_dirty_locked (struct remote *r, uint64_t offset, uint64_t length,
                        bool late);
/* The connection is lost: unflushed becomes dirty, but for the above. */
void unflushed_lost_locked (struct remote *r);
/* Policy stop's fence, once everything is in sync. */
void lift_fence_locked (struct nbdm *v);

/* --- policy.c -------------------------------------------------------- */

/* -EIO: the volume is fenced, and its reads shall fail too. */
int fenced_read_check (struct nbdm *v);

/* --- flush.c --------------------------------------------------------- */

struct remote_flush {
  struct remote *remote;
  uint64_t ticket, covers;
  bool leading;
  struct conn *conn;
  struct command command;
  struct waiter waiter;
};

/* Everything the remote answered so far becomes flushed, or the remote is
 * lost.  Begin sends it, end waits for it: between them the local disk can
 * be flushed.  0; -ENOTCONN: lost or out of sync, its unflushed set is dirty.
 */
void remote_flush_begin (struct remote *r, struct remote_flush *flush);
int remote_flush_end (struct remote_flush *flush);
/* The same for who has other things to do: false, and it is not over yet.  Who
 * began it must come back soon, or call remote_flush_end: others wait for it.
 */
bool remote_flush_poll (struct remote_flush *flush, int *rc);
/* A flush nobody asked for: false, and nothing sent, if one is under way or
 * there is no connection.  Blocks, bounded by the deadline, but for no hold.
 */
bool remote_flush_alone (struct remote *r);
/* The local leg alone, shared with whoever asks meanwhile; FUA goes through it
 * as well.  After a failure each call fails: local_flush_lost_locked follows.
 */
int flush_local_group (struct nbdm *v);
/* All legs; -EIO: no disk that has everything did it.  A lost remote is not
 * an error here while local is ok.
 */
int volume_flush (struct nbdm *v);

/* --- flusher.c ------------------------------------------------------- */

/* The remote answered a write of this range. */
void unflushed_add_locked (struct remote *r, uint64_t offset, uint64_t length);
void flushers_init (struct nbdm *v, const struct nbdm_params *params);
int flushers_start (struct nbdm *v);
void flushers_join (struct nbdm *v); /* while the ticker runs */

/* --- local.c --------------------------------------------------------- */

/* Open, lock and measure; the caller closes disk->fd, also after an error. */
int local_open (struct local_disk *disk, const char *path, uint64_t *size);
int local_pread (struct nbdm *v, void *buf, uint64_t count, uint64_t offset);
int local_pwrite (struct nbdm *v, const void *buf, uint64_t count,
                  uint64_t offset);
int local_zero (struct nbdm *v, uint64_t count, uint64_t offset, bool may_trim);
bool local_fast_zero (const struct nbdm *v, bool may_trim);
/* Do small reads, or writes, keep their thread awake, or asleep so shortly that
 * a thread of its own for each would cost more?
 */
bool local_is_quick (const struct nbdm *v, bool writing);
int local_flush (struct nbdm *v);
/* The end of the hole that begins at offset, at most `end`; offset if there
 * is data.  A disk that cannot tell has no holes.
 */
uint64_t local_hole_end (struct nbdm *v, uint64_t offset, uint64_t end);
uint64_t local_data_end (struct nbdm *v, uint64_t offset, uint64_t end);

/* --- local_state.c: what local misses, and who serves it --------------- */

/* Count an error of the local disk, and keep its words (of last_error). */
void local_note_error (struct nbdm *v); /* takes the lock */
void local_note_error_locked (struct nbdm *v);
/* Local has failed: a remote in sync takes its place, durably.  0: local is
 * failed and somebody serves; -EIO: there is no such remote, or policy stop;
 * nothing has changed but that more may be dirty.  Drops the lock meanwhile;
 * the caller leads no flush.
 */
int local_takeover_locked (struct nbdm *v);
/* The same after a failed flush, where else the volume fails. */
int local_flush_lost_locked (struct nbdm *v);
/* A region could not be read on local, and was on a remote: local misses it
 * from now on, so that it is written anew.  Takes the lock.
 */
void local_miss_region (struct nbdm *v, uint64_t region);
/* May a region be read from local? */
bool local_has_locked (const struct nbdm *v, uint64_t region);
/* Has every region of the range a leg in use that has it? */
bool range_has_source_locked (const struct nbdm *v, uint64_t offset,
                              uint64_t length);
/* What a restart may believe: see local_state.c on takeovers. */
uint32_t local_persistent_state (const struct nbdm *v);
/* New state, in memory; bumps the serial. */
void local_set_locked (struct nbdm *v, enum nbdm_local_state state);
/* resyncing -> ok when nothing is missing; durable. */
void local_settle_locked (struct nbdm *v);
/* Open or make dirty.local; then, with the remotes' maps open as well, make
 * state and maps fit each other.
 */
int local_map_open (struct nbdm *v);
void local_map_recover (struct nbdm *v);
/* Lost power while local was failed: what it may miss for want of msync. */
void local_miss_range_locked (struct nbdm *v, uint64_t offset, uint64_t length);

/* --- read.c ------------------------------------------------------------ */

/* From a disk that misses no answered write of it, but not from `except`
 * (NULL: any).  Waits for a remote on hold that has it.  -EIO.
 */
int source_pread (struct nbdm *v, const struct remote *except, void *buf,
                  uint64_t count, uint64_t offset);

/* --- engine.c -------------------------------------------------------- */

/* The local leg's part of an admitted request. */
int request_write_local (struct nbdm *v, const struct request *req);
/* Local's part is done, with local_rc, and the commands are issued: wait for
 * them, do what becomes of it, retire.  The request's answer.
 */
int request_complete (struct nbdm *v, struct request *req, int local_rc);
/* The same of a request that succeeded on local and on each leg, if it is done
 * at once: false, and nothing is, if local has failed meanwhile.
 */
bool request_try_settle (struct nbdm *v, struct request *req, int *rc);

/* -EINVAL with a message if a client's range is not one of this volume. */
int check_range (const struct nbdm *v, uint64_t count, uint64_t offset);

/* --- admit.c --------------------------------------------------------- */

/* Log a request: range lock, activity extents durable, slot, classification;
 * then it may be issued.  -errno: nothing is held.
 */
int request_admit (struct nbdm *v, struct request *req);
/* The same, but only if it needs no wait: the range is free, its extents are
 * durable, there is a slot, local and every remote in use are well, and each
 * remote gets it in one command.  False: nothing is held.
 */
bool request_try_admit (struct nbdm *v, struct request *req);
/* The next round of a leg's commands, from its cursor. */
void leg_plan_locked (struct request *req, struct leg *leg);
/* Give back slot, extents and range. */
void request_retire_locked (struct nbdm *v, struct request *req);

/* --- open.c ---------------------------------------------------------- */

/* Only one server, or create, a state directory: -EBUSY names the process.
 * The lock ends with the descriptor.
 */
int state_lock (int dirfd, const char *state_dir, int *lock_fd);

/* --- recover.c ------------------------------------------------------- */

/* What the superblock and dirty.<remote> say of one remote. */
int remote_load (struct nbdm *v, const struct nbdm_remote_params *params,
                 uint32_t index);
/* The session after the highest that was stamped anywhere. */
uint64_t volume_next_session (const struct nbdm *v);
/* With all dirty maps loaded: the other logs, and what may differ. */
int volume_recover (struct nbdm *v);

/* --- resync.c -------------------------------------------------------- */

/* Within its bounds, and in whole regions. */
struct resync_pace resync_pace (const struct nbdm *v,
                                const struct nbdm_pace *pace);

/* --- ticker.c -------------------------------------------------------- */

int ticker_start (struct nbdm *v);
void ticker_join (struct nbdm *v);

#endif /* NBDM_VOLUME_H */
