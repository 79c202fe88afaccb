/* SPDX-License-Identifier: BSD-3-Clause */

/* The engine's C API, and the only header that CFFI reads: so it has no guard,
 * include or conditional.  Every function returns 0 (or a count) or -errno;
 * nbdm_last_error () has the message of an error, for each thread.  Offsets and
 * lengths are bytes, a `region` is always an index, times end in their unit.
 * Unless said otherwise a function may block on disk I/O, takes the engine's
 * own lock, and may be called from any thread.
 *
 * A `disk` is a number: 0 is the local disk, and a remote's is 1 more than its
 * index in struct nbdm_params.  -EINVAL: there is no such disk, or it is the
 * local one where only a remote is possible.
 */

#define NBDM_MAX_REMOTES 8
#define NBDM_MAX_DISKS 9          /* the local one and the remotes */
#define NBDM_LOCAL 0              /* the local disk's number */
#define NBDM_NAME_LEN 64          /* bytes, with the NUL */
#define NBDM_REASON_LEN 160       /* bytes, with the NUL */
#define NBDM_UUID_LEN 16          /* bytes */
#define NBDM_SECTOR 512           /* smallest block offered to clients, bytes */
#define NBDM_MAX_LISTENERS 16     /* sockets the direct door listens on */
#define NBDM_MAX_REQUEST 67108864 /* longest read or write, bytes */
#define NBDM_PREFERRED_BLOCK 4096 /* bytes */
#define NBDM_LATENCY_KINDS 3      /* reads, writes to local alone, mirrored */
#define NBDM_LATENCY_BUCKETS 112  /* four to a power of two, from 1024 ns */
#define NBDM_STARVED_DEADLINES 8  /* of a command while others are answered */

#define NBDM_FUA 1       /* durable on every in-sync leg before the answer */
#define NBDM_MAY_TRIM 2  /* zero: the range may become a hole */
#define NBDM_FAST_ZERO 4 /* zero: fail with -EOPNOTSUPP rather than be slow */

enum nbdm_remote_state {
  NBDM_IN_SYNC = 1,
  NBDM_HOLDING = 2,
  NBDM_OUT_OF_SYNC = 3,
  NBDM_RESYNCING = 4,
  NBDM_PAUSED = 5,
  NBDM_FAILED = 6
};

/* The local disk has its own dirty map: the regions that it misses, because it
 * failed and a remote in sync replaced it.
 */
enum nbdm_local_state {
  NBDM_LOCAL_OK = 1,
  NBDM_LOCAL_FAILED = 2,   /* not used: remotes serve instead */
  NBDM_LOCAL_RESYNCING = 3 /* written again; what it misses is copied back */
};

/* An operator's statement about the local disk at a start. */
enum nbdm_local_choice {
  NBDM_LOCAL_CHECKED = 0, /* none: it must be the disk of the last session */
  /* Use this disk; the remotes become all dirty.  Towards nodes all of it is
   * doubted, with `crash` HOST.
   */
  NBDM_LOCAL_FORCED = 1,
  NBDM_LOCAL_LOST = 2 /* do not use it: failed, a remote in sync serves */
};

enum nbdm_policy {
  NBDM_DEGRADE = 1, /* if a remote is lost, continue with local alone */
  NBDM_STOP = 2     /* if a remote is lost, writes get EIO until in sync */
};

#define NBDM_ANCESTORS                                                         \
  32                 /* generations before the present one that are kept       \
                      */
#define NBDM_BASES 4 /* generations kept of another node */

enum nbdm_role {
  NBDM_PRIMARY = 1, /* serves clients */
  NBDM_SECONDARY = 2
};

/* How a node came to doubt regions, the best copy first. */
enum nbdm_crash {
  NBDM_CRASH_NONE = 0,    /* its last session ended cleanly */
  NBDM_CRASH_SESSION = 1, /* it stayed up, its primary's session broke off */
  NBDM_CRASH_PROCESS = 2, /* its server was killed, its kernel stayed up */
  NBDM_CRASH_HOST = 3     /* its host went down */
};

/* Extent types of nbdm_extents, as in the NBD protocol. */
#define NBDM_EXTENT_DATA 0
#define NBDM_EXTENT_HOLE 3 /* a hole that reads as zeroes */

struct nbdm; /* a volume, opaque */

