/* SPDX-License-Identifier: BSD-3-Clause */

/* The volume connects the logs, the local disk and the remotes. volume->lock
 * protects all members of struct nbdm and struct remote, unless a member's
 * comment names another rule.
 *
 * A function whose name ends in _locked is called with the lock held and never
 * releases it.  A function whose name ends in _relock is also called with the
 * lock held, and holds it again when it returns, but may release it in between:
 * the caller must then check its state again.
 *
 * Lock order (defined only here):
 *
 *   0. clients->lock, session->lock, budget->lock  of the direct door, in this
 *                         order; executor->lock, calls->lock and the lock of
 *                         the listeners, each alone: no function of the
 *                         engine is called with these locks held
 *   1. volume->lock       every log, map and state of the volume
 *   2. libnbd's own lock  inside the handle, held while libnbd calls us back
 *   3. conn->lock         the connection's outstanding commands
 *   4. io->lock           of local_io.c, then users_lock of local.c
 *   5. tls->lock          of wire/tls.c, over one call of GnuTLS
 *
 * What a thread may wait for (defined only here).  A thread that holds an item
 * of this list, or that must finish it, waits only for items below it:
 *
 *   1. a byte range       of rangelock.c.  A client's request holds one, and
 *                         waits for no other.  A resync that holds ranges
 *                         takes another only if it is free.  A client's read
 *                         that local cannot serve alone holds one at a time.
 *   2. room               in the activity log (`cooling`), then a slot.
 *                         Requests that end, and flushes, make room.
 *   3. the end of a hold  The ticker ends it.
 *   4. room in what a remote may have unflushed (backlog.c).  The first waiter
 *                         makes room with a flush.
 *   5. a takeover         (`taking_over`) The thread that began it ends it.
 *   6. a flush            of a remote: no thread owns the flush under way, and
 *                         any thread that waits for it receives its answer
 *                         (flush.c).  Of local: the thread that leads it.
 *   7. an answer          of a remote, bounded by its deadline; of local,
 *                         unbounded, or bounded by `local_deadline` if a remote
 *                         may replace local: then a carrier makes the system
 *                         call (local_io.c).
 *
 * So a takeover may wait for any remote's flush, whatever the thread that sent
 * this flush waits for.  The policy threads wait for no range: a sample skips
 * blocks that requests hold.
 *
 * No thread does disk or network I/O under volume->lock, except to write the
 * superblock, to msync the maps, and to make or remove a note, at a change of
 * state.  Such changes are rare, and rule 7 requires that no request is
 * answered until the change is durable.  One thread at a time writes the
 * activity log, without the lock (volume->activity_writing).
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

#define MAX_PIECE (32u << 20)  /* bytes; a longer request is split */
#define LEG_WINDOW 8           /* commands of a request under way on one leg */
#define EXTENT_SIZE (4u << 20) /* bytes an activity extent stands for */
#define ACTIVITY_EXTENTS 1024u /* in the set: 4 GiB hot */
#define RING_SLOTS 1024u

/* Notes in the state directory for the next start (volume_note).  The kernel
 * may have dropped pages that it could not write: recover as after lost power.
 */
#define DISTRUST_FILE "failed"
/* A flush of a local disk that was not ok, at a start or when an operator
 * brought it back, was begun, and nothing says that it succeeded.  The kernel
 * reports a page that it dropped once: local misses all that a remote has.
 */
#define UNFLUSHED_FILE "unflushed"

/* A read, or a leg of a write, gives up after this many lost connections.  If a
 * request crashes the server each time, its client must not hang.
 */
#define MAX_LOSSES 4

/* A remote's flush under way.  No thread owns it: the thread that sent it may
 * be busy for long, so any thread that waits for it may receive the answer.
 */
struct flush_sent {
  struct conn *conn; /* a reference */
  struct command command;
  struct waiter waiter;
  uint64_t covers;
  bool owned;     /* a thread sends it, or waits for its answer */
  uint32_t sleep; /* threads that sleep until `owned` is false */
};

struct remote {
  struct disk disk;
  uint32_t deadline_ms;

