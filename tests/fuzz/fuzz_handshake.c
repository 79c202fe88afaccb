/* SPDX-License-Identifier: BSD-3-Clause */

/* A client's bytes for the direct door, by libFuzzer: no other part of ours
 * talks to unknown programs.
 *
 * The input goes to the whole door over a unix socket, and not only to the
 * handshake: a thread per client costs a fraction of a millisecond, and the
 * test then also covers the memory of a session and its workers.
 *
 * The first byte says how to use the rest, so that a few bytes get far: as the
 * bytes of a client from the handshake on; as its bytes after a handshake; as
 * requests, each described by four bytes; or as options, each described by two.
 * For requests and options the expected answers are known: each must be
 * answered exactly once.  After any input, when the client closes its side, the
 * session must end.
 */

#define _GNU_SOURCE

#include "api.h"
#include "volume/volume.h"
#include "wire/protocol.h"
#include "../c/test.h"
#include "../c/door.h"
#include "../c/nbd_client.h"

#include <signal.h>

#define SIZE ((256u << 10) + 512u)
#define REGION 4096u
#define MAX_REQUESTS 40 /* and their answers, unread, do not fill a session */
#define REQUEST_SIZE 4  /* bytes of the input */
#define DEADLINE_S 15   /* less than libFuzzer's own */
#define LARGEST (96u << 10) /* bytes of a payload of ours */

enum meaning { FROM_THE_START, AFTER_HANDSHAKE, REQUESTS };
#define NR_MEANINGS 3 /* without OPTIONS, which has a bit of its own */
#define MEANS_OPTIONS 0x20
#define STRUCTURED 0x40
#define OLD_STYLE 0x80 /* NBD_OPT_EXPORT_NAME */

static struct folder folder;
static struct nbdm *volume;
static struct door served;
static const char *const door = served.address.sun_path; /* of its clients */
static uint8_t payload[LARGEST], taken[2 * SIZE];

int LLVMFuzzerInitialize (int *argc, char ***argv);
int LLVMFuzzerTestOneInput (const uint8_t *data, size_t size);
int __wrap_dprintf (int fd, const char *format, ...);

/* Drop the log: otherwise the output would consist of a line for each invalid
 * input.
 */
int
__wrap_dprintf (int fd, const char *format, ...)
{
  (void)fd;
  (void)format;
  return 0;
}

/* --- the door ------------------------------------------------------------- */

static void
take_down (void)
{
  char command[PATH_MAX + 16];

  door_close (&served);
  nbdm_stop (volume);
  nbdm_close (volume);
  close (folder.fd);
  snprintf (command, sizeof command, "rm -rf %s", folder.path);
  assert (system (command) == 0);
}

