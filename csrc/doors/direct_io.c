/* SPDX-License-Identifier: BSD-3-Clause */

/* Translates the direct door's requests for the executor, and their ends to NBD
 * answers.  Logs a line for a request that failed.
 */

#include <endian.h>
#include <stddef.h>

#include "doors/direct.h"
#include "doors/direct_answer.h"
#include "doors/direct_io.h"
#include "doors/direct_server.h"
#include "executor/lane.h"
#include "wire/protocol.h"

static const struct {
  const char *name;
  enum io_kind kind;
} commands[] = {
  [NBD_CMD_READ] = { "read", IO_READ },
  [NBD_CMD_WRITE] = { "write", IO_WRITE },
  [NBD_CMD_FLUSH] = { "flush", IO_FLUSH },
  [NBD_CMD_TRIM] = { "trim", IO_TRIM },
  [NBD_CMD_CACHE] = { "cache", IO_CACHE },
  [NBD_CMD_WRITE_ZEROES] = { "zeroes", IO_ZERO },
  [NBD_CMD_BLOCK_STATUS] = { "block status", IO_EXTENTS },
};

static uint32_t
io_flags (const struct op *op)
{
  return (op->flags & NBD_CMD_FLAG_FUA ? NBDM_FUA : 0)
         | (op->type == NBD_CMD_WRITE_ZEROES
                    && !(op->flags & NBD_CMD_FLAG_NO_HOLE)
                ? NBDM_MAY_TRIM
                : 0)
         | (op->flags & NBD_CMD_FLAG_FAST_ZERO ? NBDM_FAST_ZERO : 0);
}

/* Returns how many bytes of the buffer belong to the answer. */
static size_t
fill_body (struct op *op, const struct io_end *end)
{
  struct nbd_block_descriptor *out = (void *)op->buf;

  if (op->type == NBD_CMD_READ)
    return op->length;
  for (uint32_t i = 0; i < end->nr_extents; i++)
    out[i] = (struct nbd_block_descriptor){
      .length = htobe32 ((uint32_t)end->extents[i].length),
      .status = htobe32 (end->extents[i].type),
    };
  return end->nr_extents * sizeof *out;
}

static void
done (struct io *io, const struct io_end *end)
{
  struct op *op = (struct op *)((char *)io - offsetof (struct op, io));
  size_t size = fill_body (op, end);

  if (end->words)
    direct_log (op->session, "a %s of %u bytes at %llu: %s",
                commands[op->type].name, op->length,
                (unsigned long long)op->offset, end->words);
  switch (end->by) {
  case IO_BY_LANE:
    answer_put (op, end->rc, size);
    break;
  case IO_BY_WORKER:
    answer_send (op, end->rc, size);
    break;
  case IO_BY_FLUSHER:
    answer_send_shared (op, end->rc);
    break;
  }
}

void
op_submit (struct op *op)
{
  struct io *io = &op->io;

  io->kind = commands[op->type].kind;
  io->flags = io_flags (op);
  io->offset = op->offset;
  io->length = op->length;
  io->buf = op->buf;
  io->max_extents = op->flags & NBD_CMD_FLAG_REQ_ONE ? 1 : EXECUTOR_EXTENTS;
  io->done = done;
  lane_submit (&op->session->lane, io);
}
