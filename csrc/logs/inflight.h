/* SPDX-License-Identifier: BSD-3-Clause */

/* The in-flight log: the ranges of writes under way.  See inflight.c. */

#ifndef NBDM_INFLIGHT_H
#define NBDM_INFLIGHT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "logs/layout.h"

/* The in-flight log: a ring of slots in a shared mapping, one per request. */
struct inflight {
  int fd;
  void *mapping;
  size_t mapping_size;
  struct disk_log_header header;
  struct disk_slot *slots;
  uint32_t nr_slots;
  uint32_t nr_open;
  uint32_t next;     /* where reserve looks first */
  uint64_t sequence; /* of the last slot reserved */
};

enum slot_kind { SLOT_WRITE = 1, SLOT_TRIM = 2, SLOT_ZERO = 3 };

struct slot_view {
  uint64_t sequence;
  uint64_t offset;
  uint64_t length;
  uint8_t kind;
  uint8_t flags;
};

int inflight_create (int dirfd, const uint8_t *uuid, uint64_t session,
                     uint32_t nr_slots);
int inflight_open (struct inflight *log, int dirfd, const uint8_t *uuid,
                   uint64_t session, uint32_t nr_slots, bool *clean);
int inflight_begin (struct inflight *log, uint64_t session);
int inflight_finish (struct inflight *log); /* no slot may be open */
void inflight_close (struct inflight *log);

/* Open a slot.  Returns its index, or -EAGAIN if all slots are open. */
int inflight_reserve (struct inflight *log, uint64_t offset, uint64_t length,
                      enum slot_kind kind, uint8_t flags);
/* The offsets of the last `max` writes at most, latest first: a slot keeps
 * its range after it is retired.  Returns how many.
 */
uint32_t inflight_recent (const struct inflight *log, uint64_t *offsets,
                          uint32_t max);
/* Note a leg's part (bit 0: local, 1 + i: remote i); for inspection. */
void inflight_issued (struct inflight *log, int slot, uint32_t legs);
void inflight_done (struct inflight *log, int slot, uint32_t legs);
void inflight_retire (struct inflight *log, int slot);
/* Empty all slots, whatever they hold, in place: that needs no room. */
void inflight_forget (struct inflight *log);
/* Call `visit` for every open slot, then free all of them.  -EUCLEAN before any
 * visit if a slot is garbled (bad CRC, kind, or a range past `size`).
 */
int inflight_replay (struct inflight *log, uint64_t size,
                     void (*visit) (void *opaque, const struct slot_view *),
                     void *opaque);

#endif /* NBDM_INFLIGHT_H */
