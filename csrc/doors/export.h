/* SPDX-License-Identifier: BSD-3-Clause */

/* The exports of a door; see export.c. */

#ifndef NBDM_EXPORT_H
#define NBDM_EXPORT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/queue.h>

#include "executor/executor.h"

#define EXPORT_NAME_LEN 4096u /* bytes at most, as in the protocol */

struct exported {
  const char *name;         /* "": no name */
  uint64_t size;            /* bytes */
  bool read_only;           /* clients may not change it */
  struct executor executor; /* carries out its requests */
  TAILQ_ENTRY (exported) entry;
};

/* The first is the default. */
TAILQ_HEAD (exports, exported);

/* -ENOMEM or -EINVAL with a message.  The name must live as long as the list.
 */
int exports_add (struct exports *exports, const char *name, struct nbdm *volume,
                 bool read_only);
/* The export of that name, or else the default. */
struct exported *exports_find (const struct exports *exports, const void *name,
                               size_t length);
/* As executor_start and executor_end, for all exports. */
int exports_start (struct exports *exports);
void exports_end (struct exports *exports);
void exports_free (struct exports *exports);

#endif /* NBDM_EXPORT_H */