  struct conn *conn;           /* our reference; NULL: not connected */
  char chain[NBDM_REASON_LEN]; /* the volumes behind it, as it described them */
  uint64_t address;            /* as struct disk_remote's */
  uint64_t connected_at;       /* the address of the latest connection */
  bool admitted;               /* its sample matched: the connection is used */
  enum nbdm_remote_state state; /* never NBDM_PAUSED: see disk.paused */
  bool assumed;
  uint32_t peer;       /* of a node: its entry in volume->node.peers */
  uint32_t kept_state; /* on a secondary: what is stored as its state */
  uint64_t generation; /* the volume's when last in sync */
  uint64_t hold_until_ns;
  unsigned filling; /* 0 or 1: the unflushed map that answers go into */
  struct flush_sent flush_sent; /* while disk.flush.running */
  pthread_t flusher;
  bool flusher_running; /* used only by the thread that starts and joins it */
  bool flusher_naps;
  pthread_cond_t flush_due; /* ends its nap */
  uint64_t unflushed_ns;    /* when the filling map got its first bit */
  struct backlog backlog;   /* unflushed bytes and their bound */
  /* A node has stored that it is copied to: until it adopts the generation, it
   * takes its image for one of no instant.
   */
  bool filled;
  bool leaves_zeroes; /* a long trim is left to the resync: see long_zero.c */
  bool unproven;      /* copied to since the last flush of local */
  /* The server offered WRITE_ZEROES and refused it: later connections get data
   * instead.
   */
  atomic_bool refuses_zeroes;
  uint64_t remote_size;
  uint64_t commands;            /* answered on earlier connections */
  uint64_t answered_bytes;      /* of copies, since start */
  uint64_t answered_zero_bytes; /* of these, sent as zeroes */
  uint64_t answer_ns; /* the shortest time of a copy of data in this call */
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
  atomic_u64 looked_ns;           /* when a thread last checked its size */
  atomic_bool shrunk; /* it became shorter: no answer of it counts */
};

/* How long requests of a kind recently kept their thread asleep. */
struct sleep_average {
  atomic_u64 ns;
  atomic_uint turn; /* counts requests that are not measured */
};

/* The local disk as a leg.  It has a state and a dirty map like a remote, but
 * it gets every write and serves all reads: so only a failure makes it miss
 * anything (local_state.c).
 */
struct local {
  struct disk disk;
  struct local_file file;
  struct local_io *io;    /* its carriers; NULL: without a deadline */
  _Atomic uint32_t state; /* enum nbdm_local_state; written under the lock */
  bool attached;          /* failed, and open again */
  unsigned nr_opening;    /* commands that open it, whose flush may yet fail */
  bool unflushed;         /* at the start: see UNFLUSHED_FILE */
  bool repairing;         /* was ok: it misses only regions it could not read */
  /* A takeover is under way: no request is answered.  Set under the lock. */
  atomic_bool taking_over;
  bool mending;         /* it is for regions that local cannot read */
  atomic_uint failures; /* times it became failed since start */
  int flush_error;      /* sticky: a failed fsync is never believed again */
  atomic_bool doubted;  /* a flush failed, so it may have lost writes */
  unsigned doubts;      /* see local_doubt_copies_locked */
  uint64_t repaired;    /* regions it could not read, rewritten */
  struct flush_bound flush_bound; /* for the copies back */
  atomic_u64 errors;
  atomic_u64 silent_ns;           /* age of its oldest unanswered call */
  struct sleep_average asleep[2]; /* of small reads, and of small writes */
  uint32_t deadline_ms;           /* 0: it may keep a request forever */
  pthread_t guard;                /* see local_deadline.c */
  bool guard_running, guard_stop; /* the first: only its starter uses it */
};

/* One request's part on one remote. */
struct leg {
  struct remote *remote;
  struct conn *conn; /* a reference, or NULL: not connected when planned */
  bool active;       /* the request's answer depends on it */
  bool sent;         /* bytes were sent, which may arrive late */
  int result;        /* 0, the server's -errno, or LEG_LOST */
  uint64_t cursor;   /* bytes planned so far, as an offset */
  unsigned nr;       /* commands of this round */
  bool first;        /* of the queue for room in the backlog */
  uint64_t began_ns; /* when the request began to wait for it */
  struct command commands[LEG_WINDOW];
  struct waiter waiter;
};

#define LEG_LOST (-ENOTCONN) /* no server says this: see conn.h */

/* A sector in which a request changes `count` bytes at `at`. */
struct sector {
  uint8_t *bytes;   /* the whole sector, as it is written */
  const void *from; /* NULL: zeroes */
  uint64_t at, count;
};

