/* SPDX-License-Identifier: BSD-3-Clause */

/* Named fault points, so that a test stops or breaks the engine at one exact
 * place instead of hoping to hit it.
 *
 * The release build has them too, so that the tested program is the one that
 * runs; without NBDM_FAULT a point is one load and a branch.  An unknown word
 * in NBDM_FAULT ends the process, since a test whose fault never fires would
 * pass for the wrong reason.  So does a point that is not in the table below,
 * named in NBDM_FAULT or reached by the code.
 *
 *   NBDM_FAULT=POINT[:N]=ACTION[,...]
 *
 * ACTION is kill, wait:PATH or error[:ERRNO], as in error:ENOSPC; the default
 * is EIO.  With :N it happens only at the Nth time, else each time.
 */

#define _GNU_SOURCE

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "api.h"
#include "base/atomics.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/fault.h"

#define MAX_FAULTS 256 /* more than there are points */
#define WAIT_S 60
#define MAX_ERRNO 133
#define POLL_NS (10 * NS_PER_MS) /* how often a waiting point looks */

/* Every point, grouped by the operation that reaches it, and whether it can
 * fail: the step that it names then acts as if it had returned the error.
 */
struct point {
  const char *name;
  bool fails;
};

static const struct point points[] = {
  /* a write, trim or zero */
  { "range_granted", false },
  { "activity_staged", false },
  { "activity_write", true },
  { "activity_sync", true },
  { "activity_synced", false },
  { "after_mark", false },
  { "slot_reserved", false },
  { "after_log", false },
  { "after_issue", false },
  { "local_write", true },
  { "after_local", false },
  { "leg_answered", false },
  { "after_remote", false },
  { "before_retire", false },
  { "after_retire", false },
  { "before_answer", false },
  /* a flush, and FUA */
  { "flush_turned", false },
  { "flush_sent", false },
  { "local_flush", true },
  { "local_flushed", false },
  { "flush_answered", false },
  { "flush_landed", false },
  { "flush_before_answer", false },
  /* extents go cold */
  { "cool_picked", false },
  { "cool_flushed", false },
  { "cool_persisted", false },
  { "cool_voided", false },
  { "cool_dropped", false },
  { "cool_forgotten", false },
  /* a change of state */
  { "hold_lost", false },
  { "hold_resend", false },
  { "lost_stranded", false },
  { "lost_merged", false },
  { "degrade_marked", false },
  { "generation_new", false },
  { "node_stored", false },
  { "node_marked", false },
  { "node_cleared", false },
  { "session_doubted", false },
  { "session_lost", false },
  { "settle_in_sync", false },
  { "volume_failing", false },
  { "dirty_map_sync", true },
  { "dirty_map_synced", false },
  { "superblock_write", true },
  { "superblock_sync", true },
  { "superblock_synced", false },
  /* the policy threads' and the operator's */
  { "admitted", false },
  { "late_released", false },
  { "invalidate_marked", false },
  { "remote_failing", false },
  /* resync */
  { "resync_locked", false },
  { "local_read", true },
  { "resync_after_read", false },
  { "resync_after_send", false },
  { "resync_answered", false },
  { "resync_copied", false },
  { "resync_before_flush", false },
  { "resync_flush_begun", false },
  { "resync_before_clean", false },
  { "resync_after_clean", false },
  /* local fails, and is copied back */
  { "takeover_marked", false },
  { "takeover_taking_back", false },
  { "takeover_done", false },
  { "local_resync_after_read", false },
  { "local_resync_before_clean", false },
  /* a start */
  { "superblock_settle", true },
  { "superblock_settled", false },
  { "open_loaded", false },
  { "open_local_flushed", false },
  { "identity_checked", false },
  { "maps_renewed", false },
  { "maps_unsealed", false },
  { "takeover_undone", false },
  { "forget_persisted", false },
  { "log_set_aside", false },
  { "log_renewed", false },
  { "replay_marked", false },
  { "recover_lost", false },
  { "doubts_marked", false },
  { "open_recovered", false },
  { "activity_set_write", true },
  { "activity_set_sync", true },
  { "log_header_write", true },
  { "log_header_sync", true },
  { "begin_set", false },
  { "begin_slots", false },
  { "begin_maps", false },
  { "begin_names_sync", true },
  { "begin_superblock", false },
  { "doubts_generation", false },
  { "doubts_dirty", false },
  { "doubts_settled", false },
  { "open_begun", false },
  /* a stop */
  { "stop_drained", false },
  { "stop_flushed", false },
  { "stop_disconnected", false },
  { "sample_read", false },
  { "stop_sampled", false },
  { "stop_maps_finished", false },
  { "inflight_sync", true },
  { "stop_slots_finished", false },
  { "stop_set_finished", false },
  /* create, and a lost log made anew */
  { "create_erased", false },
  { "file_allocate", true },
  { "file_sync", true },
  { "file_rename", true },
  { "file_rename_sync", true },
  { "create_logs_made", false },
  /* the control of nodes, in Python */
  { "claim_judged", false },
  { "claim_stored", false },
  { "claim_fenced", false },
  { "claim_flushed", false },
  { "session_ended", false },
  { "begin_agreed", false },
  { "begin_stored", false },
  { "adopt_flushed", false },
  { "adopt_stored", false },
  { "adopt_cleared", false },
  { "consent_asked", false },
  { "consent_stored", false },
  { "meeting_epoch", false },
  { "meeting_agreed", false },
  { "claim_numbered", false },
  { "begin_marked", false },
  { "offer_stored", false },
  { "adopt_answered", false },
  { "settle_stored", false },
  { "promote_asked", false },
  { "promote_consented", false },
  { "promote_stored", false },
  { "promote_fenced", false },
  { "demote_drained", false },
  { "demote_stored", false },
  { "handover_met", false },
  { "handover_stored", false },
  { "token_sent", false },
  { "demotion_left", false },
  { "promotion_left", false },
  /* Nodes: a split brain is resolved. */
  { "resolve_begun", false },
  { "keep_written", false },
  { "keep_stored", false },
  { "chosen_stored", false },
  { "choice_answered", false },
  { "given_up_marked", false },
  { "given_up_stored", false },
};
#define NR_POINTS (sizeof points / sizeof points[0])

