/* SPDX-License-Identifier: BSD-3-Clause */

/* An option of the handshake, for the files that answer options:
 * direct_handshake.c has those of the disk's clients, node_handshake.c those of
 * other nodes.
 */

#ifndef NBDM_HANDSHAKE_H
#define NBDM_HANDSHAKE_H

#include <endian.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct agreed;
struct exported;
struct exports;
struct session;
struct stream;

#define MAX_OPTION 8192u /* bytes; names are up to 4096 */

struct handshake {
  struct session *session;
  struct stream *stream;
  const struct exports *exports;
  const struct exported *mapped; /* the export of the agreed context, or NULL */
  struct agreed *agreed;
  uint64_t until_ns; /* all of it ends by then */
  bool needs_tls;    /* the client must ask for it next */
  bool no_zeroes;
  uint32_t option;
  uint32_t length;
  uint8_t data[MAX_OPTION];
};

/* The result of an option; -errno ends the connection. */
enum next { ANOTHER_OPTION = 0, TRANSMISSION = 1 };

int handshake_reply (const struct handshake *h, uint32_t type, const void *data,
                     size_t size);
/* Refuse the option, with a reason for a person to read. */
int handshake_refuse (const struct handshake *h, uint32_t type, const char *fmt,
                      ...) __attribute__ ((format (printf, 3, 4)));
/* Admit the client to this export, and tell it what it asked for. */
int handshake_enter (struct handshake *h, struct exported *e, bool block_size,
                     bool description);

/* --- Parsing an option -------------------------------------------------- */

struct cursor {
  const uint8_t *at;
  uint32_t left;
  bool bad; /* a read went past the end */
};

static inline const uint8_t *
take (struct cursor *c, uint32_t size)
{
  const uint8_t *at = c->at;

  if (c->bad || size > c->left) {
    c->bad = true;
    return NULL;
  }
  c->at += size;
  c->left -= size;
  return at;
}

static inline uint32_t
take_u32 (struct cursor *c)
{
  const uint8_t *at = take (c, 4);
  uint32_t value = 0;

  if (at)
    memcpy (&value, at, 4);
  return be32toh (value);
}

static inline uint16_t
take_u16 (struct cursor *c)
{
  const uint8_t *at = take (c, 2);
  uint16_t value = 0;

  if (at)
    memcpy (&value, at, 2);
  return be16toh (value);
}

/* What a client asks for with GO or INFO. */
struct wanted {
  const uint8_t *name; /* `length` bytes of the option's data */
  uint32_t length;
  bool block_size, description;
};

/* False: the option is garbled. */
bool handshake_take_wanted (const struct handshake *h, struct wanted *wanted);

#endif /* NBDM_HANDSHAKE_H */