/* The parameters of create and open.  Strings are UTF-8 and are copied. */
struct nbdm_params {
  const char *name;      /* the volume's, at most NBDM_NAME_LEN - 1 bytes */
  const char *node;      /* this node's, as long; NULL: no volume of nodes */
  const char *local;     /* path of a file or block device */
  const char *state_dir; /* directory of the logs */
  uint64_t size;         /* bytes; 0: adopt the local disk's own size */
  uint32_t region_size;  /* bytes, power of two, 4 KiB to 4 MiB */
  uint32_t policy;       /* enum nbdm_policy */
  uint32_t fail_fenced_reads; /* policy stop: while fenced reads get EIO too */
  uint32_t hold_ms;           /* requests wait this long for a lost remote */
  uint32_t local_deadline_ms; /* local keeps a request so long, and a remote
                                 takes its place; 0: never */
  uint32_t flush_bytes;  /* unflushed, and a remote is flushed; 0: 64 MiB */
  uint32_t flush_ms;     /* or when the oldest is of that age; 0: 5 s */
  uint32_t local_choice; /* enum nbdm_local_choice; of nbdm_open alone */
  /* Of nbdm_open of a node alone: be primary in this epoch; else secondary. */
  uint32_t primary;
  uint64_t epoch;
  uint32_t nr_remotes;
  struct nbdm_remote_params {
    const char *name;        /* at most NBDM_NAME_LEN - 1 bytes */
    uint32_t deadline_ms;    /* of every command to it */
    uint32_t assume_in_sync; /* create: the operator says that it is a copy */
    uint32_t is_node;        /* another node of the volume; needs `node` */
  } remotes[NBDM_MAX_REMOTES];
};

struct nbdm_status {
  uint8_t uuid[NBDM_UUID_LEN];
  uint32_t role;        /* enum nbdm_role, as opened; 0: no nodes, or a peek */
  uint64_t size;        /* bytes */
  uint64_t region_size; /* bytes */
  uint64_t generation;
  uint64_t session;
  uint32_t nr_remotes;
  uint32_t failed; /* metadata could not be persisted: final */
  uint32_t fenced; /* policy stop: writes get EIO */
  uint32_t policy; /* enum nbdm_policy, in force now; nbdm_peek: 0 */
  uint32_t fail_fenced_reads;
  uint32_t stopping;
  uint32_t clean;    /* nbdm_peek: stopped cleanly */
  uint32_t clients;  /* connections, see nbdm_count_client */
  uint32_t inflight; /* requests admitted and not answered */
  uint32_t active_extents;
  uint32_t extent_size; /* bytes */
  uint64_t reads;       /* requests answered since start */
  uint64_t writes;      /* writes, trims and zeroes */
  uint64_t flushes;
  uint64_t write_ns;          /* sum of the answered writes' times */
  uint64_t activity_persists; /* since start: batches written */
  uint64_t superblock_persists;
  uint64_t dirty_persists;      /* all maps */
  char reason[NBDM_REASON_LEN]; /* why failed, or what recovery found; or "" */
};

/* The status of every disk, and the part of its kind. */
struct nbdm_disk_status {
  char name[NBDM_NAME_LEN];
  uint32_t state; /* enum nbdm_local_state, or nbdm_remote_state with PAUSED */
  uint64_t dirty_regions;       /* what it misses */
  uint64_t copied_bytes;        /* made clean since start, zeroes included */
  int64_t since;                /* of the state, seconds since 1970 */
  uint64_t serial;              /* see nbdm_disk_wait */
  char reason[NBDM_REASON_LEN]; /* of the state; local ok: its last error */
  struct nbdm_local_status {
    uint32_t attached;  /* failed, and nbdm_local_attach has opened it */
    uint32_t unproven;  /* attached; another device, nothing compared */
    uint64_t errors;    /* since start: reads, writes, flushes */
    uint64_t repaired;  /* regions it could not read, rewritten since start */
    uint64_t silent_ms; /* age of its oldest unanswered call */
    /* How the local disk has changed since the last session, or why the start
     * trusted no page cache; or "".
     */
    char note[NBDM_REASON_LEN];
  } local;
  struct nbdm_remote_status {
    uint32_t paused;    /* by an operator, whatever the state */
    uint32_t assumed;   /* in sync only because the operator said so */
    uint32_t connected; /* connected; admitted says whether it is used */
    uint32_t admitted;
    uint32_t is_node;      /* another node of the volume */
    uint64_t doubts;       /* of a node: regions of which no copy is newer */
    uint64_t late_regions; /* dirty ones, held back for late writes */
    uint64_t unflushed_regions;
    uint64_t flush_bound;    /* bytes of data that may be unflushed, measured */
    uint64_t outstanding;    /* commands sent and not answered */
    uint64_t remote_size;    /* bytes, of the last connection; or 0 */
    uint64_t commands;       /* answered since start */
    uint64_t answered_bytes; /* of copies since start, made clean or not yet */
    uint64_t answered_zero_bytes; /* of these, sent as zeroes */
    uint64_t answer_ns; /* shortest time of a copy of data in the last call, or
                           0: none */
  } remote;
};

/* How fast resync copies.  A burst of copies and a rest alternate. */
struct nbdm_pace {
  uint32_t depth;      /* copies in flight, 1 to 64 */
  uint32_t copy_bytes; /* of data in one, up to 1 MiB; 0: that */
  uint32_t burst_us;   /* without a rest it has no meaning */
  uint32_t rest_us;    /* 0: none */
};