enum action { ACTION_KILL, ACTION_WAIT, ACTION_ERROR };

struct fault {
  const char *point;
  char *path; /* ACTION_WAIT */
  enum action action;
  int error;    /* ACTION_ERROR: -errno */
  uint64_t nth; /* 0: each time */
  atomic_u64 reached;
};

/* Written once, before `fault_count`; after that only `reached` changes. */
static struct fault faults[MAX_FAULTS];
atomic_int fault_count;

static void __attribute__ ((noreturn))
refuse (const char *word, const char *why)
{
  fprintf (stderr, "nbd_mirror: NBDM_FAULT: \"%s\": %s\n", word, why);
  exit (EXIT_FAILURE);
}

static const struct point *
find_point (const char *name)
{
  for (size_t i = 0; i < NR_POINTS; i++)
    if (strcmp (points[i].name, name) == 0)
      return &points[i];
  return NULL;
}

const char *
nbdm_fault_point (uint32_t index, int *fails)
{
  if (index >= NR_POINTS)
    return NULL;
  *fails = points[index].fails;
  return points[index].name;
}

int
nbdm_reach (const char *name)
{
  return fault_point (name);
}

static int
parse_errno (const char *name)
{
  for (int err = 1; err <= MAX_ERRNO; err++) {
    const char *known = strerrorname_np (err);

    if (known && strcmp (known, name) == 0)
      return -err;
  }
  refuse (name, "there is no such errno");
}

