/* SPDX-License-Identifier: BSD-3-Clause */

/* The volume: what ties the logs, the local disk and the remotes together.
 * Everything in struct nbdm and struct remote is under volume->lock unless
 * its comment says otherwise.
 *
 * A function whose name ends in _locked is called with the lock held, and holds
 * it all the time.  One whose name ends in _relock is called with it held as
 * well, and holds it when it returns, but may release it in between: what its
 * caller knew before may have changed.
 *
 * Lock order, the only place it is written:
 *
 *   0. clients->lock, session->lock, budget->lock  of the direct door, in this
 *                         order; executor->lock, by itself: nothing of the
 *                         engine is called with them held
 *   1. volume->lock       every log, map and state of the volume
 *   2. libnbd's own lock  inside the handle, held while it calls us back
 *   3. conn->lock         the connection's outstanding commands
 *   4. io->lock           of local_io.c, then the list of local.c
 *
 * What a thread may wait for, the only place it is written.  A thread that
 * holds one of these, or that others wait to see finish one, waits only for
 * those below it:
 *
 *   1. a byte range       of rangelock.c; a client's request holds one and
 *                         waits for none, a resync that holds some takes
 *                         another only if it is free; a client's read that is
 *                         not served by local alone holds one at a time
 *   2. room               in the activity log (`cooling`), then a slot: it is
 *                         made by requests that end, and by flushes
 *   3. a hold's end       the ticker ends it
 *   4. room in what a remote may have unflushed (backlog.c): by a flush that
 *                         the first waiter makes itself
 *   5. a takeover         (`taking_over`) by the thread that began it
 *   6. a flush            of a remote: no thread owns the flush under way, and
 *                         any thread that waits for it takes its answer in
 *                         (flush.c); of local: the thread that leads it
 *   7. an answer          of a remote, bounded by its deadline; of local, by
 *                         nothing, or by `local_deadline` where a remote may
 *                         take its place: then a carrier is in the call
 *                         (local_io.c)
 *
 * So a takeover may wait for any remote's flush, whatever the thread that sent
 * it waits for by now.  The policy threads wait for no range: a sample passes
 * over what requests hold.
 *
 * No disk or network I/O is done under volume->lock, except for the superblock
 * and msync at a change of state: those are rare, and rule 7 wants no request
 * answered meanwhile.  The activity log is written without the lock, by one
 * thread at a time (volume->activity_writing).
 */

#ifndef NBDM_VOLUME_H
#define NBDM_VOLUME_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/queue.h>

#include "api.h"
#include "base/atomics.h"
#include "base/latency.h"
#include "logs/activity.h"
#include "logs/dirty_map.h"
#include "logs/inflight.h"
#include "logs/layout.h"
#include "logs/rangelock.h"
#include "volume/backlog.h"
#include "volume/disk.h"
#include "wire/conn.h"

struct local_io;

#define MAX_PIECE (32u << 20)  /* bytes; longer requests are several */
#define LEG_WINDOW 8           /* commands a request has under way a leg */
#define EXTENT_SIZE (4u << 20) /* bytes an activity extent stands for */
#define ACTIVITY_EXTENTS 1024u /* in the set: 4 GiB hot */
#define RING_SLOTS 1024u
#define DISTRUST_FILE "failed" /* in the state directory: see state.c */

/* So many connections a read, or a leg of a write, loses before it gives up: a
 * server that dies of it must not hang the client.
 */
#define MAX_LOSSES 4

/* A remote's flush that is under way.  It is no thread's own: the thread that
 * sent it may be busy for long, so any thread that waits for it takes the
 * answer in.
 */
struct flush_sent {
  struct conn *conn; /* a reference */
  struct command command;
  struct waiter waiter;
  uint64_t covers;
  bool owned;     /* a thread sends it, or waits for its answer */
  uint32_t sleep; /* threads that sleep until it is not owned */
};

struct remote {
  struct disk disk;
  uint32_t deadline_ms;

  struct conn *conn;           /* our reference; NULL: not connected */
  char chain[NBDM_REASON_LEN]; /* the volumes behind it, as it described them */
  uint64_t address;            /* as struct disk_remote's */
  uint64_t connected_at;       /* the address of the latest connection */
  bool admitted; /* the sample was the same: the connection is used */
  enum nbdm_remote_state state; /* never NBDM_PAUSED: see `paused` */
  bool paused;
  bool assumed;
  uint64_t generation; /* the volume's when last in sync */
  uint64_t hold_until_ns;
  unsigned filling; /* 0 or 1: the unflushed map that answers go into */
  struct flush_sent flush_sent; /* while disk.flush.running */
  pthread_t flusher;
  bool flusher_running; /* of the thread that starts and joins it alone */
  bool flusher_naps;
  pthread_cond_t flush_due; /* ends its nap */
  uint64_t unflushed_ns;    /* since when the filling map is not empty */
  struct backlog backlog;   /* how much that is, and may be */
  bool leaves_zeroes; /* a long trim is left to the resync: see long_zero.c */
  /* The server offered WRITE_ZEROES and refused it: later connections are sent
   * data in its place.
   */
  atomic_bool refuses_zeroes;
  uint64_t remote_size;
  uint64_t commands;       /* answered on earlier connections */
  uint64_t answered_bytes; /* of copies, since start */
  uint64_t answer_ns;      /* the shortest time of a copy in this call */
};

