/* SPDX-License-Identifier: BSD-3-Clause */

/* An NBD server inside the test. It does what no other server can be made to
 * do: it shows its image at one instant, loses what it has not flushed, applies
 * and answers commands in any order, and applies those of a dead connection
 * late.
 *
 * The image is in memory. One copy of it is what a read sees, another what has
 * been flushed, so a loss of power is a choice between the two, sector by
 * sector.
 */

#ifndef NBDM_NBD_PEER_H
#define NBDM_NBD_PEER_H

#include <stdbool.h>
#include <stdint.h>

#define PEER_SECTOR 512u /* bytes; what a loss of power keeps or takes */

enum peer_type {
  PEER_READ = 0,
  PEER_WRITE = 1,
  PEER_FLUSH = 3,
  PEER_TRIM = 4,
  PEER_ZERO = 6
};

struct peer_command {
  uint16_t type; /* enum peer_type, as in the protocol */
  bool fua;
  uint64_t cookie;
  uint64_t offset;
  uint32_t length;
  uint8_t *data; /* of a write, or for a read; else NULL */
};

enum peer_hold {
  PEER_GO,
  PEER_HOLD_FLUSHES, /* not carried out; without `shuffle` */
  PEER_HOLD_ANSWERS, /* applied, and not answered */
  PEER_HOLD_ALL      /* not applied either */
};

enum peer_loss { PEER_LOSE_ALL, PEER_LOSE_NONE, PEER_LOSE_SOME };

struct peer_params {
  const char *socket; /* path; copied */
  uint64_t size;      /* bytes */
  uint64_t seed;
  bool no_fua; /* the server does not know it */
  bool no_zeroes;
  uint32_t refuse_zeroes; /* offered, and answered with this errno; 0: done */
  uint32_t zero_bytes_per_ms; /* how quickly it zeroes; 0: at once */
  bool shuffle; /* apply and answer in any order, now and then later */
  /* Called around the applying of a command, which makes it one instant for the
   * test; `applied` is called between the two, when the image has changed.
   */
  void (*enter) (void *opaque);
  void (*applied) (void *opaque, const struct peer_command *cmd);
  void (*leave) (void *opaque);
  void *opaque;
};

struct peer;

/* Listens when this returns.  The socket's name must be free. */
struct peer *peer_start (const struct peer_params *params);
/* Cut, stop listening, free. */
void peer_stop (struct peer *peer);

/* What a read sees.  Nothing changes it between `enter` and `leave`, nor
 * while no client is connected.
 */
uint8_t *peer_image (struct peer *peer);
/* Have it hold these bytes, flushed, while no client is connected. */
void peer_put (struct peer *peer, const uint8_t *bytes);

/* Close every connection and wait for its end.  What was received and not
 * applied is forgotten, or with `keep` kept for peer_apply_late.
 */
void peer_cut (struct peer *peer, bool keep);
/* Wait for the end of every connection but the newest, and apply what was
 * kept, in any order: nothing comes late after it.  Returns how many commands.
 */
unsigned peer_apply_late (struct peer *peer);
/* Cut; then what was not flushed is lost, kept, or either by sector. */
void peer_lose_power (struct peer *peer, enum peer_loss loss);
void peer_hold (struct peer *peer, enum peer_hold hold);
/* With `shuffle`: the next flush is carried out and not answered until it is
 * let go, later ones are not even carried out; all else goes on.
 */
void peer_hold_flushes (struct peer *peer, bool hold);
void peer_answer_flush (struct peer *peer);
/* With `shuffle`: no write is carried out; all else goes on. */
void peer_hold_writes (struct peer *peer, bool hold);

/* From now on it answers reads with EIO. */
void peer_fail_reads (struct peer *peer);

/* Model a disk behind a write cache: from now on a flush takes this many ms,
 * and one second more for each `bytes_per_s` unflushed bytes; 0: none. Without
 * `shuffle` other commands wait for it.
 */
void peer_slow_flushes (struct peer *peer, unsigned ms, uint64_t bytes_per_s);

/* This thread is a server's, not one of the engine under test. */
extern _Thread_local bool peer_thread;

/* xorshift64*; the state must not be 0. */
uint64_t peer_random (uint64_t *state);

#endif /* NBDM_NBD_PEER_H */
