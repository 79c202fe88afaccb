/* SPDX-License-Identifier: BSD-3-Clause */

/* The list of exports, between a door's handshake and the executors.
 *
 * Each export has its own executor: a volume that waits delays no request of
 * another.  A name that is not in the list means the default, as clients of a
 * server with one export may give any name.
 */

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "doors/export.h"
#include "volume/volume.h"

int
exports_add (struct exports *exports, const char *name, struct nbdm *v,
             bool read_only)
{
  struct exported *e;

  if (strlen (name) > EXPORT_NAME_LEN)
    return set_error (-EINVAL, "an export's name has %u bytes at most",
                      EXPORT_NAME_LEN);
  e = calloc (1, sizeof *e);
  if (e == NULL)
    return set_error (-ENOMEM, "the export \"%s\"", name);
  e->name = name;
  e->size = v->size;
  e->read_only = read_only;
  executor_init (&e->executor, v);
  TAILQ_INSERT_TAIL (exports, e, entry);
  return 0;
}

struct exported *
exports_find (const struct exports *exports, const void *name, size_t length)
{
  struct exported *e;

  TAILQ_FOREACH (e, exports, entry)
    if (strlen (e->name) == length && memcmp (e->name, name, length) == 0)
      return e;
  return TAILQ_FIRST (exports);
}

int
exports_start (struct exports *exports)
{
  struct exported *e;
  int rc = 0;

  TAILQ_FOREACH (e, exports, entry)
    if (rc == 0)
      rc = executor_start (&e->executor);
  return rc;
}

void
exports_end (struct exports *exports)
{
  struct exported *e;

  TAILQ_FOREACH (e, exports, entry)
    executor_end (&e->executor);
}

void
exports_free (struct exports *exports)
{
  struct exported *e;

  while ((e = TAILQ_FIRST (exports))) {
    TAILQ_REMOVE (exports, e, entry);
    executor_destroy (&e->executor);
    free (e);
  }
}