/* One call of resync: its limits and its result. */
struct nbdm_resync {
  uint64_t first_region; /* in: where to look for dirty regions, then up */
  uint64_t max_bytes;    /* in: stop after about this much */
  uint32_t max_ms;       /* in: and after this time; 0: no matter how long */
  struct nbdm_pace pace; /* in: to begin with */
  uint64_t next_region;  /* out: where the next call continues; 0: wrapped */
  uint64_t copied_bytes; /* out: bytes of regions made clean */
  uint64_t zero_bytes;   /* out: of these, sent as zeroes */
};

/* How many requests took how long, since start. */
struct nbdm_latency {
  /* By kind, then bucket: no resync copied during the request, or one did. */
  uint64_t quiet[NBDM_LATENCY_KINDS * NBDM_LATENCY_BUCKETS];
  uint64_t disturbed[NBDM_LATENCY_KINDS * NBDM_LATENCY_BUCKETS];
};

struct nbdm_extent {
  uint64_t offset; /* bytes */
  uint64_t length; /* bytes */
  uint32_t type;   /* NBDM_EXTENT_* */
};

/* What a node stores of itself and of the volume's other nodes.  docs/nodes.md
 * has the words; the rules are in nbd_mirror/rules/.
 */
struct nbdm_node {
  char name[NBDM_NAME_LEN];  /* empty: the volume has no nodes */
  uint8_t id[NBDM_UUID_LEN]; /* random, made with the state */
  uint32_t role;             /* enum nbdm_role */
  uint32_t crash;            /* enum nbdm_crash */
  uint32_t inconsistent;     /* a resync to it was cut off half-way */
  uint32_t zero;             /* no data yet, and the disk read as zeroes */
  uint64_t generation;       /* of its data; 0: no data yet */
  uint64_t history[NBDM_ANCESTORS]; /* the latest first; 0: none */
  uint64_t epoch;                   /* of the latest promotion it knows */
  char leader[NBDM_NAME_LEN];       /* the node promoted then; empty: none */
  char handed[NBDM_NAME_LEN];       /* has the token of its role, or empty */
  uint32_t replaced;    /* how many replacements of it were announced */
  uint64_t own_session; /* of its own latest claim */
  struct nbdm_claim {
    uint64_t epoch;
    char node[NBDM_NAME_LEN]; /* empty: no claim was granted */
    uint64_t session;
    uint8_t nonce[NBDM_UUID_LEN];
  } claim; /* the highest that it has granted */
  uint32_t nr_peers;
  struct nbdm_peer {
    char name[NBDM_NAME_LEN];
    uint8_t id[NBDM_UUID_LEN];  /* 0: not known */
    uint64_t bases[NBDM_BASES]; /* 0: none */
    uint32_t replaced;          /* how many replacements of it were announced */
    uint32_t shared;            /* it may hold this node's generation */
    int64_t met; /* end of the last session with it, seconds since 1970; 0 */
  } peers[NBDM_MAX_REMOTES];
};

/* --- A volume's life ------------------------------------------------- */

/* The message of this thread's last failed call, "" if none.  Valid until
 * its next call.
 */
const char *nbdm_last_error (void);

/* Format the state directory, which must exist and hold no superblock unless
 * `force`.  Does not change the local disk.  Remotes begin all dirty, or in
 * sync where assumed.  A node begins as a secondary without data.  -EEXIST:
 * there is a superblock; -EBUSY: in use; -ENOSPC: no room for the logs; a
 * failed create leaves no volume.
 */
int nbdm_create (const struct nbdm_params *params, int force);

/* Lock the state directory and the local disk, load and check the logs, and
 * recover: after it the dirty maps hold all that may differ.  Starts no thread,
 * so a door may fork after it.  -EBUSY: another process has the volume or the
 * disk; -ENOENT: no state or no disk; -EUCLEAN: the superblock is garbled;
 * -EPROTONOSUPPORT: it is a newer program's; -EINVAL: the parameters do not
 * match this volume; -EMEDIUMTYPE: the local disk is not the one of the last
 * session; -ENOMEDIUM: it is too small; -ENOTCONN: NBDM_LOCAL_LOST, and no
 * remote was in sync; -EPERM: a node may not be primary in `epoch`; -ENOSPC.
 * The role of a node is fixed until nbdm_close: see "Nodes" below.
 */
int nbdm_open (const struct nbdm_params *params, struct nbdm **volume);

/* Start the engine's own threads: the ticker (deadlines, the hold's end, idle
 * connections), and a flusher a remote.
 */
int nbdm_start (struct nbdm *volume);

/* Stop cleanly: refuse new requests with -ESHUTDOWN, wait for those under way,
 * flush every leg, persist, mark the logs clean.  Bounded by the deadlines.
 * -EIO: something could not be persisted, the next start will recover as after
 * a crash.  A second call has no effect.
 */
int nbdm_stop (struct nbdm *volume);

/* Wake every nbdm_disk_wait for good, and let no resync wait for a remote on
 * hold, so that policy threads can end.
 */
void nbdm_wake (struct nbdm *volume);

/* Free everything.  No other call may be under way.  Without nbdm_stop the
 * effect is that of a killed process.
 */
void nbdm_close (struct nbdm *volume);

/* --- Requests -------------------------------------------------------- */

