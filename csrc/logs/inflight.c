/* SPDX-License-Identifier: BSD-3-Clause */

/* The in-flight log: exact ranges of the requests under way.
 *
 * It serves a start after a killed process, where the page cache survived:
 * every store into the shared mapping is still there, and a request needs no
 * write system call.  After lost power it proves nothing; `activity` covers
 * that.  So no request waits for an msync.
 *
 * A process can be killed between any two instructions.  So a slot is filled
 * while its `word` is 0, which means free whatever else it holds, and opened
 * and freed by one 8-byte store each.  Only the order of our own stores
 * matters: a killed thread's finished stores are seen, and the rest never
 * happens.  The CRC in `word` is thus not against torn slots but against a
 * garbled or foreign file.
 *
 * The log is a ring: slots are taken in turn.  A slot that is still open is
 * skipped, so that one slow request does not hold up the others.
 */

#define _GNU_SOURCE

#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/crc32c.h"
#include "base/error.h"
#include "base/fault.h"
#include "base/file.h"
#include "logs/inflight.h"
#include "logs/layout.h"
#include "logs/log_header.h"

#define FILE_NAME "inflight"

static uint64_t
map_bytes (uint32_t nr_slots)
{
  const uint64_t bytes = (uint64_t)nr_slots * sizeof (struct disk_slot);

  return (bytes + LAYOUT_PAGE - 1) / LAYOUT_PAGE * LAYOUT_PAGE;
}

static void
expected_header (struct disk_log_header *header, const uint8_t *uuid,
                 uint64_t session, uint32_t nr_slots)
{
  log_header_init (header, INFLIGHT_MAGIC, "", uuid, session, nr_slots,
                   sizeof (struct disk_slot));
}

static uint64_t
load_word (const struct disk_slot *slot)
{
  return le64toh (__atomic_load_n (&slot->word, __ATOMIC_ACQUIRE));
}

static void
store_word (struct disk_slot *slot, uint64_t word)
{
  __atomic_store_n (&slot->word, htole64 (word), __ATOMIC_RELEASE);
}

/* The word that opens the slot as it is filled. */
static uint64_t
slot_word (const struct disk_slot *slot, uint8_t kind, uint8_t flags)
{
  uint8_t bytes[26];

  memcpy (bytes, &slot->sequence, 8);
  memcpy (bytes + 8, &slot->offset, 8);
  memcpy (bytes + 16, &slot->length, 8);
  bytes[24] = kind;
  bytes[25] = flags;
  return crc32c (0, bytes, sizeof bytes) | (uint64_t)kind << 32
         | (uint64_t)flags << 40;
}

int
inflight_create (int dirfd, const uint8_t *uuid, uint64_t session,
                 uint32_t nr_slots)
{
  struct disk_log_header header;

  assert (nr_slots > 0);
  expected_header (&header, uuid, session, nr_slots);
  header.flags = htole32 (LOG_CLEAN);
  log_header_seal (&header);
  return file_make (dirfd, FILE_NAME, &header, map_bytes (nr_slots));
}

static int
map_log (struct inflight *log)
{
  log->mapping_size = LAYOUT_PAGE + map_bytes (log->nr_slots);
  log->mapping = mmap (NULL, log->mapping_size, PROT_READ | PROT_WRITE,
                       MAP_SHARED | MAP_POPULATE, log->fd, 0);
  if (log->mapping == MAP_FAILED) {
    log->mapping = NULL;
    return set_error (-errno, "cannot map %s", FILE_NAME);
  }
  log->slots = (struct disk_slot *)((char *)log->mapping + LAYOUT_PAGE);
  return 0;
}

static void
count_slots (struct inflight *log)
{
  for (uint32_t i = 0; i < log->nr_slots; i++) {
    const uint64_t sequence = le64toh (log->slots[i].sequence);

    if (load_word (&log->slots[i]) != 0)
      log->nr_open++;
    if (sequence > log->sequence)
      log->sequence = sequence;
  }
}

static int
load_log (struct inflight *log, const uint8_t *uuid, uint64_t session)
{
  struct disk_log_header expect;
  uint64_t is;
  int r;

  expected_header (&expect, uuid, session, log->nr_slots);
  r = log_header_load (log->fd, FILE_NAME, &expect,
                       LAYOUT_PAGE + map_bytes (log->nr_slots), &log->header);
  if (r < 0)
    return r;
  is = le64toh (log->header.session);
  if (is != session && is != session + 1)
    return set_message (
        -EUCLEAN, "%s is of session %" PRIu64 ", the volume is at %" PRIu64,
        FILE_NAME, is, session);
  r = map_log (log);
  if (r < 0)
    return r;
  count_slots (log);
  if (le32toh (log->header.flags) & LOG_CLEAN && log->nr_open > 0)
    return set_message (-EUCLEAN,
                        "%s is garbled: closed cleanly, but with %" PRIu32
                        " open slots",
                        FILE_NAME, log->nr_open);
  return 0;
}

static void
release (struct inflight *log)
{
  if (log->mapping)
    munmap (log->mapping, log->mapping_size);
  close (log->fd);
}

int
inflight_open (struct inflight *log, int dirfd, const uint8_t *uuid,
               uint64_t session, uint32_t nr_slots, bool *clean)
{
  struct inflight loaded = { .nr_slots = nr_slots };
  int r;

  assert (nr_slots > 0);
  loaded.fd = openat (dirfd, FILE_NAME, O_RDWR | PLAIN_FILE);
  if (loaded.fd == -1)
    return set_error (-errno, "cannot open %s", FILE_NAME);
  r = load_log (&loaded, uuid, session);
  if (r < 0) {
    release (&loaded);
    return r;
  }
  *clean = le32toh (loaded.header.flags) & LOG_CLEAN;
  *log = loaded;
  return 0;
}

