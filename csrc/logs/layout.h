/* SPDX-License-Identifier: BSD-3-Clause */

/* The format on disk, byte for byte. docs/FORMAT.md describes it in prose.
 *
 * Every integer is little-endian.  Every file begins with a page that holds a
 * magic, a version, the volume's uuid and the *session*: a counter that grows
 * at each start and is stamped into every log.  A log with another session is
 * an old copy that was put back.  It is not believed, like a torn one: both
 * mean "all dirty" (rule 9).
 *
 * Nothing here may change without a new version or a feature bit.  The reserved
 * bytes are zero, for later use.
 */

#ifndef NBDM_LAYOUT_H
#define NBDM_LAYOUT_H

#include <stddef.h>
#include <stdint.h>

#include "api.h"

#define LAYOUT_VERSION 1
#define LAYOUT_PAGE                                                            \
  4096 /* bytes of each file's header; maps are padded to it */
#define LAYOUT_SECTOR 512 /* bytes written at a time into `activity` */
#define LAYOUT_MAX_REMOTES NBDM_MAX_REMOTES
#define LAYOUT_MAX_LEFT_OUT 8

/* `superblock`: two slots of one page; the valid one with the higher sequence
 * counts, the other is written next.  So sequences are even in the first slot
 * and odd in the second; a slot where they are not is not valid.
 */
#define SUPERBLOCK_MAGIC "NBDMSUPR"

#define SUPERBLOCK_CLEAN 1  /* stopped cleanly: the logs are empty */
#define SUPERBLOCK_FENCED 2 /* policy "stop": no writes until in_sync */
/* A takeover is not over, and local was ok before it: where no remote has a
 * region durably, local has it.
 */
#define SUPERBLOCK_UNDECIDED 4

/* Bits of `incompatible`: a program that does not know one refuses the volume.
 * Bits of `compatible`: a program clears those it does not know with its first
 * store, as it does not maintain the fields that they vouch for.
 */
#define FEATURE_NODES 1  /* incompatible: each slot has a page of nodes */
#define FEATURE_DOUBTS 2 /* incompatible: dirty.NODE has a map of doubts */
#define FEATURES_INCOMPATIBLE                                                  \
  (FEATURE_NODES | FEATURE_DOUBTS) /* all that this program knows */
#define FEATURE_IDENTITY 1         /* compatible: the identity fields count */

#define ROLE_PRIMARY 1
#define ROLE_SECONDARY 2 /* only of a volume of nodes */

#define NR_HISTORY 7 /* ancestors kept in the superblock's first page */

#define REMOTE_PAUSED 1  /* an operator paused resync */
#define REMOTE_ASSUMED 2 /* in sync only because the operator said so */

struct disk_remote {
  char name[NBDM_NAME_LEN]; /* NUL-padded; empty: entry unused */
  uint32_t state;           /* enum nbdm_remote_state */
  uint32_t flags;           /* REMOTE_* */
  uint64_t generation;      /* the volume's generation when last in sync */
  int64_t since;            /* when the state was entered, seconds since 1970 */
  char reason[NBDM_REASON_LEN]; /* why, NUL-terminated UTF-8 */
  uint64_t address; /* CRC64 of the last used address; 0: not known */
};
_Static_assert(sizeof (struct disk_remote) == 256, "remote entry");

/* The content of a block of the local disk when the sample was taken.  Since
 * then the block was not written, or its activity extent is in `activity`, or
 * its region is dirty in `dirty.local`.
 */
#define SAMPLE_BLOCK 65536 /* bytes; the volume's last block may be shorter */
#define NR_SAMPLES 64

struct disk_sample {
  uint64_t block; /* offset / SAMPLE_BLOCK, plus one; 0: none */
  uint64_t crc;   /* CRC64 (ECMA-182, reflected); 0: all of it is zeroes */
};
_Static_assert(sizeof (struct disk_sample) == 16, "sample");