/* All block until the request may be answered.  -EINVAL: outside the volume,
 * or too long; -EIO; -ENOSPC: of the local disk; -ESHUTDOWN: stopping;
 * -EOPNOTSUPP: fast zero only.  `buf` is not kept.
 */
int nbdm_pread (struct nbdm *volume, void *buf, uint32_t count,
                uint64_t offset);
int nbdm_pwrite (struct nbdm *volume, const void *buf, uint32_t count,
                 uint64_t offset, uint32_t flags);
int nbdm_trim (struct nbdm *volume, uint64_t count, uint64_t offset,
               uint32_t flags);
int nbdm_zero (struct nbdm *volume, uint64_t count, uint64_t offset,
               uint32_t flags);
int nbdm_flush (struct nbdm *volume);
/* Advice to read ahead, which is left out if other requests do so already. */
int nbdm_cache (struct nbdm *volume, uint64_t count, uint64_t offset);

/* The local disk's runs of data and holes that cover the range from its
 * start; at most `max` of them.  Returns how many.
 */
int nbdm_extents (struct nbdm *volume, uint64_t count, uint64_t offset,
                  struct nbdm_extent *extents, uint32_t max);

/* A request's offset and length should be multiples of this many bytes: for
 * other writes and zeroes the engine must first read the first and the last
 * sector.
 */
uint32_t nbdm_min_block (const struct nbdm *volume);

/* Count a client's connection in (+1) or out (-1); returns the new count. */
int nbdm_count_client (struct nbdm *volume, int change);

/* Change the policy of a volume while requests run.  To NBDM_STOP: a remote
 * that is neither in sync nor holding fences writes, durably, before this
 * returns.  To NBDM_DEGRADE: the fence is lifted.  A restart does not keep it.
 * -EIO: the volume has failed; -ESHUTDOWN; -EINVAL.
 */
int nbdm_set_policy (struct nbdm *volume, uint32_t policy,
                     uint32_t fail_fenced_reads);

/* --- Any disk: mechanism for the policy threads ----------------------- */

/* From now on use the disk: the caller has found that it is the same as before.
 * A remote: held requests are sent again, and the state becomes in_sync if
 * nothing is dirty, else resyncing.  The local disk, durably: failed ->
 * resyncing; -ENODEV: not attached.
 */
int nbdm_disk_admit (struct nbdm *volume, uint32_t disk);

/* `reason` becomes the reason of the state.  A remote: drop the connection;
 * never fails.  The local disk: close it again if it is attached, durably.
 */
int nbdm_disk_drop (struct nbdm *volume, uint32_t disk, const char *reason);

/* Copy to the disk what it misses, flush it, clear the bits.  Ends when
 * `max_bytes` are copied, the time is over, nothing is left, an operator pauses
 * it, or at nbdm_wake.  To a remote it copies from local; to the local disk
 * from a remote that is clean there, and then `depth` is not used.  If nothing
 * is dirty afterwards, it sets the disk's state to in_sync, or ok.  Returns 0
 * also if nothing was dirty; -ENOTCONN: the remote was lost, or no connected
 * remote is clean there (no bit was cleared without its flush); -EIO: local
 * could not be read, or has failed.
 */
int nbdm_disk_resync (struct nbdm *volume, uint32_t disk,
                      struct nbdm_resync *batch);

/* Change the pace of the call that is under way, from its next copy on. */
int nbdm_disk_resync_pace (struct nbdm *volume, uint32_t disk,
                           const struct nbdm_pace *pace);

/* Block until the disk's serial differs from `seen`, the time is over or
 * nbdm_wake; returns the serial, which grows at each change of the disk.
 */
uint64_t nbdm_disk_wait (struct nbdm *volume, uint32_t disk, uint64_t seen,
                         uint32_t timeout_ms);

/* --- Remotes alone ---------------------------------------------------- */

/* Connect and check the size and the flags; not used for anything until
 * admitted.  At most one policy thread a remote calls these.  -ERANGE: too
 * small; -EROFS: read-only; -ETIMEDOUT, -ECONNREFUSED and so on.
 */
int nbdm_remote_connect (struct nbdm *volume, uint32_t disk, const char *uri,
                         uint32_t timeout_ms);

/* Compare a region on local with the connected remote, or the longest part of
 * it that no request holds; of a large one over a slow link what two seconds
 * allow: 0 same, 1 different, -EBUSY: requests hold all of it (try another),
 * -EAGAIN: it is dirty on either, or local is not open, -ENODATA: local cannot
 * read it.
 */
int nbdm_remote_compare (struct nbdm *volume, uint32_t disk, uint64_t region);

/* The first region from this one on that is dirty on neither side, so that
 * comparing it proves something; the number of regions if there is none, local
 * is not open, or the disk is no remote.
 */
uint64_t nbdm_remote_comparable (struct nbdm *volume, uint32_t disk,
                                 uint64_t region);

/* Set the reason why a remote that is not connected is out of sync. */
int nbdm_remote_explain (struct nbdm *volume, uint32_t disk,
                         const char *reason);

