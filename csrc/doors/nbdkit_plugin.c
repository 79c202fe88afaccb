/* SPDX-License-Identifier: BSD-3-Clause */

/* The native door: nbdkit's callbacks, straight to the engine.
 *
 * A request is one C call and never meets Python.  Python lives in the same
 * process, embedded by CFFI (door.h): it opens the volume before any fork,
 * runs the policy threads beside the requests, and stops at the end.
 *
 * A connection has no state: every connection sees the same volume, and a flush
 * on one covers the answered writes of all, so multi-conn is truthful.
 */

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include "api.h"
#include "doors/door.h"
#include "volume/volume.h"

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL

#define MAX_EXTENTS 512 /* in one answer; a client asks again for more */

/* Both are set before the first client, and are only read from then on. */
static char *config_path;
static struct nbdm *volume;

/* Give the client the errno and nbdkit's log the message, once.  A refused fast
 * zero is an answer and no error, so it is not logged.
 */
static int
answer (int rc)
{
  if (rc >= 0)
    return 0;
  nbdkit_set_error (-rc);
  if (rc != -EOPNOTSUPP)
    nbdkit_error ("%s", nbdm_last_error ());
  return -1;
}

static uint32_t
flags_of (uint32_t flags)
{
  return (flags & NBDKIT_FLAG_FUA ? NBDM_FUA : 0)
         | (flags & NBDKIT_FLAG_MAY_TRIM ? NBDM_MAY_TRIM : 0)
         | (flags & NBDKIT_FLAG_FAST_ZERO ? NBDM_FAST_ZERO : 0);
}

static int
door_config (const char *key, const char *value)
{
  if (strcmp (key, "config") != 0) {
    nbdkit_error ("unknown parameter %s: only config=FILE is known", key);
    return -1;
  }
  free (config_path);
  config_path = nbdkit_absolute_path (value);
  return config_path ? 0 : -1;
}

/* nbdkit inherits its sockets, and then asks the kernel to end it with its
 * parent.  Our parent is a command that returns to the shell, perhaps while a
 * start still recovers.  So undo that first, on the main thread, which the
 * kernel would signal.
 */
static void
door_load (void)
{
  (void)prctl (PR_SET_PDEATHSIG, 0, 0, 0, 0);
}

static int
door_config_complete (void)
{
  if (config_path)
    return 0;
  nbdkit_error ("config=FILE is needed: the volume's configuration");
  return -1;
}

#define DOOR_CONFIG_HELP "config=FILE   (required) The volume's configuration."

static int
door_get_ready (void)
{
  volume = nbdm_door_open (config_path, nbdkit_shutdown);
  if (volume)
    return 0;
  nbdkit_error ("the control part in Python could not be started");
  return -1;
}

static int
door_after_fork (void)
{
  nbdm_door_start ();
  return 0;
}

static void
door_cleanup (void)
{
  if (volume)
    nbdm_door_stop ();
  volume = NULL;
}

static void
door_unload (void)
{
  free (config_path);
}

static void *
door_open (int readonly)
{
  (void)readonly;
  nbdm_count_client (volume, +1);
  return NBDKIT_HANDLE_NOT_NEEDED;
}

static void
door_close (void *handle)
{
  (void)handle;
  nbdm_count_client (volume, -1);
}

static const char *
door_export_description (void *handle)
{
  char words[NBDM_CHAIN_LEN];

  (void)handle;
  nbdm_chain (volume, words, sizeof words);
  return nbdkit_strdup_intern (words);
}

static int64_t
door_get_size (void *handle)
{
  struct nbdm_status status;

  (void)handle;
  nbdm_get_status (volume, &status);
  return (int64_t)status.size;
}

static int
door_block_size (void *handle, uint32_t *minimum, uint32_t *preferred,
                 uint32_t *maximum)
{
  (void)handle;
  *minimum = nbdm_min_block (volume);
  *preferred = NBDM_PREFERRED_BLOCK;
  *maximum = NBDM_MAX_REQUEST;
  return 0;
}

static int
yes (void *handle)
{
  (void)handle;
  return 1;
}

static int
no (void *handle)
{
  (void)handle;
  return 0;
}

static int
fua_native (void *handle)
{
  (void)handle;
  return NBDKIT_FUA_NATIVE;
}

static int
cache_native (void *handle)
{
  (void)handle;
  return NBDKIT_CACHE_NATIVE;
}

static int
door_pread (void *handle, void *buf, uint32_t count, uint64_t offset,
            uint32_t flags)
{
  (void)handle;
  (void)flags;
  return answer (nbdm_pread (volume, buf, count, offset));
}

static int
door_pwrite (void *handle, const void *buf, uint32_t count, uint64_t offset,
             uint32_t flags)
{
  (void)handle;
  return answer (nbdm_pwrite (volume, buf, count, offset, flags_of (flags)));
}

static int
door_flush (void *handle, uint32_t flags)
{
  (void)handle;
  (void)flags;
  return answer (nbdm_flush (volume));
}

static int
door_trim (void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
  (void)handle;
  return answer (nbdm_trim (volume, count, offset, flags_of (flags)));
}

static int
door_zero (void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
  (void)handle;
  return answer (nbdm_zero (volume, count, offset, flags_of (flags)));
}

static int
door_cache (void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
  (void)handle;
  (void)flags;
  return answer (nbdm_cache (volume, count, offset));
}

static int
door_extents (void *handle, uint32_t count, uint64_t offset, uint32_t flags,
              struct nbdkit_extents *extents)
{
  struct nbdm_extent found[MAX_EXTENTS];
  uint32_t max = flags & NBDKIT_FLAG_REQ_ONE ? 1 : MAX_EXTENTS;
  int nr = nbdm_extents (volume, count, offset, found, max);

  (void)handle;
  for (int i = 0; i < nr; i++)
    if (nbdkit_add_extent (extents, found[i].offset, found[i].length,
                           found[i].type)
        == -1)
      return -1;
  return answer (nr);
}

static struct nbdkit_plugin plugin = {
  .name = "nbd-mirror",
  .longname = "nbd_mirror, a disk mirror over NBD",
  .description = "mirrors every write to a local and to remote disks",
  .load = door_load,
  .unload = door_unload,
  .config = door_config,
  .config_complete = door_config_complete,
  .config_help = DOOR_CONFIG_HELP,
  .get_ready = door_get_ready,
  .after_fork = door_after_fork,
  .cleanup = door_cleanup,
  .open = door_open,
  .close = door_close,
  .export_description = door_export_description,
  .get_size = door_get_size,
  .block_size = door_block_size,
  .can_write = yes,
  .can_flush = yes,
  .can_trim = yes,
  .can_zero = yes,
  .can_fast_zero = yes,
  .can_extents = yes,
  .can_multi_conn = yes,
  .is_rotational = no,
  .can_fua = fua_native,
  .can_cache = cache_native,
  .pread = door_pread,
  .pwrite = door_pwrite,
  .flush = door_flush,
  .trim = door_trim,
  .zero = door_zero,
  .cache = door_cache,
  .extents = door_extents,
};

NBDKIT_REGISTER_PLUGIN (plugin)
