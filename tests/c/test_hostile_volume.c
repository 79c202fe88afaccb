/* SPDX-License-Identifier: BSD-3-Clause */

/* A volume whose remote is honest until it is in sync, and then breaks the
 * protocol, falls silent, or is slow. No client waits for ever.
 */

#define _GNU_SOURCE

#include "api.h"
#include "base/clock.h"
#include "villain.h"

#include <poll.h>
#include <stdatomic.h>
#include <time.h>

#define DEADLINE_MS 200u
#define LONG_MS 60000u

static atomic_bool over;

/* The server was honest so far; this is what it does with the first large
 * write.
 */
enum deed {
  EARLY_AND_DEAF, /* answers after its header, reads no more */
  DEAF,           /* reads no more, from its middle on */
  CLOSES,         /* in its middle */
  TWICE,          /* answers twice */
  BAD_MAGIC,
  HALF, /* half a header, and no more */
  MUTE,
  NR_DEEDS
};

#define VOLUME_SIZE (4u << 20)
#define LARGE (1u << 20)

static struct {
  int listener;
  atomic_uint slow_ms; /* for each 64 KiB of a read */
  atomic_bool mute;    /* no read is answered */
  atomic_uint deed;
  atomic_bool end;
  uint8_t image[VOLUME_SIZE];
} server;

/* Until the client goes. */
static void
say_no_more (int fd, bool read)
{
  uint8_t buf[4096];

  while (!server.end) {
    struct pollfd pfd = { .fd = fd, .events = read ? POLLIN : 0 };

    if (poll (&pfd, 1, 20) == 1
        && (!read || recv (fd, buf, sizeof buf, 0) <= 0))
      return;
  }
}

/* False: the connection is over. */
static bool
misbehave (int fd, enum deed deed, const struct wire_request *request)
{
  struct wire_reply reply
      = { .magic = htobe32 (REPLY_MAGIC), .cookie = request->cookie };
  static uint8_t buf[LARGE];
  uint32_t length = be32toh (request->length);

  assert (length <= LARGE); /* it may come in pieces */
  if (deed == EARLY_AND_DEAF)
    wire_transmit (fd, &reply, sizeof reply);
  else
    wire_receive (fd, buf,
                  deed == DEAF || deed == CLOSES ? length / 2 : length);
  if (deed == BAD_MAGIC)
    reply.magic ^= 1;
  if (deed == TWICE || deed == BAD_MAGIC)
    wire_transmit (fd, &reply, sizeof reply);
  if (deed == TWICE)
    wire_transmit (fd, &reply, sizeof reply);
  if (deed == HALF)
    wire_transmit (fd, &reply, sizeof reply / 2);
  if (deed != CLOSES)
    say_no_more (fd, deed != DEAF && deed != EARLY_AND_DEAF);
  return false;
}

static bool
serve_request (int fd)
{
  struct wire_request request;
  struct wire_reply reply = { .magic = htobe32 (REPLY_MAGIC) };
  uint64_t offset;
  uint32_t length;

  if (!wire_receive (fd, &request, sizeof request)
      || be16toh (request.type) == TYPE_DISCONNECT)
    return false;
  reply.cookie = request.cookie;
  offset = be64toh (request.offset);
  length = be32toh (request.length);
  assert (offset + length <= VOLUME_SIZE);
  switch (be16toh (request.type)) {
  case 0:
    if (server.mute) {
      say_no_more (fd, true);
      return false;
    }
    poll (NULL, 0, (int)(server.slow_ms * (length >> 16)));
    return wire_transmit (fd, &reply, sizeof reply)
           && wire_transmit (fd, server.image + offset, length);
  case 1:
    if (offset == LARGE && server.deed < NR_DEEDS)
      return misbehave (fd, server.deed, &request);
    if (!wire_receive (fd, server.image + offset, length))
      return false;
    break;
  case 6:
    memset (server.image + offset, 0, length);
  }
  return wire_transmit (fd, &reply, sizeof reply);
}

static void *
serve (void *opaque)
{
  int fd;

  (void)opaque;
  while ((fd = accept (server.listener, NULL, NULL)) >= 0) {
    if (wire_handshake (fd, VOLUME_SIZE, false))
      while (serve_request (fd))
        ;
    close (fd);
  }
  return NULL;
}

static void *
small_writes (void *opaque)
{
  struct nbdm *volume = opaque;
  uint8_t buf[4096] = { 7 };

  while (!over) {
    assert (nbdm_pwrite (volume, buf, sizeof buf, 3u << 20, 0) == 0);
    assert (nbdm_pread (volume, buf, sizeof buf, 3u << 20) == 0);
    assert (nbdm_flush (volume) == 0);
  }
  return NULL;
}

static struct nbdm_disk_status
status (struct nbdm *volume)
{
  struct nbdm_disk_status s;

  assert (nbdm_get_disk_status (volume, 1, &s) == 0);
  return s;
}