/* Drop the remote and make it `failed`, durably: no thread connects it again
 * until nbdm_remote_reset or nbdm_remote_invalidate.
 */
int nbdm_remote_fail (struct nbdm *volume, uint32_t disk, const char *reason);

/* failed -> out_of_sync, durably, the dirty map kept.  No effect otherwise. */
int nbdm_remote_reset (struct nbdm *volume, uint32_t disk);

/* Set or lift an operator's pause of resync, durably. */
int nbdm_remote_pause (struct nbdm *volume, uint32_t disk, int paused);

/* Make every region dirty, durably; failed -> out_of_sync.  -EBUSY: the local
 * disk misses something, and the remote may be the only copy of it.
 */
int nbdm_remote_invalidate (struct nbdm *volume, uint32_t disk);

/* The late-write window is over: late regions are plain dirty ones now. */
int nbdm_remote_release_late (struct nbdm *volume, uint32_t disk);

/* --- The local disk, after it failed ---------------------------------- */

/* Open `path` as the local disk again; it is used for nothing until admitted.
 * `replaced`: it is another disk, so every region is dirty on it, durably, or
 * -EBUSY: the disk that failed has the only copy of something; else
 * -EMEDIUMTYPE: it is another disk than before.  -EALREADY: local has not
 * failed; -EIO: it did not answer within twice local's deadline, if there is
 * one; -ENOENT, -EBUSY, -ENOMEDIUM (too small) and so on.
 */
int nbdm_local_attach (struct nbdm *volume, const char *path, int replaced);

/* Take samples of the local disk, by which a start identifies it, if a start
 * could compare fewer than `least` now: because there are too few, or clients
 * write to their extents.  Returns how many were taken.
 */
int nbdm_local_sample (struct nbdm *volume, uint32_t least);

/* Let extents idle for at least `idle_ms` go cold: flushes the legs and
 * persists the dirty maps first.
 */
int nbdm_cool (struct nbdm *volume, uint32_t idle_ms);

/* --- Nodes ------------------------------------------------------------ */

/* Flush the disks in use, as a step of a meeting or of a change of roles.
 * Policy stop refuses a client's flush while a node is missing; it must not
 * refuse this one, which is how that node comes back.
 */
int nbdm_node_flush (struct nbdm *volume);

/* A node is opened as secondary or as primary, and keeps that role until
 * nbdm_close.  The record's `role` is the caller's: the engine never changes
 * it, and does not read it.  Another node is a disk (`is_node`) with two more
 * things than a remote: its entry in the record, and a map of *doubts*, regions
 * of which neither copy is known to be newer.  docs/nodes.md has the rules.
 *
 * nbdm_open after an unclean end enters into the doubts towards every node what
 * may differ: the open slots if the page cache outlived the process, else all
 * active extents; with two other nodes or more always these.  `crash` becomes
 * at least PROCESS or HOST, and NONE if there are no doubts.  A lost map, or
 * log, of a node counts as doubts in all regions.  `zero` is proven again.  All
 * of it is durable when nbdm_open returns.
 *
 * A secondary connects to nobody: nbdm_remote_connect gives -EPERM.  A write
 * goes to the local disk alone and enters no map; its error is the caller's,
 * and nothing takes the disk's place.  Before the first write of a session
 * every plain remote becomes all dirty and late, durably: nothing tells what it
 * has.  There is no policy: it counts as NBDM_DEGRADE.
 *
 * nbdm_open as primary: -EPERM unless the record has this `epoch`, this node as
 * its leader, and data.  If it doubts regions, it begins a generation that no
 * other node can hold; then the doubts become dirty, and no longer doubts;
 * `crash` becomes NONE; durable in this order.  Then local is flushed.
 *
 * On a primary, a node is *counted* if its entry has `shared` and no base.  A
 * connected node of which nothing is dirty is in_sync only if it is counted.
 * Else it stays resyncing, with 0 dirty regions, until nbdm_node_store counts
 * it.  A write that a node with `shared` will not get begins a generation,
 * durable before the write is answered: exactly `begin` of
 * nbd_mirror/rules/generation.py, for the nodes that do not get the write.
 */

/* The record as it is now.  -EINVAL: the volume has no nodes. */
int nbdm_node_get (struct nbdm *volume, struct nbdm_node *node);

/* Compare and swap the whole record, durable: `after` replaces `before`.  The
 * engine begins generations by itself, so -EAGAIN: it is no longer `before`;
 * get it, and apply the rule again.  -EINVAL: `after` has another name or id,
 * other peers or another order of them, an unknown role or crash, an earlier
 * term (epoch, then leader), or no generation where there was one; -ESHUTDOWN:
 * a stop has begun; -EIO: the volume has failed.  If this counts a node of
 * which nothing is dirty, it is in_sync when the call returns.
 */
int nbdm_node_store (struct nbdm *volume, const struct nbdm_node *before,
                     const struct nbdm_node *after);