/* Which of a request's legs is this remote's. */
static inline uint32_t
remote_index (const struct remote *r)
{
  return r->disk.index - 1;
}

/* An open file or block device. */
struct local_file {
  int fd; /* -1: not open */
  bool is_block;
  bool can_punch, can_zero_range; /* for certain */
  uint64_t size;                  /* bytes, when it was opened */
  atomic_u64 looked_ns;           /* when its size was last looked at */
  atomic_bool shrunk; /* it has lost bytes since: nothing of it counts */
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
  struct disk disk;
  struct local_file file;
  struct local_io *io;    /* carries requests out; NULL: without a deadline */
  _Atomic uint32_t state; /* enum nbdm_local_state; written under the lock */
  bool attached;          /* failed, and open again */
  bool repairing;         /* was ok: it misses what it could not read */
  /* Being made to miss something: no request is answered.  Set under the lock.
   */
  atomic_bool taking_over;
  atomic_uint failures; /* times it became failed since start */
  int flush_error;      /* sticky: a failed fsync is never believed again */
  atomic_bool doubted;  /* a flush failed: it may have lost writes */
  uint64_t repaired;    /* regions it could not read, rewritten */
  struct flush_bound flush_bound; /* of what is copied back */
  atomic_u64 errors;
  atomic_u64 silent_ns;           /* so long it has owed a thread an answer */
  struct sleep_average asleep[2]; /* by small reads, and writes */
  uint32_t deadline_ms;           /* 0: it may keep a request for ever */
  pthread_t guard;                /* see local_deadline.c */
  bool guard_running, guard_stop; /* the first is its starter's alone */
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
  bool first;        /* of the line for room in the backlog */
  uint64_t began_ns; /* when it began to be waited for */
  struct command commands[LEG_WINDOW];
  struct waiter waiter;
};

#define LEG_LOST (-ENOTCONN) /* no server says this: see conn.h */

/* A sector of which a request changes a part: `count` bytes at `at`. */
struct sector {
  uint8_t *bytes;   /* what is written: the whole of it */
  const void *from; /* NULL: zeroes */
  uint64_t at, count;
};

/* A client's trim or zero, of as many requests as it takes: how long it has
 * waited for each remote.
 */
struct long_zero {
  uint64_t waited_ns[NBDM_MAX_REMOTES];
};

struct request {
  enum slot_kind kind;
  uint32_t flags; /* NBDM_* */
  uint64_t offset, length;
  const void *buf; /* the door's private copy of the payload, or NULL */
  const struct sector *sector; /* to be filled once it is admitted; or NULL */
  struct long_zero *long_zero; /* of the client's trim or zero; or NULL */
  bool on_local;               /* the local disk is to get it */
  bool remote_fua; /* remotes are to make it durable before they answer */
  struct range range;
  pthread_cond_t granted;
  int slot;
  uint64_t first_extent, last_extent;
  uint64_t start_ns;
  char local_words[NBDM_REASON_LEN]; /* of local's error, if it gave one */
  int answer;                        /* once it is decided: 0 or -errno */
  LIST_ENTRY (request) link;         /* of those admitted */
  struct leg legs[NBDM_MAX_REMOTES];
};

/* Whether the local disk is the one that was left: found out at the start. */
struct identity {
  bool doubted;    /* what the superblock says of it may be old */
  bool given_up;   /* NBDM_LOCAL_LOST */
  bool forced;     /* NBDM_LOCAL_FORCED, and it is not the one that was left */
  bool cache_lost; /* it was taken away and is back, without a reboot */
  bool unproven;   /* the disk that is attached: another device, and no more */
  char note[NBDM_REASON_LEN];
};

struct nbdm {
  /* Fixed after nbdm_open. */
  char name[NBDM_NAME_LEN];
  uint8_t uuid[NBDM_UUID_LEN];
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
  uint8_t boot_id[NBDM_UUID_LEN];
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
  struct identity identity; /* the rest is in `sb` */
  struct activity activity;
  struct inflight inflight;
  struct rangelock ranges;
  struct local local;
  struct remote remotes[NBDM_MAX_REMOTES];
  bool activity_writing, cooling;

  LIST_HEAD (, request) requests; /* admitted, in no order */
  uint32_t nr_requests;           /* these and flushes under way */
  uint32_t nr_waiting;            /* that wait for a slot or an extent */
  bool stopping;                  /* new requests are refused */
  bool drained;                   /* and the last one has ended */
  bool stopped;                   /* cleanly: the logs are empty */
  bool closed;             /* and the superblock says so: nothing is written */
  bool was_in_use;         /* at the start: the last session was not closed */
  bool failed;             /* rule 10: final */
  bool fenced;             /* policy stop: never under degrade */
  enum nbdm_policy policy; /* may change at any time */
  char reason[NBDM_REASON_LEN];
  uint64_t generation;
  uint64_t writes, flushes;
  uint64_t superblock_persists;
  uint32_t clients;

  atomic_u64 reads, write_ns;
  struct latency latency;
  atomic_bool fail_fenced_reads; /* without it reads take no lock */
};

#endif /* NBDM_VOLUME_H */
