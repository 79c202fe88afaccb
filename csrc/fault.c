/* SPDX-License-Identifier: BSD-3-Clause */

/* Named fault points, so that a test stops or breaks the engine at one exact
 * place instead of hoping to hit it.
 *
 * They are in the release build too: what was tested is what runs, and
 * without NBDM_FAULT a point is one load and a branch.  A word of NBDM_FAULT
 * that is not understood ends the process, for a test whose fault never fires
 * would pass for the wrong reason.
 *
 *   NBDM_FAULT=POINT[:N]=ACTION[,...]
 *
 * ACTION is kill, wait:PATH or error.  With :N it happens at the Nth time
 * only, else each time.
 */

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

#define MAX_FAULTS 16
#define WAIT_S 60
#define POLL_NS 10000000 /* 10 ms: how often a waiting point looks */

enum action { ACTION_KILL, ACTION_WAIT, ACTION_ERROR };

struct fault {
  const char *point;
  const char *path; /* ACTION_WAIT */
  enum action action;
  uint64_t nth; /* 0: each time */
  atomic_u64 reached;
};

/* Written once, before `nr_faults`, then only read, but for `reached`. */
static struct fault faults[MAX_FAULTS];
static _Atomic int nr_faults;

static void __attribute__ ((noreturn))
refuse (const char *word, const char *why)
{
  fprintf (stderr, "nbd_mirror: NBDM_FAULT: \"%s\": %s\n", word, why);
  exit (EXIT_FAILURE);
}

/* Cuts `word` up: the parts stay in use. */
static void
parse_fault (char *word, struct fault *fault)
{
  char *action = strchr (word, '=');
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
  fault->point = word;
  if (strcmp (action, "kill") == 0)
    fault->action = ACTION_KILL;
  else if (strcmp (action, "error") == 0)
    fault->action = ACTION_ERROR;
  else if (strncmp (action, "wait:", 5) == 0 && action[5]) {
    fault->action = ACTION_WAIT;
    fault->path = action + 5;
  }
  else
    refuse (action, "the action is kill, wait:PATH or error");
}

static void
parse_all (void)
{
  const char *value = getenv ("NBDM_FAULT");
  char *copy, *word, *save;
  int n = 0;

  if (value == NULL || *value == '\0')
    return;
  copy = strdup (value); /* never freed: the faults point into it */
  if (copy == NULL)
    refuse (value, "out of memory");
  for (word = strtok_r (copy, ",", &save); word;
       word = strtok_r (NULL, ",", &save)) {
    if (n == MAX_FAULTS)
      refuse (word, "too many faults");
    parse_fault (word, &faults[n++]);
  }
  atomic_store (&nr_faults, n);
}

void
fault_init (void)
{
  static pthread_once_t once = PTHREAD_ONCE_INIT;

  pthread_once (&once, parse_all);
}

/* A file and not a signal or a pipe: the test is in another process, perhaps
 * in another language, and may come to look at any time.
 */
static void
wait_for (const char *path)
{
  const struct timespec step = { .tv_nsec = POLL_NS };
  char reached[4096];
  struct timespec now;
  time_t until;
  int fd;

  snprintf (reached, sizeof reached, "%s.reached", path);
  fd = open (reached, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
  if (fd == -1)
    refuse (reached, strerror (errno));
  close (fd);

  clock_gettime (CLOCK_MONOTONIC, &now);
  until = now.tv_sec + WAIT_S;
  while (access (path, F_OK) == -1 && now.tv_sec < until) {
    nanosleep (&step, NULL);
    clock_gettime (CLOCK_MONOTONIC, &now);
  }
}

static int
act (const struct fault *fault)
{
  switch (fault->action) {
  case ACTION_KILL:
    /* Not abort: nothing may run after this point, no handler either.  The
     * signal is for the process, and this thread may go on for a moment.
     */
    kill (getpid (), SIGKILL);
    for (;;)
      pause ();
  case ACTION_WAIT:
    wait_for (fault->path);
    return 0;
  case ACTION_ERROR:
    return set_error (-EIO, "fault point %s", fault->point);
  }
  return 0;
}

int
fault_point (const char *name)
{
  int n = atomic_load_explicit (&nr_faults, memory_order_acquire);
  int r = 0;

  for (int i = 0; i < n; i++) {
    struct fault *fault = &faults[i];

    if (strcmp (fault->point, name) != 0)
      continue;
    uint64_t time = atomic_fetch_add (&fault->reached, 1) + 1;
    if (fault->nth != 0 && fault->nth != time)
      continue;
    int err = act (fault);
    if (err < 0)
      r = err;
  }
  return r;
}