static void
into_sync (struct nbdm *volume, const char *uri)
{
  struct nbdm_resync batch = { .max_bytes = 16u << 20, .pace.depth = 4 };

  assert (nbdm_remote_connect (volume, 1, uri, 5000) == 0);
  assert (nbdm_disk_admit (volume, 1) == 0);
  assert (nbdm_remote_release_late (volume, 1) == 0);
  assert (nbdm_disk_resync (volume, 1, &batch) == 0);
  assert (status (volume).state == NBDM_IN_SYNC);
}

/* Clients get their answers, by policy, in time; the stop ends. */
static void
meet (struct nbdm *volume, enum deed deed)
{
  static uint8_t buf[LARGE];
  uint64_t start;
  pthread_t writer;

  over = false;
  memset (buf, (int)deed + 1, sizeof buf);
  assert (pthread_create (&writer, NULL, small_writes, volume) == 0);
  server.deed = deed;
  start = now_ns ();
  assert (nbdm_pwrite (volume, buf, sizeof buf, LARGE, 0) == 0);
  /* A write that was answered twice counts as answered; the commands after it
   * do not.
   */
  assert (nbdm_flush (volume) == 0);
  assert (now_ns () - start < 20 * DEADLINE_MS * UINT64_C (1000000));
  over = true;
  pthread_join (writer, NULL);
  assert (status (volume).state == NBDM_OUT_OF_SYNC);
  assert (strlen (status (volume).reason) > 0);
  start = now_ns ();
  assert (nbdm_stop (volume) == 0);
  assert (now_ns () - start < 20 * DEADLINE_MS * UINT64_C (1000000));
  server.deed = NR_DEEDS;
}

