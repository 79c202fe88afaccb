/* SPDX-License-Identifier: BSD-3-Clause */

/* A volume with two remotes, and what a session of it leaves, to be started
 * from again and again.
 *
 * The remotes are servers in a process of their own; each session is another,
 * so that a fault point may kill it.  The test itself has no thread, or it
 * could not fork safely under the sanitizers.  What was answered is noted in
 * memory that all of them share: it outlives them.
 */

#ifndef NBDM_INTERRUPTED_H
#define NBDM_INTERRUPTED_H

#include "api.h"
#include "volume/volume.h"
#include "nbd_peer.h"
#include "test.h"

#define BENCH_REGION 4096u
#define BENCH_REGIONS 40u
#define BENCH_SIZE (BENCH_REGIONS * BENCH_REGION)
#define BENCH_REMOTES 2u
#define BENCH_FILES 12u

/* What an open found. */
struct found {
  int rc;
  uint32_t local_state;
  uint64_t local_dirty, dirty[BENCH_REMOTES], late[BENCH_REMOTES];
  char reason[NBDM_REASON_LEN];
};

/* Shared with the children. */
struct board {
  uint8_t answered[BENCH_REGIONS];
  uint8_t pending[BENCH_REGIONS]; /* written and not answered; 0: nothing */
  struct found found;
};

struct bench {
  char dir[64], local[80], state[80];
  int dirfd; /* of the state */
  pid_t servers;
  int control;                  /* of the servers' process */
  uint8_t (*image)[BENCH_SIZE]; /* the remotes' disks: see bench_servers */
  char uri[BENCH_REMOTES][160];
  struct nbdm_params params;
  struct board *board;
  struct nbdm *volume; /* of a child */
  bool local_went_away;
  bool both_may_have_lost; /* local, and the remotes: see test_interrupted.c */
};

/* What lies there between two sessions. */
struct left {
  struct left_file {
    char name[64];
    uint8_t *bytes;
    size_t size;
  } file[BENCH_FILES];
  unsigned nr_files;
  uint8_t disk[1 + BENCH_REMOTES][BENCH_SIZE];
  struct board board;
};

void bench_make (struct bench *bench);
void bench_remove (struct bench *bench);
/* To all servers; also from a child. */
enum servers_word {
  SERVERS_START = 's',
  SERVERS_TAKE = 't',     /* cut, and have `image` hold what the remotes hold */
  SERVERS_PUT = 'p',      /* the other way round; all of it flushed */
  SERVERS_HOLD = 'h',     /* carry out no flush */
  SERVERS_HOLD_ALL = 'a', /* carry out nothing */
  SERVERS_GO = 'g',
  SERVERS_LOSE_CACHE = 'l' /* cut, lose what was not flushed, and go on */
};
void bench_servers (struct bench *bench, enum servers_word word);
void bench_take (struct bench *bench, struct left *left);
void bench_put (struct bench *bench, const struct left *left);
void bench_free (struct left *left);
/* Was the session killed in a takeover that is not decided? */
bool left_in_takeover (const struct left *left);
/* The next start finds another boot. */
void bench_reboot (const struct bench *bench);

/* A session, which has to end well. */
void bench_session (const char *fault, void (*body) (void *));

/* --- in a child -------------------------------------------------------- */

/* -errno, and what was found on the board. */
int bench_open (struct bench *bench);
void bench_connect (struct bench *bench, uint32_t remote);
void bench_connect_all (struct bench *bench);
/* Cleanly; and close it. */
void bench_stop (struct bench *bench);
/* Faults make these calls fail: an error ends the process, as a kill would. */
void bench_must (int rc);
/* Wait until each remote has a command that is not answered, or `over`. */
void bench_wait_outstanding (struct bench *bench, const atomic_bool *over);
/* Write the first bytes of the regions, and note the answer.  An error ends the
 * process, as a kill would.
 */
void bench_write (struct bench *bench, unsigned first, unsigned count,
                  uint8_t value);
/* No region reads as older than what was answered, unless both copies may have
 * lost it: then what is read first counts from then on. EIO is right where
 * local alone has a region and a start that could not use local has made it
 * failed.
 */
void bench_check_reads (struct bench *bench);
/* Copy until local is ok and every remote in sync; read all; stop. */
void bench_mend (struct bench *bench);
/* Open the volume with all its logs there again: no log was lost since `image`
 * was taken.
 */
void bench_open_and_mend (struct bench *bench);

/* --- in the parent, after that ----------------------------------------- */
void bench_check_disks (struct bench *bench);

#endif /* NBDM_INTERRUPTED_H */