/* How long a client's trim or zero, which may be several requests, has waited
 * for each remote.
 */
struct long_zero {
  uint64_t waited_ns[NBDM_MAX_REMOTES];
};

struct request {
  enum slot_kind kind;
  uint32_t flags; /* NBDM_* */
  uint64_t offset, length;
  const void *buf; /* the door's private copy of the payload, or NULL */
  const struct sector *sector; /* or NULL; filled after the admission */
  struct long_zero *long_zero; /* of the client's trim or zero; or NULL */
  bool on_local;               /* the local disk gets it */
  bool remote_fua; /* remotes must make it durable before they answer */
  struct range range;
  pthread_cond_t granted;
  int slot;
  uint64_t first_extent, last_extent;
  uint64_t start_ns;
  char local_words[NBDM_REASON_LEN]; /* the message of local's error, if any */
  int answer;                        /* the decided answer: 0 or -errno */
  LIST_ENTRY (request) link;         /* of those admitted */
  struct leg legs[NBDM_MAX_REMOTES];
};

/* Is the local disk the one of the last session?  Determined at the start. */
struct identity {
  bool doubted;    /* the superblock's samples may be old: a slot is lost */
  bool given_up;   /* NBDM_LOCAL_LOST */
  bool forced;     /* NBDM_LOCAL_FORCED, and it is another disk */
  bool cache_lost; /* it was detached and is back, without a reboot */
  bool unproven; /* the attached disk is another device; no content compared */
  char note[NBDM_REASON_LEN];
};

struct nbdm {
  /* Fixed after nbdm_open. */
  char name[NBDM_NAME_LEN];
  uint8_t uuid[NBDM_UUID_LEN];
  int dirfd;   /* state directory */
  int lock_fd; /* the lock that allows one server a volume */
  int sb_fd;
  uint64_t size;
  uint32_t region_size;
  uint64_t nr_regions;
  uint32_t hold_ms;
  uint32_t flush_bytes; /* a remote is flushed when so much is unflushed */
  uint32_t flush_ms;    /* or the oldest of it has that age */
  uint32_t nr_remotes;
  uint8_t boot_id[NBDM_UUID_LEN];
  uint64_t mount_id[3];
  bool has_nodes;
  bool secondary; /* of nodes: no remote is used, and no write is marked */

  pthread_mutex_t lock;
  pthread_cond_t changed; /* signals all that a request may wait for */
  pthread_cond_t events;  /* a remote's serial grew, or `waking` is set */
  pthread_cond_t ticking; /* ends the ticker's nap */
  pthread_t ticker;
  bool ticker_running, ticker_stop;
  bool flushers_stop;
  bool waking; /* the policy threads end: see nbdm_wake */

  struct disk_superblock sb;
  struct disk_nodes nodes;  /* stored with `sb`, of a volume of nodes */
  struct nbdm_node node;    /* the same, as it is stored next */
  bool plain_forgotten;     /* on a secondary: see node.c */
  struct identity identity; /* the rest is in `sb` */
  struct activity activity;
  struct inflight inflight;
  struct rangelock ranges;
  struct local local;
  struct remote remotes[NBDM_MAX_REMOTES];
  bool activity_writing, cooling;

  LIST_HEAD (, request) requests; /* admitted, in no order */
  uint32_t nr_requests;           /* these and flushes under way */
  uint32_t nr_waiting;     /* requests that wait for a slot or an extent */
  bool stopping;           /* new requests are refused */
  bool drained;            /* stopping, and the last request has ended */
  bool stopped;            /* cleanly: the logs are empty */
  bool closed;             /* and the superblock says so: no more writes */
  bool was_in_use;         /* at the start: the last session was not closed */
  bool failed;             /* rule 10: final */
  bool fenced;             /* policy stop: never under degrade */
  enum nbdm_policy policy; /* may change at any time */
  char reason[NBDM_REASON_LEN];
  uint64_t generation;
  uint64_t writes, flushes;
  uint64_t superblock_persists;
  uint32_t clients;

  atomic_uint advising; /* threads that have local read ahead */
  atomic_u64 reads, write_ns;
  struct latency latency;
  atomic_bool fail_fenced_reads; /* without it reads take no lock */
};

#endif /* NBDM_VOLUME_H */