static void
parse_action (const char *action, const struct point *point,
              struct fault *fault)
{
  if (strcmp (action, "kill") == 0)
    fault->action = ACTION_KILL;
  else if (strncmp (action, "wait:", 5) == 0 && action[5]) {
    fault->action = ACTION_WAIT;
    fault->path = strdup (action + 5);
    if (fault->path == NULL)
      refuse (action, "out of memory");
  }
  else if (strcmp (action, "error") == 0
           || strncmp (action, "error:", 6) == 0) {
    if (!point->fails)
      refuse (point->name, "this point cannot be made to fail");
    fault->action = ACTION_ERROR;
    fault->error = action[5] ? parse_errno (action + 6) : -EIO;
  }
  else
    refuse (action, "the action is kill, wait:PATH or error[:ERRNO]");
}

/* Modifies `word`. */
static void
parse_fault (char *word, struct fault *fault)
{
  char *action = strchr (word, '=');
  const struct point *point;
  char *count, *end;

  if (action == NULL || action == word)
    refuse (word, "POINT[:N]=ACTION is asked for");
  *action++ = '\0';
  count = strchr (word, ':');
  if (count) {
    *count++ = '\0';
    fault->nth = strtoull (count, &end, 10);
    if (*count < '0' || *count > '9' || *end || fault->nth == 0)
      refuse (count, "N is a number from 1");
  }
  point = find_point (word);
  if (point == NULL)
    refuse (word, "there is no such point");
  fault->point = point->name;
  parse_action (action, point, fault);
}

static void
parse_all (void)
{
  const char *value = getenv ("NBDM_FAULT");
  char *copy, *word, *save;
  int n = 0;

  if (value == NULL || *value == '\0')
    return;
  copy = strdup (value);
  if (copy == NULL)
    refuse (value, "out of memory");
  for (word = strtok_r (copy, ",", &save); word;
       word = strtok_r (NULL, ",", &save)) {
    if (n == MAX_FAULTS)
      refuse (word, "too many faults");
    parse_fault (word, &faults[n++]);
  }
  free (copy);
  atomic_store (&fault_count, n);
}

void
fault_init (void)
{
  static pthread_once_t once = PTHREAD_ONCE_INIT;

  pthread_once (&once, parse_all);
}

/* The thread waits for a file and not for a signal or a pipe: the test is
 * another process, perhaps in another language, and may check at any time.  The
 * file PATH.reached grows by a byte each time a thread reaches the point.  So
 * if PATH exists beforehand, no thread waits and the file counts the arrivals.
 */
static void
wait_for (const char *path)
{
  uint64_t until_ns = now_ns () + WAIT_S * NS_PER_S;
  char reached[4096];
  int fd;

  snprintf (reached, sizeof reached, "%s.reached", path);
  fd = open (reached, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  if (fd == -1 || write (fd, "+", 1) != 1)
    refuse (reached, strerror (errno));
  close (fd);

  while (access (path, F_OK) == -1 && now_ns () < until_ns)
    sleep_ns (POLL_NS);
}

static int
act (const struct fault *fault)
{
  switch (fault->action) {
  case ACTION_KILL:
    /* Not abort: nothing may run after this point, not even a handler.  The
     * signal goes to the process, so this thread may run on for a moment.
     */
    kill (getpid (), SIGKILL);
    for (;;)
      pause ();
  case ACTION_WAIT:
    wait_for (fault->path);
    return 0;
  case ACTION_ERROR:
    return set_error (fault->error, "fault point %s", fault->point);
  }
  return 0;
}

int
fault_reached (const char *name)
{
  int n = atomic_load (&fault_count);
  uint64_t time = 0;
  int r = 0;

  if (find_point (name) == NULL)
    refuse (name, "the table of fault points does not have it");
  for (int i = 0; i < n; i++) {
    struct fault *fault = &faults[i];

    if (strcmp (fault->point, name) != 0)
      continue;
    /* One count for all faults of a point: threads that reach it together get
     * different numbers.
     */
    if (time == 0)
      time = atomic_fetch_add (&fault->reached, 1) + 1;
    if (fault->nth != 0 && fault->nth != time)
      continue;
    int err = act (fault);
    if (err < 0)
      r = err;
  }
  return r;
}