struct disk_superblock {
  char magic[8];
  uint32_t version;
  uint32_t crc;      /* CRC32C of the page with this field zero */
  uint64_t sequence; /* grows by one at each write */
  uint8_t uuid[NBDM_UUID_LEN];
  char name[NBDM_NAME_LEN]; /* the volume's name, NUL-padded */
  uint64_t size;            /* bytes */
  uint32_t region_size;     /* bytes, power of two */
  uint32_t extent_size;     /* bytes, power of two, >= region_size */
  uint32_t ring_slots;      /* slots in `inflight` */
  uint32_t activity_slots;  /* extents in `activity` */
  uint64_t session;
  uint64_t generation;
  uint64_t history[NR_HISTORY]; /* earlier generations, latest first; 0: none */
  uint32_t role;                /* ROLE_* */
  uint32_t flags;               /* SUPERBLOCK_* */
  uint8_t boot_id[NBDM_UUID_LEN]; /* the kernel's boot id when last opened */
  uint64_t mount_id[3];
  uint32_t local_state; /* enum nbdm_local_state */
  uint32_t nr_remotes;
  int64_t local_since; /* when local_state was entered, seconds since 1970 */
  char local_reason[NBDM_REASON_LEN]; /* why, NUL-terminated UTF-8 */
  uint64_t incompatible;              /* FEATURES_INCOMPATIBLE */
  uint64_t compatible;                /* FEATURE_* */
  /* The addresses of remotes that have left the configuration, as `address`
   * above, the latest first; 0: none.
   */
  uint64_t left_out[LAYOUT_MAX_LEFT_OUT];
  uint8_t reserved1[8];
  struct disk_remote remotes[LAYOUT_MAX_REMOTES];
  uint64_t identity_session; /* another than `session`: do not believe these */
  uint64_t local_size;       /* of the local disk, bytes */
  char local_device[240];    /* which disk it is, NUL-terminated UTF-8; or "" */
  struct disk_sample samples[NR_SAMPLES];
  uint64_t
      local_instance[3]; /* mount or device of its page cache; 0: unknown */
  uint8_t reserved2[232];
};
_Static_assert(offsetof (struct disk_superblock, session) == 128, "layout");
_Static_assert(offsetof (struct disk_superblock, boot_id) == 208, "layout");
_Static_assert(offsetof (struct disk_superblock, local_since) == 256, "layout");
_Static_assert(offsetof (struct disk_superblock, incompatible) == 424,
               "layout");
_Static_assert(offsetof (struct disk_superblock, left_out) == 440, "layout");
_Static_assert(offsetof (struct disk_superblock, remotes) == 512, "layout");
_Static_assert(offsetof (struct disk_superblock, identity_session) == 2560,
               "layout");
_Static_assert(offsetof (struct disk_superblock, samples) == 2816, "layout");
_Static_assert(sizeof (struct disk_superblock) == LAYOUT_PAGE, "layout");

/* The second page of a slot, only of a volume of nodes: this node, and what it
 * knows of the others.  The pages of nodes lie behind both slots, so that a
 * program that does not know them finds both slots, and refuses the volume.  A
 * store writes both pages of its slot; a slot whose two pages are not of one
 * sequence is torn, and not valid.
 */
#define NODES_MAGIC "NBDMNODE"
#define NODES_OFFSET 8192 /* of the first slot's page of nodes, in the file */
#define NR_OLDER 25       /* ancestors kept here, beside those in `history` */

#define NODE_INCONSISTENT 1 /* a resync to this node was cut off half-way */
#define NODE_ZERO 2         /* no data yet, and the disk read as zeroes */

#define PEER_SHARED 1 /* it may hold this node's generation */

struct disk_peer {
  char name[NBDM_NAME_LEN];   /* the other node's, NUL-padded */
  uint8_t id[NBDM_UUID_LEN];  /* its node id; 0: not known */
  uint64_t bases[NBDM_BASES]; /* generations it held in full; 0: none */
  uint32_t flags;             /* PEER_* */
  uint32_t replaced;          /* announced replacements of that node */
  int64_t met; /* end of the last session with it, seconds since 1970; 0 */
  uint8_t reserved2[32];
};
_Static_assert(sizeof (struct disk_peer) == 160, "peer");

