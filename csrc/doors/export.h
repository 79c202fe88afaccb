/* SPDX-License-Identifier: BSD-3-Clause */

/* What a door serves; see export.c. */

#ifndef NBDM_EXPORT_H
#define NBDM_EXPORT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/queue.h>

#include "executor/executor.h"

#define EXPORT_NAME_LEN 4096u /* bytes at most, as the protocol has it */

struct exported {
  const char *name;         /* "": it has none */
  uint64_t size;            /* bytes */
  bool read_only;           /* clients may not change it */
  struct executor executor; /* what serves it */
  TAILQ_ENTRY (exported) entry;
};

/* The first is the default. */
TAILQ_HEAD (exports, exported);

/* -ENOMEM or -EINVAL with a message.  The name must live as long as the list.
 */
int exports_add (struct exports *exports, const char *name, struct nbdm *volume,
                 bool read_only);
/* That of the name, or else the default. */
struct exported *exports_find (const struct exports *exports, const void *name,
                               size_t length);
/* As executor_start and executor_end, of all of them. */
int exports_start (struct exports *exports);
void exports_end (struct exports *exports);
void exports_free (struct exports *exports);

#endif /* NBDM_EXPORT_H */