static void
make_volume (struct folder *folder, struct nbdm_params *params)
{
  static char local[PATH_MAX + 8], state[PATH_MAX + 8];
  int fd;

  snprintf (local, sizeof local, "%s/local", folder->path);
  snprintf (state, sizeof state, "%s/state", folder->path);
  *params = (struct nbdm_params){ .name = "test",
                                  .local = local,
                                  .state_dir = state,
                                  .size = VOLUME_SIZE,
                                  .region_size = 65536,
                                  .policy = NBDM_DEGRADE,
                                  .nr_remotes = 1 };
  params->remotes[0].name = "far";
  params->remotes[0].deadline_ms = DEADLINE_MS;
  fd = open (local, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  assert (fd >= 0 && ftruncate (fd, VOLUME_SIZE) == 0);
  close (fd);
  assert (mkdir (state, 0700) == 0);
  assert (nbdm_create (params, 0) == 0);
}

static void *
compare_in_vain (void *opaque)
{
  struct nbdm *volume = opaque;

  assert (nbdm_remote_compare (volume, 1, 0) < 0);
  return NULL;
}

/* No client waits for a comparison with a server that answers nothing. */
static void
compare_with_mute (struct nbdm_params *params, const char *uri)
{
  static const uint8_t buf[4096] = { 3 };
  struct nbdm *volume;
  pthread_t thread;
  uint64_t start;

  params->remotes[0].deadline_ms = 10 * DEADLINE_MS;
  assert (nbdm_open (params, &volume) == 0 && nbdm_start (volume) == 0);
  into_sync (volume, uri); /* or there is nothing to compare */
  assert (nbdm_stop (volume) == 0);
  nbdm_close (volume);
  assert (nbdm_open (params, &volume) == 0 && nbdm_start (volume) == 0);
  server.mute = true;
  assert (nbdm_remote_connect (volume, 1, uri, 5000) == 0);
  assert (pthread_create (&thread, NULL, compare_in_vain, volume) == 0);
  for (unsigned ms = 0; status (volume).remote.outstanding == 0; ms++) {
    assert (ms < PATIENCE_MS);
    poll (NULL, 0, 1);
  }
  start = now_ns ();
  assert (nbdm_pwrite (volume, buf, sizeof buf, 0, 0) == 0);
  assert (now_ns () - start < 5 * DEADLINE_MS * UINT64_C (1000000));
  pthread_join (thread, NULL);
  server.mute = false;
  assert (nbdm_stop (volume) == 0);
  nbdm_close (volume);
  params->remotes[0].deadline_ms = DEADLINE_MS;
}

static struct nbdm *poisoned;

/* As its keeper does. */
static void *
connect_again (void *uri)
{
  while (!over) {
    if (!status (poisoned).remote.connected
        && nbdm_remote_connect (poisoned, 1, uri, 5000) == 0)
      nbdm_disk_admit (poisoned, 1);
    poll (NULL, 0, 5);
  }
  return NULL;
}

static void *
write_poison (void *opaque)
{
  static const uint8_t buf[LARGE] = { 1 };
  struct waiting *w = opaque;

  assert (nbdm_pwrite (poisoned, buf, sizeof buf, LARGE, 0) == -EIO);
  w->over = true;
  return NULL;
}

/* Local has failed, and the server, which alone has the range, dies of each
 * write to it: the client gets an error, and its other writes are answered.
 */
static void
meet_poison (struct nbdm_params *params, char *uri)
{
  static const uint8_t buf[4096] = { 2 };
  struct waiting w = { .over = false };
  struct nbdm_disk_status s = { .state = NBDM_LOCAL_OK };
  pthread_t keeper;

  params->hold_ms = 2 * PATIENCE_MS;
  assert (nbdm_open (params, &poisoned) == 0 && nbdm_start (poisoned) == 0);
  into_sync (poisoned, uri);
  assert (truncate (params->local, 4096) == 0);
  while (s.state != NBDM_LOCAL_FAILED) {
    assert (nbdm_pwrite (poisoned, buf, sizeof buf, 8192, 0) == 0);
    assert (nbdm_get_disk_status (poisoned, NBDM_LOCAL, &s) == 0);
  }
  over = false;
  server.deed = CLOSES;
  assert (pthread_create (&keeper, NULL, connect_again, uri) == 0);
  assert (pthread_create (&w.thread, NULL, write_poison, &w) == 0);
  assert_over (&w);
  server.deed = NR_DEEDS;
  assert (nbdm_pwrite (poisoned, buf, sizeof buf, LARGE, 0) == 0);
  assert (nbdm_flush (poisoned) == 0);
  assert (status (poisoned).state == NBDM_IN_SYNC);
  over = true;
  pthread_join (keeper, NULL);
  assert (nbdm_stop (poisoned) == 0);
  nbdm_close (poisoned);
  params->hold_ms = 0;
  assert (truncate (params->local, VOLUME_SIZE) == 0);
}

/* The range that a comparison holds is not held for as long as a slow link
 * needs.
 */
static void
compare_slowly (struct nbdm_params *params, const char *uri)
{
  char command[PATH_MAX + 16];
  uint64_t start;
  struct nbdm *volume;

  snprintf (command, sizeof command, "rm %s/*", params->state_dir);
  assert (system (command) == 0);
  params->region_size = VOLUME_SIZE;
  params->remotes[0].deadline_ms = LONG_MS;
  assert (nbdm_create (params, 0) == 0);
  assert (nbdm_open (params, &volume) == 0 && nbdm_start (volume) == 0);
  into_sync (volume, uri);
  server.slow_ms = 200; /* all of it would take 13 s */
  start = now_ns ();
  assert (nbdm_remote_compare (volume, 1, 0) == 0);
  assert (now_ns () - start < 4000 * UINT64_C (1000000));
  server.slow_ms = 2000; /* 256 kbit/s */
  start = now_ns ();
  assert (nbdm_remote_compare (volume, 1, 0) == 0);
  assert (now_ns () - start < 4000 * UINT64_C (1000000));
  server.slow_ms = 200;
  server.image[100000] ^= 1; /* it is in what is compared */
  assert (nbdm_remote_compare (volume, 1, 0) == 1);
  server.image[100000] ^= 1;
  server.slow_ms = 0;
  assert (nbdm_stop (volume) == 0);
  nbdm_close (volume);
}

static void
test_volume (void)
{
  struct sockaddr_un address = { .sun_family = AF_UNIX };
  struct folder folder = folder_make ();
  struct nbdm_params params;
  struct nbdm *volume;
  pthread_t thread;
  char command[PATH_MAX + 16], uri[160];

  make_volume (&folder, &params);
  snprintf (address.sun_path, sizeof address.sun_path, "/tmp/nbdm-hostile.%d",
            getpid ());
  snprintf (uri, sizeof uri, "nbd+unix:///?socket=%s", address.sun_path);
  server.deed = NR_DEEDS;
  server.listener = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  assert (bind (server.listener, (struct sockaddr *)&address, sizeof address)
          == 0);
  assert (listen (server.listener, 8) == 0);
  assert (pthread_create (&thread, NULL, serve, NULL) == 0);
  for (enum deed deed = 0; deed < NR_DEEDS; deed++) {
    assert (nbdm_open (&params, &volume) == 0);
    assert (nbdm_start (volume) == 0);
    into_sync (volume, uri);
    meet (volume, deed);
    nbdm_close (volume);
  }
  compare_with_mute (&params, uri);
  meet_poison (&params, uri);
  compare_slowly (&params, uri);
  server.end = true;
  shutdown (server.listener, SHUT_RDWR);
  pthread_join (thread, NULL);
  close (server.listener);
  unlink (address.sun_path);
  close (folder.fd);
  snprintf (command, sizeof command, "rm -rf %s", folder.path);
  assert (system (command) == 0);
}

int
main (void)
{
  alarm (150); /* nothing here may hang */
  RUN (test_volume);
  return 0;
}