#define NBDM_MAP_DIRTY 0  /* what the node misses, as far as this one knows */
#define NBDM_MAP_DOUBTS 1 /* towards the node */
#define NBDM_MAP_MISSED 2 /* what the local disk misses; all, if it failed */

/* The regions of a map towards a node: bit r % 8 of byte r / 8 is region r.
 * -EINVAL: the disk is no node, there is no such map, or `size` is not the
 * number of regions / 8, rounded up; -ESHUTDOWN: the volume has stopped.
 */
int nbdm_node_map (struct nbdm *volume, uint32_t disk, uint32_t map,
                   uint8_t *bits, uint64_t size);

/* Add regions to NBDM_MAP_DIRTY or NBDM_MAP_DOUBTS, durably; bits behind the
 * last region are ignored.  A node that was in_sync is resyncing, if any region
 * became dirty.  Where the local disk misses a region and that node has its
 * only copy, it does not become dirty.  -EINVAL as above; -ESHUTDOWN, -EIO.
 */
int nbdm_node_mark (struct nbdm *volume, uint32_t disk, uint32_t map,
                    const uint8_t *bits, uint64_t size);

/* Nothing is dirty or doubted towards that node any more, durably: this node
 * has adopted its generation.  The resync has also written all that the local
 * disk missed, so if it was resyncing, it is flushed and ok.  -EPERM: this node
 * is primary; -EINVAL, -ESHUTDOWN, -EIO.
 */
int nbdm_node_clear (struct nbdm *volume, uint32_t disk);

/* As nbdm_disk_admit.  -EAGAIN: that node lacks a region.  For a node which was
 * told that nothing will be copied to it: a write that it gets beside one that
 * it lacks would make its image one of no instant.  When it lacks a region
 * later, its connection ends before it gets another write.
 */
int nbdm_node_admit (struct nbdm *volume, uint32_t disk);

/* That node is told next that nothing is copied to it any more: from now on it
 * is as after nbdm_node_admit.  -EAGAIN: it lacks a region, or it is not
 * connected.
 */
int nbdm_node_whole (struct nbdm *volume, uint32_t disk);

/* On a secondary: its primary's session ended without a clean close.  All
 * active extents become doubts towards every node, and if there are doubts
 * then, `crash` becomes at least SESSION; durable.  Call it when no request of
 * that session is under way any more.  After a clean close call nbdm_cool (v,
 * 0) instead, which flushes and forgets the active extents; while another
 * thread does so, it does nothing, and a session that is lost later doubts more
 * than it must.  -EPERM: this node is primary; -EINVAL: the volume has no
 * nodes; -ESHUTDOWN, -EIO.
 */
int nbdm_node_session_lost (struct nbdm *volume);

/* The volumes that a client of this server reaches: this one, and those that
 * its remotes reported.  Each door sends it as its export's description, so
 * that a volume that would mirror onto itself, over any address, detects that.
 */
#define NBDM_CHAIN_LEN 1024 /* bytes, with the NUL */
void nbdm_chain (const struct nbdm *volume, char *words, uint32_t size);

/* --- The direct door: our own NBD server ------------------------------- */

struct direct_server; /* opaque */

/* Limits of the clients; 0: the default. */
struct nbdm_limits {
  uint32_t max_clients;
  uint32_t stall_ms; /* how long a client that blocks others may move nothing */
  uint64_t max_memory;   /* bytes of all clients and their requests together */
  uint32_t call_ms;      /* how long another node's call may go unanswered */
  uint32_t handshake_ms; /* how long a handshake may take */
  uint32_t silence_ms;   /* how long a node with a claim may be silent */
};

/* Serve the volume to clients of `nr` listening sockets, which the caller still
 * owns, and which become non-blocking.  Raises the process's limit of
 * descriptors as far as `max_clients` needs it.  -ENOMEM, -EMFILE.
 */
int nbdm_server_open (struct nbdm *volume, const int *listen_fds, uint32_t nr,
                      const struct nbdm_limits *limits,
                      struct direct_server **server);

/* The files with which a server proves itself in TLS: one of shared keys, in
 * lines of "NAME:KEY IN HEX"; or a certificate and its key, in PEM.  With `ca`
 * each client needs a certificate too, signed by one of that file.
 */
struct nbdm_tls {
  const char *psk; /* or NULL, and then the next two are not */
  const char *certificate;
  const char *private_key;
  const char *ca; /* or NULL */
};

/* Clients of that listening socket, a number from 0, need TLS 1.3 from now on.
 * Call it before nbdm_server_run.  -EINVAL, -EACCES, -ENOENT: a file is wrong.
 */
int nbdm_server_tls (struct direct_server *server, uint32_t listener,
                     const struct nbdm_tls *files);

/* Check a node's own certificate as the other nodes will: its purposes, its CA,
 * and that it is of one of `names`, the node's name first and its address last.
 * -ETIME: only the time is wrong, which may pass, or be the clock's fault;
 * -EACCES, and as nbdm_server_tls.
 */
int nbdm_tls_check (const struct nbdm_tls *files, const char *const *names,
                    uint32_t nr_names);

