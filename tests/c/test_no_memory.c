/* SPDX-License-Identifier: BSD-3-Clause */

/* Out of memory: a write must not need any, because the kernel may need this
 * write to free memory.  The test replaces the allocator, so it is built
 * without the address sanitizer.
 *
 * The engine's own code must not even try to allocate.  libnbd allocates for
 * each command; if that fails, the remote is lost, and the disk continues
 * without it.
 */

#include "api.h"
#include "base/error.h"
#include "base/file.h"
#include "site.h"

#include <stdatomic.h>

#define REGION 65536u
#define EXTENTS 80u
#define SIZE ((uint64_t)EXTENTS * EXTENT_SIZE)

/* --- the allocator --------------------------------------------------- */

void *__libc_malloc (size_t size);
void *__libc_calloc (size_t count, size_t size);
void *__libc_realloc (void *p, size_t size);

extern char __executable_start, etext;

enum refuse {
  REFUSE_NOBODY,
  REFUSE_ENGINE, /* what is linked into this program */
  REFUSE_ALL     /* libnbd and the C library as well */
};

static _Atomic enum refuse refuse;
static atomic_uint refused;

/* The servers in this program are another machine's. */
static bool
refused_to (const char *caller)
{
  if (refuse == REFUSE_NOBODY || peer_thread)
    return false;
  if (refuse == REFUSE_ENGINE
      && (caller < &__executable_start || caller > &etext))
    return false;
  refused++;
  errno = ENOMEM;
  return true;
}

void *
malloc (size_t size)
{
  return refused_to (__builtin_return_address (0)) ? NULL
                                                   : __libc_malloc (size);
}

void *
calloc (size_t count, size_t size)
{
  return refused_to (__builtin_return_address (0))
             ? NULL
             : __libc_calloc (count, size);
}

void *
realloc (void *p, size_t size)
{
  return refused_to (__builtin_return_address (0)) ? NULL
                                                   : __libc_realloc (p, size);
}

/* --- tests ----------------------------------------------------------- */

static struct site site;

static void
begin (void)
{
  site = (struct site){
    .size = SIZE, .region_size = REGION, .hold_ms = 20, .nr_peers = 1, .seed = 1
  };
  site_make (&site);
  site_open (&site);
  site_connect (&site, 0);
  site_resync_to_end (&site, 0);
}

/* In sync again, and both the same. */
static void
end (void)
{
  uint8_t *local = __libc_malloc (SIZE);
  int fd = open (site.local, O_RDONLY | O_CLOEXEC);

  refuse = REFUSE_NOBODY;
  if (site_status (&site, 0).state != NBDM_IN_SYNC) {
    site_connect (&site, 0);
    site_resync_to_end (&site, 0);
  }
  assert (full_pread (fd, local, SIZE, 0) == 0);
  assert (memcmp (local, peer_image (site.peers[0]), SIZE) == 0);
  close (fd);
  free (local);
  site_end (&site);
}

/* All kinds of requests, to `count` extents from `first` on. */
static void
requests (unsigned first, unsigned count)
{
  static uint8_t buf[2 * REGION], read[sizeof buf];

  memset (buf, (int)first + 1, sizeof buf);
  for (unsigned i = first; i < first + count; i++) {
    uint64_t offset = (uint64_t)i * EXTENT_SIZE;

    assert (nbdm_pwrite (site.volume, buf, sizeof buf, offset, 0) == 0);
    assert (nbdm_pwrite (site.volume, buf, 512, offset + REGION, NBDM_FUA)
            == 0);
    assert (nbdm_pread (site.volume, read, sizeof read, offset) == 0);
    assert (memcmp (buf, read, sizeof buf) == 0);
    assert (nbdm_trim (site.volume, 4096, offset + 4096, 0) == 0);
    assert (nbdm_zero (site.volume, REGION, offset + 4 * REGION, 0) == 0);
  }
  assert (nbdm_flush (site.volume) == 0);
}

/* Extents that are active, new ones, and those let go: without asking. */
static void
test_engine_asks_for_none (void)
{
  begin ();
  requests (0, 4);
  refuse = REFUSE_ENGINE;
  requests (0, 4);
  requests (4, EXTENTS - 4); /* into the second sector of the log */
  assert (nbdm_cool (site.volume, 0) == 0);
  requests (0, EXTENTS);
  assert (refused == 0);
  assert (site_status (&site, 0).state == NBDM_IN_SYNC);
  end ();
}

static void
test_engine_degrades_without (void)
{
  begin ();
  requests (0, 2);
  refuse = REFUSE_ENGINE;
  peer_cut (site.peers[0], false);
  requests (0, 8);
  assert (refused == 0);
  assert (site_status (&site, 0).state == NBDM_OUT_OF_SYNC);
  end ();
}

/* Neither do commands over a plain socket. */
static void
test_plain_transport_asks_for_none (void)
{
  begin ();
  requests (0, 2);
  refuse = REFUSE_ALL;
  requests (0, 8);
  assert (refused == 0);
  assert (site_status (&site, 0).state == NBDM_IN_SYNC);
  end ();
}

/* libnbd cannot send: that remote is lost, and nothing else. */
static void
test_remote_is_lost_when_libnbd_gets_none (void)
{
  setenv ("NBDM_TRANSPORT", "libnbd", 1);
  begin ();
  unsetenv ("NBDM_TRANSPORT");
  requests (0, 2);
  refuse = REFUSE_ALL;
  requests (0, 8);
  assert (refused > 0);
  assert (site_status (&site, 0).state == NBDM_OUT_OF_SYNC);
  assert (site_status (&site, 0).dirty_regions > 0);
  end ();
}

/* A resync needs memory: it says so, clears nothing, and goes on later. */
static void
test_resync_waits_for_memory (void)
{
  struct nbdm_resync batch = { .max_bytes = 1u << 20, .pace.depth = 4 };
  uint64_t dirty;

  begin ();
  assert (nbdm_remote_invalidate (site.volume, 1) == 0);
  dirty = site_status (&site, 0).dirty_regions;
  refuse = REFUSE_ENGINE;
  assert (nbdm_disk_resync (site.volume, 1, &batch) == -ENOMEM);
  assert (site_status (&site, 0).dirty_regions == dirty);
  requests (0, 4);
  refuse = REFUSE_NOBODY;
  site_resync_to_end (&site, 0);
  end ();
}

/* More threads than there are spares, one after the other. */
#define NR_THREADS 100

static void *
fail (void *unused)
{
  (void)unused;
  assert (strcmp (last_error (), "") == 0);
  refuse = REFUSE_ENGINE;
  assert (set_error (-ENOMEM, "a %s", "buffer") == -ENOMEM);
  assert (strcmp (last_error (), "a buffer: Cannot allocate memory") == 0);
  clear_error ();
  assert (strcmp (last_error (), "") == 0);
  refuse = REFUSE_NOBODY;
  return NULL;
}

/* A thread whose first error is that there is no memory has its message. */
static void
test_error_has_its_message (void)
{
  for (unsigned i = 0; i < NR_THREADS; i++) {
    pthread_t thread;

    assert (pthread_create (&thread, NULL, fail, NULL) == 0);
    pthread_join (thread, NULL);
  }
}

int
main (void)
{
  alarm (100); /* nothing here may hang */
  RUN (test_engine_asks_for_none);
  RUN (test_engine_degrades_without);
  RUN (test_plain_transport_asks_for_none);
  refused = 0;
  RUN (test_remote_is_lost_when_libnbd_gets_none);
  refused = 0;
  RUN (test_resync_waits_for_memory);
  RUN (test_error_has_its_message);
  return 0;
}