/* A remote that was never connected: writes go to local alone, at once. */
static void
make_volume (void)
{
  static char local[PATH_MAX + 8], state[PATH_MAX + 8];
  struct nbdm_params params = { .name = "test",
                                .local = local,
                                .state_dir = state,
                                .size = SIZE,
                                .region_size = REGION,
                                .policy = NBDM_DEGRADE,
                                .nr_remotes = 1 };
  int fd;

  params.remotes[0].name = "far";
  params.remotes[0].deadline_ms = 1000;
  snprintf (local, sizeof local, "%s/local", folder.path);
  snprintf (state, sizeof state, "%s/state", folder.path);
  fd = open (local, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  assert (fd >= 0 && ftruncate (fd, SIZE) == 0);
  close (fd);
  assert (mkdir (state, 0700) == 0);
  assert (nbdm_create (&params, 0) == 0);
  assert (nbdm_open (&params, &volume) == 0);
  assert (nbdm_start (volume) == 0);
}

int
LLVMFuzzerInitialize (int *argc, char ***argv)
{
  char path[64];

  (void)argc;
  (void)argv;
  folder = folder_make ();
  make_volume ();
  /* Short, whatever the folder's name. */
  snprintf (path, sizeof path, "/proc/self/fd/%d/door", folder.fd);
  door_open (&served, volume, path);
  atexit (take_down);
  return 0;
}

/* --- what is sent --------------------------------------------------------- */

static struct client
connect_to_door (const uint8_t *flags)
{
  const struct timeval deadline = { .tv_sec = DEADLINE_S };
  struct client c = client_connect (
      door, flags ? (uint32_t)(flags[0] | flags[1] << 8)
                  : NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);

  setsockopt (c.fd, SOL_SOCKET, SO_RCVTIMEO, &deadline, sizeof deadline);
  setsockopt (c.fd, SOL_SOCKET, SO_SNDTIMEO, &deadline, sizeof deadline);
  return c;
}

/* Into transmission, with all that can be agreed on if it is structured. */
static struct client
shake_hands (uint8_t first)
{
  static const uint8_t context[]
      = { 0,   0,   0,   0,   0,   0,   0,   1,   0,   0,   0,   15,  'b', 'a',
          's', 'e', ':', 'a', 'l', 'l', 'o', 'c', 'a', 't', 'i', 'o', 'n' };
  struct client c = connect_to_door (NULL);
  struct nbd_export export;

  if (first & STRUCTURED) {
    client_structure (&c);
    assert (client_ask (&c, NBD_OPT_SET_META_CONTEXT, context, sizeof context)
            == NBD_REP_ACK);
  }
  if (first & OLD_STYLE) {
    client_option (&c, NBD_OPT_EXPORT_NAME, NULL, 0);
    client_receive (&c, &export, sizeof export - sizeof export.zeroes);
  }
  else
    client_go (&c);
  return c;
}

/* The door closes when it has had enough, so not all may go. */
static void
send_some (const struct client *c, const uint8_t *bytes, size_t size)
{
  while (size > 0) {
    ssize_t n = send (c->fd, bytes, size, MSG_NOSIGNAL);

    if (n < 0 && errno == EINTR) /* libFuzzer's alarm */
      continue;
    if (n <= 0) {
      assert (errno == EPIPE || errno == ECONNRESET);
      return;
    }
    bytes += n;
    size -= (size_t)n;
  }
}

/* No more from us: what is left comes, and then the end. */
static void
drain (const struct client *c)
{
  ssize_t n;

  assert (shutdown (c->fd, SHUT_WR) == 0 || errno == ENOTCONN);
  do
    n = recv (c->fd, taken, sizeof taken, 0);
  while (n > 0 || (n < 0 && errno == EINTR));
  assert (n == 0 || errno == ECONNRESET);
}

/* --- requests ------------------------------------------------------------- */

struct asked {
  uint16_t type, flags;
  uint64_t offset;
  uint32_t length;
  bool answered;
};

static uint16_t
any_flags (uint8_t byte)
{
  return byte & 0x80 ? (uint16_t)(byte << 8) : byte & 0x1f;
}

static struct asked
read_request (const uint8_t *data)
{
  static const uint32_t lengths[]
      = { 4096,     512,        8192,     65536,    65536 + 512,
          LARGEST,  0,          1,        100,      SIZE,
          SIZE - 1, UINT32_MAX, SIZE + 1, SIZE / 2, NBDM_MAX_REQUEST + 1,
          1u << 31 };
  static const uint64_t offsets[]
      = { UINT64_MAX, UINT64_MAX - 511, SIZE, SIZE - 512, 1, INT64_MAX };
  struct asked asked = { .type = data[0] % 10, .flags = any_flags (data[1]) };

  if (asked.type == NBD_CMD_DISC)
    asked.type = UINT16_MAX;
  asked.length = lengths[data[2] % 16];
  if (asked.type == NBD_CMD_WRITE && asked.length > LARGEST)
    asked.length = LARGEST;
  asked.offset = data[2] & 0x80 ? offsets[data[3] % 6] : data[3] * REGION;
  asked.offset += (data[2] >> 4 & 7) * 73; /* sectors are not for all */
  return asked;
}

static void
take_answer (const struct client *c, struct asked *all, uint64_t nr)
{
  struct answer answer;
  struct asked *asked;
  bool simple;

  assert (client_answer (c, &answer, taken, sizeof taken, &simple));
  assert (answer.cookie < nr);
  asked = &all[answer.cookie];
  assert (!asked->answered);
  asked->answered = true;
  if (asked->type > NBD_CMD_BLOCK_STATUS)
    assert (answer.error == EINVAL);
  if (asked->type != NBD_CMD_READ || answer.error != 0)
    return;
  if (simple)
    assert (client_receive (c, taken, asked->length));
  else
    assert (answer.length == asked->length);
}

/* Four bytes each, and no leave taken: so each is answered. */
static void
send_requests (const struct client *c, const uint8_t *data, size_t size)
{
  struct asked all[MAX_REQUESTS];
  uint64_t nr = 0;

  for (; nr < MAX_REQUESTS && size >= REQUEST_SIZE; nr++) {
    struct asked *asked = &all[nr];

    *asked = read_request (data);
    client_request (c, asked->type, asked->flags, nr, asked->offset,
                    asked->length, payload);
    data += REQUEST_SIZE;
    size -= REQUEST_SIZE;
  }
  send_some (c, data, size % REQUEST_SIZE); /* less than one */
  for (uint64_t i = 0; i < nr; i++)
    take_answer (c, all, nr);
}

/* --- options -------------------------------------------------------------- */

/* Of any length, those included that are too long: each has its answer, and the
 * handshake goes on to transmission.
 */
static void
send_options (struct client *c, const uint8_t *data, size_t size)
{
  static const uint32_t lengths[]
      = { 0, 4, 6, 8, 100, 4096, 8192, 8193, 32768, LARGEST };
  static uint8_t content[LARGEST];

  for (int i = 0; i < MAX_REQUESTS && size >= 2; i++) {
    uint32_t option = data[0] % 14;

    if (option == NBD_OPT_EXPORT_NAME || option == NBD_OPT_ABORT)
      option = NBD_OPT_LIST;
    if (option == NBD_OPT_GO)
      option = NBD_OPT_INFO;
    memset (content, 0, 8);
    content[3 + data[0] % 5] = data[1] >> 4; /* of a name, or a count */
    client_ask (c, option, content, lengths[data[1] % 10]);
    c->structured = c->structured || option == NBD_OPT_STRUCTURED_REPLY;
    data += 2;
    size -= 2;
  }
  client_go (c);
}

static void
try_options (const uint8_t *data, size_t size)
{
  struct client c = connect_to_door (NULL);

  send_options (&c, data, size);
  drain (&c);
  client_close (&c);
}

int
LLVMFuzzerTestOneInput (const uint8_t *data, size_t size)
{
  enum meaning meaning;
  struct client c;

  if (size < 3)
    return 0;
  if (data[0] & MEANS_OPTIONS) {
    try_options (data + 1, size - 1);
    return 0;
  }
  meaning = data[0] % 0x20 % NR_MEANINGS;
  if (meaning == FROM_THE_START) {
    c = connect_to_door (data + 1);
    send_some (&c, data + 3, size - 3);
  }
  else {
    c = shake_hands (data[0]);
    if (meaning == REQUESTS)
      send_requests (&c, data + 1, size - 1);
    else
      send_some (&c, data + 1, size - 1);
  }
  drain (&c);
  client_close (&c);
  return 0;
}