/* The slot with the highest sequence below `below`, or NULL.  A sequence of 0
 * is a slot that was never used.
 */
static const struct disk_slot *
latest_below (const struct inflight *log, uint64_t below)
{
  const struct disk_slot *latest = NULL;
  uint64_t highest = 0;

  for (uint32_t i = 0; i < log->nr_slots; i++) {
    uint64_t sequence = le64toh (log->slots[i].sequence);

    if (sequence > highest && sequence < below) {
      highest = sequence;
      latest = &log->slots[i];
    }
  }
  return latest;
}

uint32_t
inflight_recent (const struct inflight *log, uint64_t *offsets, uint32_t max)
{
  uint64_t below = UINT64_MAX;
  uint32_t nr = 0;

  while (nr < max) {
    const struct disk_slot *slot = latest_below (log, below);

    if (slot == NULL)
      break;
    below = le64toh (slot->sequence);
    offsets[nr++] = le64toh (slot->offset);
  }
  return nr;
}

void
inflight_forget (struct inflight *log)
{
  memset (log->slots, 0, log->nr_slots * sizeof *log->slots);
  log->nr_open = log->next = 0;
  log->sequence = 0;
}

int
inflight_begin (struct inflight *log, uint64_t session)
{
  log->header.session = htole64 (session);
  log->header.flags &= ~htole32 (LOG_CLEAN);
  return log_header_store (log->fd, FILE_NAME, &log->header);
}

int
inflight_finish (struct inflight *log)
{
  int r;

  if (log->nr_open > 0)
    return set_message (-EBUSY, "%s: %" PRIu32 " slots are open", FILE_NAME,
                        log->nr_open);
  /* The slots before the flag: the flag vouches for them. */
  r = fault_point ("inflight_sync");
  if (r == 0 && msync (log->mapping, log->mapping_size, MS_SYNC) == -1)
    r = -errno;
  if (r < 0)
    return set_error (r, "cannot make %s durable", FILE_NAME);
  log->header.flags |= htole32 (LOG_CLEAN);
  return log_header_store (log->fd, FILE_NAME, &log->header);
}

void
inflight_close (struct inflight *log)
{
  if (log->mapping == NULL) /* never opened, or closed */
    return;
  release (log);
  memset (log, 0, sizeof *log);
}

int
inflight_reserve (struct inflight *log, uint64_t offset, uint64_t length,
                  enum slot_kind kind, uint8_t flags)
{
  struct disk_slot *slot;
  uint32_t i;

  if (log->nr_open == log->nr_slots)
    return -EAGAIN;
  while (load_word (&log->slots[log->next]) != 0)
    log->next = (log->next + 1) % log->nr_slots;
  i = log->next;
  log->next = (i + 1) % log->nr_slots;

  /* The compiler must not fill the slot before the store that freed it: a
   * release store alone lets later stores move ahead of it.
   */
  atomic_signal_fence (memory_order_seq_cst);
  slot = &log->slots[i];
  slot->sequence = htole64 (++log->sequence);
  slot->offset = htole64 (offset);
  slot->length = htole64 (length);
  slot->legs_issued = 0;
  slot->legs_done = 0;
  store_word (slot, slot_word (slot, (uint8_t)kind, flags));
  log->nr_open++;
  return (int)i;
}

static struct disk_slot *
open_slot (struct inflight *log, int slot)
{
  assert (slot >= 0 && (uint32_t)slot < log->nr_slots);
  assert (load_word (&log->slots[slot]) != 0);
  return &log->slots[slot];
}

void
inflight_issued (struct inflight *log, int slot, uint32_t legs)
{
  open_slot (log, slot)->legs_issued |= htole32 (legs);
}

void
inflight_done (struct inflight *log, int slot, uint32_t legs)
{
  open_slot (log, slot)->legs_done |= htole32 (legs);
}

void
inflight_retire (struct inflight *log, int slot)
{
  store_word (open_slot (log, slot), 0);
  log->nr_open--;
}

static int
view_slot (const struct disk_slot *slot, uint64_t size, struct slot_view *view)
{
  const uint64_t word = load_word (slot);
  const uint8_t kind = (uint8_t)(word >> 32);
  const uint8_t flags = (uint8_t)(word >> 40);

  if (word != slot_word (slot, kind, flags))
    return -EUCLEAN;
  if (kind != SLOT_WRITE && kind != SLOT_TRIM && kind != SLOT_ZERO)
    return -EUCLEAN;
  view->sequence = le64toh (slot->sequence);
  view->offset = le64toh (slot->offset);
  view->length = le64toh (slot->length);
  view->kind = kind;
  view->flags = flags;
  if (view->length == 0 || view->length > size
      || view->offset > size - view->length)
    return -EUCLEAN;
  return 0;
}

int
inflight_replay (struct inflight *log, uint64_t size,
                 void (*visit) (void *opaque, const struct slot_view *),
                 void *opaque)
{
  struct slot_view view;
  for (uint32_t i = 0; i < log->nr_slots; i++)
    if (load_word (&log->slots[i]) != 0
        && view_slot (&log->slots[i], size, &view) < 0)
      return set_message (-EUCLEAN, "%s is garbled: slot %" PRIu32, FILE_NAME,
                          i);

  for (uint32_t i = 0; i < log->nr_slots; i++)
    if (load_word (&log->slots[i]) != 0
        && view_slot (&log->slots[i], size, &view) == 0)
      visit (opaque, &view);

  fault_point ("replay_marked");
  /* Only after all were visited: a start after a kill in between replays all of
   * them again.
   */
  for (uint32_t i = 0; i < log->nr_slots; i++)
    store_word (&log->slots[i], 0);
  log->nr_open = 0;
  return 0;
}
