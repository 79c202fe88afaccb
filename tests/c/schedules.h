/* SPDX-License-Identifier: BSD-3-Clause */

/* Schedules of events around the local disk: a volume whose remotes are servers
 * inside the test (site.h), calls that wait in threads of their own, and gates
 * that stop a remote's flush or a fault point until the test opens them.  Each
 * schedule runs in a child process, as a process reads NBDM_FAULT once, and in
 * an empty folder, where its fault points find their files.
 */

#ifndef NBDM_SCHEDULES_H
#define NBDM_SCHEDULES_H

#include "api.h"
#include "site.h"

#define REGION 65536u    /* bytes; of the volume that bring_up makes */
#define SIZE (16u << 20) /* bytes; likewise */
#define SECTOR 512u      /* bytes that one read or write is long */

extern struct site site; /* of the schedule that runs */

struct schedule {
  const char *name;
  const char *fault; /* NBDM_FAULT, or NULL */
  void (*run) (void);
};

/* Run the schedule that the command line names, or all of them: the exit
 * status.
 */
int run_schedules (const struct schedule *schedules, size_t nr, int argc,
                   char *argv[]);

/* --- the volume -------------------------------------------------------- */

/* Create a volume that flushes only when a client or a copy needs it.  A
 * schedule may set site.peer before, and site.params before it opens the
 * volume.
 */
void make_volume (uint64_t size, uint32_t region_size, uint32_t nr_peers,
                  uint32_t hold_ms);
/* Open the volume, and bring every remote in sync. */
void open_volume (void);
/* Both. */
void bring_up (uint32_t nr_peers, uint32_t hold_ms);

struct nbdm_status volume_status (void);
struct nbdm_disk_status local_status (void);
/* Write one sector full of `value`: what the engine returned. */
int write_at (uint64_t offset, uint8_t value);
/* Read one sector: -errno, or the value of all its bytes. */
int read_at (uint64_t offset);
/* Cut the remote's connection, and wait until its hold is over. */
void lose (uint32_t remote);
/* Connect a remote at the address of another peer: what the engine returned. */
int connect_at (uint32_t remote, uint32_t peer);
/* Close the volume and open it again: a start after the end of the process. */
void open_again (void);
/* Write one sector full of `value`, on which local fails: a remote takes its
 * place.
 */
void write_and_fail_local (uint64_t offset, uint8_t value);
/* Attach and admit the local disk that has failed: the engine copies back to
 * it.
 */
void attach_and_admit (void);
/* Have the local disk lose a region: a hole is in its place. */
void punch_local (uint64_t offset);

/* --- a gate for the flushes of the first remote ------------------------ */

void shut_flush_gate (bool shut);
/* Wait until a flush stands at the gate. */
void wait_for_flush (void);

/* --- gates at fault points: POINT=wait:NAME ----------------------------- */

/* Wait until a thread stands at the gate. */
void wait_at (const char *gate);
void open_at (const char *gate);
/* Stand at the gate as a fault point does: for functions that a test wraps. */
void stand_at (const char *gate);
/* Those of the gate that is called "gate". */
void wait_at_gate (void);
void open_gate (void);

/* --- a call in a thread of its own ------------------------------------- */

struct job {
  pthread_t thread;
  int (*run) (struct job *job);
  uint64_t offset; /* of do_write, do_read and do_zero */
  uint8_t value;   /* that do_write writes */
  int rc;
  atomic_bool over;
};

void start (struct job *job, int (*run) (struct job *job));
/* Wait until the call is over: what it returned. */
int end (struct job *job);
/* Give the call time to end where it should not: whether it has. */
bool over_soon (const struct job *job);

int do_write (struct job *job);
int do_write_fua (struct job *job);
int do_read (struct job *job);
/* Zero one region. */
int do_zero (struct job *job);
int do_flush (struct job *job);
/* Attach the local disk that has failed. */
int do_attach (struct job *job);
int do_stop (struct job *job);
/* Copy back to local all that it misses, or about one copy. */
int do_copy_back (struct job *job);
int do_copy_back_one (struct job *job);
/* Resync the second remote, one copy at a time. */
int do_resync_second (struct job *job);

#endif /* NBDM_SCHEDULES_H */