enum nbdm_listener_kind {
  NBDM_CLIENTS = 0, /* the volume, under any name: how a listener begins */
  NBDM_NODES = 1,   /* other nodes: NAME.meta, NAME.dirty, and claims */
  NBDM_CLOSED = 2   /* nothing: every client gets a text that says why */
};

/* What the clients of that listening socket get from now on; those in
 * transmission keep what they have.  `text`, of at most NBDM_TEXT_LEN - 1
 * bytes, is for NBDM_CLOSED: who is primary, which command helps.  NULL: "".
 * Any thread may call it at any time.  -EINVAL.
 */
#define NBDM_TEXT_LEN 512 /* bytes of a refusal, with the NUL */
int nbdm_server_listener (struct direct_server *server, uint32_t listener,
                          uint32_t kind, const char *text);

/* The limit of clients: lower than requested if descriptors are short. */
uint32_t nbdm_server_max_clients (const struct direct_server *server);

/* Start the threads for requests, before nbdm_server_run: so a start that fails
 * is known before anything says that the volume is served.  -EAGAIN: no thread
 * could start; then only nbdm_server_close may follow.
 */
int nbdm_server_start (struct direct_server *server);

/* Accept and serve; blocks until nbdm_server_end, then until the requests that
 * were taken in are answered and the clients disconnected: bounded if the
 * volume is stopped, as a client that does not read its answers is dropped.
 * After that the sockets no longer listen, and the threads have ended.
 */
void nbdm_server_run (struct direct_server *server);

/* The sockets go on listening after the end: new clients wait for the program
 * that this process executes next.  Call it before the end.
 */
void nbdm_server_hand_on (struct direct_server *server);

/* Make nbdm_server_run return; from any thread, any number of times. */
void nbdm_server_end (struct direct_server *server);

/* The same, and wait until the clients are answered and disconnected.  Call it
 * before nbdm_stop, which refuses requests that have not begun.  -ETIMEDOUT:
 * some clients are still connected.
 */
int nbdm_server_drain (struct direct_server *server, uint32_t timeout_ms);

/* After nbdm_server_run has returned. */
void nbdm_server_close (struct direct_server *server);

/* --- Calls of other nodes, at the direct door -------------------------- */

/* docs/PROTOCOL.md has the bytes.  C moves them; one thread of the caller, the
 * control thread, takes each call, judges it and answers it.
 */
#define NBDM_CALL_LEN 65536 /* bytes of a request and of a reply, at most */

enum nbdm_call_kind {
  /* Another node claims the disk; `words` are the export's name, which begins
   * with "NAME@" and has only printable ASCII, 255 bytes at most.  Rc 0 grants,
   * and requests may come at once; else the bytes are the text of the refusal.
   */
  NBDM_CALL_CLAIM = 1,
  /* A request to NAME.meta; `words` may be any bytes.  The bytes of the answer
   * are the reply, with rc 0, or the text of a refusal.
   */
  NBDM_CALL_META = 2,
  /* Another node opens NAME.dirty; no words.  The bytes of the answer are the
   * export's content, or the text of a refusal.
   */
  NBDM_CALL_DIRTY = 3,
  /* The last connection of a claim has ended, and none of its requests is under
   * way at the disk; `words` are the export's name.  `clean`: each connection
   * said goodbye (NBD_CMD_DISC) after its last answer.  No answer.
   */
  NBDM_CALL_SESSION_ENDED = 4
};

struct nbdm_call {
  uint64_t number; /* for the answer; never 0 */
  uint32_t kind;   /* enum nbdm_call_kind */
  uint32_t clean;
  uint32_t size; /* bytes of words */
  uint8_t words[NBDM_CALL_LEN];
};

/* Wait for the next call; ended sessions come first.  -EAGAIN: the time is
 * over; -ESHUTDOWN: nbdm_server_run has returned, and no call is left.
 */
int nbdm_server_next_call (struct direct_server *server, struct nbdm_call *call,
                           uint32_t timeout_ms);

/* As nbdm_server_next_call, for NBDM_CALL_SESSION_ENDED alone, without a wait.
 * After a fence and before the answer to the claim: a session that the fence
 * cut is reported here, and what it leaves behind (doubts) must be stored
 * before the next session may write.  -EAGAIN: none.
 */
int nbdm_server_next_ended (struct direct_server *server,
                            struct nbdm_call *call);

/* Answer a call; `bytes` are copied.  A claim of a name that has connections is
 * one more connection of that session.  -ENOENT: no one waits for it any more:
 * the other node left, or the time was over; -ESTALE: a granted claim was
 * refused all the same, as a connection of that session has ended; -EINVAL:
 * more bytes than the kind allows; -ENOMEM.
 */
int nbdm_server_answer (struct direct_server *server, uint64_t number, int rc,
                        const void *bytes, uint64_t size);

/* Does the certificate of the node that made this call have one of these names
 * (addresses are names too)?  Call it before the answer.  1, also without
 * certificates: a shared key proves the volume alone; 0, with a message that
 * has the certificate's names; -ENOENT as above.
 */
