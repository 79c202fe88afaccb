/* SPDX-License-Identifier: BSD-3-Clause */

/* Wait for a server by more than the name of its socket. */

#ifndef NBDM_TEST_LISTENING_H
#define NBDM_TEST_LISTENING_H

#undef NDEBUG
#include <assert.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#define ACCEPTS_CONNECTIONS 0x10000ul /* the kernel's __SO_ACCEPTCON */

/* Whether a server listens on this unix socket.  Its name exists from bind ()
 * on, and the kernel refuses connections until listen ().
 */
static inline bool
unix_listens (const char *path)
{
  FILE *file = fopen ("/proc/net/unix", "re");
  char line[512];
  bool found = false;

  assert (file);
  while (!found && fgets (line, sizeof line, file)) {
    unsigned long flags;
    int name = 0;

    line[strcspn (line, "\n")] = '\0';
    if (sscanf (line, "%*s %*s %*s %lx %*s %*s %*s %n", &flags, &name) == 1
        && name > 0)
      found = (flags & ACCEPTS_CONNECTIONS) && strcmp (line + name, path) == 0;
  }
  fclose (file);
  return found;
}

#endif /* NBDM_TEST_LISTENING_H */