struct disk_nodes {
  char magic[8];
  uint32_t version;
  uint32_t crc;               /* CRC32C of the page with this field zero */
  uint64_t sequence;          /* of the slot */
  uint8_t id[NBDM_UUID_LEN];  /* of this node: random, made with its state */
  char name[NBDM_NAME_LEN];   /* of this node, NUL-padded */
  uint64_t older[NR_OLDER];   /* generations before those in `history` */
  uint64_t epoch;             /* of the latest promotion that it knows */
  char leader[NBDM_NAME_LEN]; /* the node promoted then; empty: none was */
  char handed[NBDM_NAME_LEN]; /* has the token of this node's role, or empty */
  uint32_t crash;             /* enum nbdm_crash */
  uint32_t flags;             /* NODE_* */
  /* The highest claim that this node granted; `claim_node` empty: none. */
  uint64_t claim_epoch;
  char claim_node[NBDM_NAME_LEN];
  uint64_t claim_session;
  uint8_t claim_nonce[NBDM_UUID_LEN];
  uint64_t own_session; /* of this node's own latest claim */
  uint32_t nr_peers;
  uint32_t replaced; /* announced replacements of this node */
  struct disk_peer peers[LAYOUT_MAX_REMOTES];
  uint8_t reserved2[2256];
};
_Static_assert(NR_HISTORY + NR_OLDER == NBDM_ANCESTORS, "ancestors");
_Static_assert(offsetof (struct disk_nodes, older) == 104, "layout");
_Static_assert(offsetof (struct disk_nodes, claim_epoch) == 448, "layout");
_Static_assert(offsetof (struct disk_nodes, peers) == 560, "layout");
_Static_assert(sizeof (struct disk_nodes) == LAYOUT_PAGE, "layout");

/* The first page of each of the other files. */
#define ACTIVITY_MAGIC "NBDMACTV"
#define INFLIGHT_MAGIC "NBDMRING"
#define DIRTY_MAGIC "NBDMDRTY"

#define LOG_CLEAN 1 /* closed by a clean stop; `bits_crc` is valid */
#define LOG_RENEWED                                                            \
  2 /* dirty.*: a start that has not ended made it to replace a lost one */
#define LOG_DOUBTS 4 /* dirty.NODE: it has a fifth map, of doubts */

struct disk_log_header {
  char magic[8];
  uint32_t version;
  uint32_t crc; /* CRC32C of the page with this field zero */
  uint8_t uuid[NBDM_UUID_LEN];
  char name[NBDM_NAME_LEN]; /* the remote's name in dirty.*, else empty */
  uint64_t session;
  uint64_t entries;    /* extents, slots or regions the file holds */
  uint64_t entry_size; /* bytes that an entry covers: extent, slot, region */
  uint32_t flags;      /* LOG_* */
  uint32_t bits_crc;   /* dirty.*: CRC32C of all maps, when LOG_CLEAN */
  uint8_t reserved[LAYOUT_PAGE - 128];
};
_Static_assert(offsetof (struct disk_log_header, session) == 96, "layout");
_Static_assert(sizeof (struct disk_log_header) == LAYOUT_PAGE, "layout");

/* `activity`: after the header, sectors of extents.  Torn or garbled: the CRC
 * is wrong and everything is dirty.
 */
#define ACTIVITY_PER_SECTOR 62

struct disk_activity_sector {
  uint64_t sequence; /* grows by one at each write of this sector */
  uint32_t index;    /* of this sector, from 0 */
  uint32_t crc;      /* CRC32C of the sector with this field zero */
  uint64_t extent[ACTIVITY_PER_SECTOR]; /* extent index + 1; 0: free */
};
_Static_assert(sizeof (struct disk_activity_sector) == LAYOUT_SECTOR, "layout");

/* `inflight`: after the header, slots.  A slot is free if and only if `word`
 * is 0; otherwise `word` holds the CRC32C of the 26 bytes (sequence, offset,
 * length, kind, flags) in bits 0-31, the kind in bits 32-39 and the flags in
 * bits 40-47.  One aligned 8-byte store opens or frees a slot, so a process
 * killed between two instructions leaves it open or free, never torn.
 */
struct disk_slot {
  uint64_t word;
  uint64_t sequence;
  uint64_t offset;      /* bytes */
  uint64_t length;      /* bytes */
  uint32_t legs_issued; /* bit 0: local, bit 1 + i: remote i; for inspection */
  uint32_t legs_done;
  uint64_t reserved[3];
};
_Static_assert(sizeof (struct disk_slot) == 64, "layout");

/* `dirty.<remote>`: after the header four maps of the same size, each padded
 * with zeroes to a page; of another node five, and LOG_DOUBTS.  Region i is bit
 * i % 8 of byte i / 8.
 */
enum dirty_map_index {
  MAP_DIRTY,      /* may differ on that remote */
  MAP_UNFLUSHED0, /* answered by that remote, not flushed since: one set */
  MAP_UNFLUSHED1, /*   fills while a flush for the other is under way */
  MAP_LATE,       /* a lost connection's command may still change it */
  NR_MAPS,
  MAP_DOUBTS = NR_MAPS, /* of a node: may differ, and neither copy is newer */
  NR_NODE_MAPS
};

#endif /* NBDM_LAYOUT_H */