int nbdm_server_proves (struct direct_server *server, uint64_t number,
                        const char *const *names, uint32_t nr_names);

/* Cut every connection of a claim but those of this call (0: none), and wait
 * until none of their requests is under way at the disk, nor can come there.
 * Claims that are granted later are not cut: one thread judges and fences.
 * Returns how many connections were cut.  -ETIMEDOUT: some requests are still
 * under way; the connections are cut, and another fence waits for them.
 */
int nbdm_server_fence (struct direct_server *server, uint64_t keep_call,
                       uint32_t timeout_ms);

/* Connect to an export NAME.meta (nbd://, nbds://, or +unix), make one call,
 * disconnect; no volume is needed.  `timeout_ms` bounds all of it, but not the
 * resolution of a host's name.  Returns the reply's length, without the NULs at
 * its end.  -ECONNREFUSED: the other node refuses, the message has its text;
 * -EMSGSIZE: the reply needs more room; -EPROTO: the other side is no node of
 * ours; -ETIMEDOUT and so on.
 */
int nbdm_call (const char *uri, const void *request, uint32_t size, void *reply,
               uint32_t room, uint32_t timeout_ms);

/* The same for an export NAME.dirty: read all its bytes.  -ERANGE: it has
 * another size.
 */
int nbdm_fetch (const char *uri, void *bits, uint64_t size,
                uint32_t timeout_ms);

/* --- The log --------------------------------------------------------- */

/* The kind of a line.  Each of the first three is limited to some lines a
 * second, as a client can cause them.
 */
#define NBDM_LOG_CLIENTS 0
#define NBDM_LOG_OTHERS 1    /* what is written to descriptors 1 and 2 */
#define NBDM_LOG_STRANGERS 2 /* of connections that are no clients yet */
#define NBDM_LOG_KINDS 3
#define NBDM_LOG_OWN 3

/* From now on no line blocks: two threads move all lines, also those written to
 * descriptors 1 and 2, to the current file of descriptor 2.  Call it after any
 * fork, and before signals are blocked.  A second call has no effect.  -EMFILE,
 * -EAGAIN.
 */
int nbdm_log_start (void);

/* If the output is `state_dir`'s serve.log: bound its size. */
int nbdm_log_rotate (const char *state_dir);

/* Write a line: the time, `level` and `words`.  Never blocks, never fails:
 * lines that cannot be written are counted.  Before nbdm_log_start it may
 * block.
 */
void nbdm_log (uint32_t kind, const char *level, const char *words);

/* The same for complete lines, written unchanged. */
void nbdm_log_raw (const char *text);

/* Wait until all lines are written, or the time is over. */
void nbdm_log_flush (uint32_t timeout_ms);

/* Descriptors 1 and 2 are the output again, for a program that this process
 * executes.  Call it last, after nbdm_log_flush.
 */
void nbdm_log_hand_on (void);

/* Counts of the lines that could not be written, and of those left out by the
 * limit.
 */
void nbdm_log_counts (uint64_t *nr_lost, uint64_t *nr_left_out);

/* --- Looking at it --------------------------------------------------- */

void nbdm_get_status (struct nbdm *volume, struct nbdm_status *status);
int nbdm_get_disk_status (struct nbdm *volume, uint32_t disk,
                          struct nbdm_disk_status *status);

void nbdm_get_latency (struct nbdm *volume, struct nbdm_latency *latency);

/* Indexes of up to `max` active extents, the last used first; returns how many.
 */
int nbdm_get_active_extents (struct nbdm *volume, uint64_t *extents,
                             uint32_t max);

/* Indexes of up to `max` regions written last, latest first, each once; also
 * those of earlier sessions, as far back as the in-flight log's slots have not
 * been used again.  For the sample: a backup differs where writes were last.
 */
int nbdm_get_recent_regions (struct nbdm *volume, uint64_t *regions,
                             uint32_t max);

/* Read a superblock without locking or changing anything, also beside a
 * running server.  Fills what is stored; the rest is zero.  `disks`: room for
 * NBDM_MAX_DISKS.  `node`: may be NULL.
 */
int nbdm_peek (const char *state_dir, char *name, struct nbdm_status *status,
               struct nbdm_disk_status *disks, struct nbdm_node *node);

/* Would a start believe the map of this disk, "local" or a remote?  Locks and
 * changes nothing, also beside a running server.  0; -ENOENT or -EUCLEAN: a
 * start takes all as dirty, and the message says why.
 */
int nbdm_peek_map (const char *state_dir, const char *disk);
/* The same for the logs that cover all disks: checks their headers. */
int nbdm_peek_logs (const char *state_dir);

/* --- Tests ----------------------------------------------------------- */

/* The name of the fault point with this index, from 0; NULL: there is none.
 * `*fails`: NBDM_FAULT may have it return an error.
 */
const char *nbdm_fault_point (uint32_t index, int *fails);

/* Pass a fault point of the control, which is in the same table. */
int nbdm_reach (const char *name);
