/* SPDX-License-Identifier: BSD-3-Clause */

/* TLS 1.3 around a stream, by GnuTLS.
 *
 * GnuTLS never touches the socket: it takes records from the buffer `in` and
 * puts records into the buffer `out`, both in memory, and this file moves them.
 * So no call of GnuTLS blocks, one system call moves several records (GnuTLS
 * itself makes two for each), and files that a hostile side sends along are
 * found in TLS too (receive.c).
 *
 * What has been sent.  The caller must know which of its bytes have left: no
 * honest server answers a command before that (transport_plain.c), and a
 * buffer stays in use until its bytes are gone.  So `send` seals some bytes
 * into records, notes for each record how many bytes it holds and where it
 * ends in `out`, and returns only bytes of records that the socket took wholly.
 * What `out` still holds counts as not sent: the caller offers these bytes
 * again, and they are not sealed twice.  No record can be opened in part, so
 * the other side knows no byte that does not count as sent.
 *
 * Poll.  Whole records may lie in `in`, and opened bytes in GnuTLS, while the
 * socket is empty; or the end was found behind bytes that were received.
 * stream_has_input reports all of these.
 *
 * Threads.  One thread sends and one receives.  GnuTLS allows that, but a key
 * update, which the other side may ask for at any time, changes both
 * directions: so a lock is held over each call of GnuTLS.  A call handles at
 * most one record, and never waits.
 *
 * The end.  A stream that ends without close_notify was cut: the connection is
 * lost (ECONNRESET).  TLS 1.3 has no renegotiation; tickets, early data and
 * late client certificates are off.  tls_handshake.c has the handshake.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include <gnutls/gnutls.h>

#include "base/error.h"
#include "base/lock.h"
#include "wire/receive.h"
#include "wire/stream.h"
#include "wire/tls.h"
#include "wire/tls_secrets.h"
#include "wire/tls_stream.h"

#define RECORD_BYTES 16384u /* at most, in a record */
#define RECORD_ROOM (RECORD_BYTES + 512u)
#define SPARE_ROOM 4096u /* for a key update and an alert */
#define IN_ROOM (64u << 10)
#define OUT_ROOM (4 * RECORD_ROOM + SPARE_ROOM)
#define MAX_SEALED                                                             \
  64u /* records in `out`: the other side may want small ones */

struct sealed {
  size_t bytes; /* of the caller */
  size_t end;   /* in `out` */
};

struct tls {
  gnutls_session_t session;
  pthread_mutex_t lock; /* over each call of GnuTLS; none is taken under it */
  size_t out_end;       /* GnuTLS appends; under the lock */
  struct tls_secrets *kept; /* of this session alone, or NULL */

  /* The sending thread's. */
  bool unsendable; /* GnuTLS refused to seal */
  size_t out_start;
  struct sealed sealed[MAX_SEALED];
  unsigned nr_sealed;
  uint8_t staged[RECORD_BYTES];

  /* The receiving thread's. */
  size_t in_start, in_end;
  atomic_size_t unopened; /* bytes that came since the last record with some */
  bool over;           /* close_notify, or an error: nothing more is opened */
  int over_with;       /* 0 or an errno */
  const char *trouble; /* GnuTLS's words for the error; or NULL */

  uint8_t in[IN_ROOM], out[OUT_ROOM];
};

/* --- GnuTLS's side of the buffers ------------------------------------------
 */

/* The receiving thread calls it, within a call of GnuTLS. */
static ssize_t
pull (gnutls_transport_ptr_t opaque, void *to, size_t size)
{
  struct tls *t = opaque;
  size_t left = t->in_end - t->in_start;

  if (left == 0) {
    gnutls_transport_set_errno (t->session, EAGAIN);
    return -1;
  }
  size = size < left ? size : left;
  memcpy (to, t->in + t->in_start, size);
  t->in_start += size;
  return (ssize_t)size;
}

/* Without one GnuTLS would take its own, for a descriptor. */
static int
pull_timeout (gnutls_transport_ptr_t opaque, unsigned ms)
{
  const struct tls *t = opaque;

  (void)ms;
  return t->in_end > t->in_start;
}

static ssize_t
push (gnutls_transport_ptr_t opaque, const void *from, size_t size)
{
  struct tls *t = opaque;

  if (size > OUT_ROOM - t->out_end) {
    gnutls_transport_set_errno (t->session, ENOBUFS);
    return -1;
  }
  memcpy (t->out + t->out_end, from, size);
  t->out_end += size;
  return (ssize_t)size;
}

/* --- Sending ---------------------------------------------------------------
 */

/* A place in the caller's bytes. */
struct place {
  size_t i, skip;
};

static size_t
left_in (const struct msghdr *msg, const struct place *at)
{
  return msg->msg_iov[at->i].iov_len - at->skip;
}

static void
advance (const struct msghdr *msg, struct place *at, size_t bytes)
{
  while (at->i < msg->msg_iovlen && bytes >= left_in (msg, at)) {
    bytes -= left_in (msg, at);
    at->i++;
    at->skip = 0;
  }
  at->skip += bytes;
}

/* The next record's bytes: in place if they lie together, else staged.  0:
 * there are none.
 */
static size_t
next_bytes (struct tls *t, const struct msghdr *msg, struct place at,
            const uint8_t **bytes)
{
  size_t size = 0;

  if (at.i == msg->msg_iovlen)
    return 0;
  *bytes = (const uint8_t *)msg->msg_iov[at.i].iov_base + at.skip;
  if (left_in (msg, &at) >= RECORD_BYTES)
    return RECORD_BYTES;
  if (at.i + 1 == msg->msg_iovlen)
    return left_in (msg, &at);
  while (at.i < msg->msg_iovlen && size < RECORD_BYTES) {
    size_t n = left_in (msg, &at);

    n = n < RECORD_BYTES - size ? n : RECORD_BYTES - size;
    memcpy (t->staged + size,
            (const uint8_t *)msg->msg_iov[at.i].iov_base + at.skip, n);
    size += n;
    advance (msg, &at, n);
  }
  *bytes = t->staged;
  return size;
}

/* Seal one record.  Returns how many bytes it holds; 0: there is no room; -1:
 * GnuTLS refuses.
 */
static ssize_t
seal_one (struct tls *t, const uint8_t *bytes, size_t size)
{
  ssize_t n;

  LOCK_FOR_SCOPE (&t->lock);
  if (t->nr_sealed == MAX_SEALED
      || OUT_ROOM - t->out_end < RECORD_ROOM + SPARE_ROOM)
    return 0;
  n = gnutls_record_send (t->session, bytes, size);
  if (n <= 0)
    return -1;
  t->sealed[t->nr_sealed++]
      = (struct sealed){ .bytes = (size_t)n, .end = t->out_end };
  return n;
}

/* Seal the first bytes of the message, as many as `out` has room for.  False:
 * GnuTLS refuses.
 */
static bool
seal (struct tls *t, const struct msghdr *msg)
{
  struct place at = { 0, 0 };
  const uint8_t *bytes;
  size_t size;

  advance (msg, &at, 0); /* past empty pieces */
  while ((size = next_bytes (t, msg, at, &bytes)) > 0) {
    ssize_t n = seal_one (t, bytes, size);

    if (n <= 0)
      return n == 0;
    advance (msg, &at, (size_t)n);
  }
  return true;
}

/* The socket took what lies before out_start.  Returns how many bytes of the
 * caller have left with it.
 */
static size_t
unseal (struct tls *t)
{
  size_t bytes = 0;
  unsigned nr = 0;

  while (nr < t->nr_sealed && t->sealed[nr].end <= t->out_start)
    bytes += t->sealed[nr++].bytes;
  t->nr_sealed -= nr;
  memmove (t->sealed, t->sealed + nr, t->nr_sealed * sizeof *t->sealed);
  return bytes;
}

/* Give the socket what `out` holds.  Returns the caller's bytes that left. With
 * none, EAGAIN: something is left; 0: all is gone.
 */
static ssize_t
drain (struct stream *stream, int flags)
{
  struct tls *t = stream->tls;
  size_t end, bytes;
  ssize_t n = 0;

  pthread_mutex_lock (&t->lock);
  end = t->out_end;
  pthread_mutex_unlock (&t->lock);
  if (end > t->out_start)
    n = send (stream->fd, t->out + t->out_start, end - t->out_start,
              flags | MSG_NOSIGNAL);
  if (n < 0)
    return -1;
  t->out_start += (size_t)n;
  bytes = unseal (t);
  LOCK_FOR_SCOPE (&t->lock);
  if (t->out_start == t->out_end) {
    t->out_start = t->out_end = 0;
    return (ssize_t)bytes;
  }
  errno = EAGAIN;
  return bytes > 0 ? (ssize_t)bytes : -1;
}

static ssize_t
tls_send (struct stream *stream, const struct msghdr *msg, int flags)
{
  struct tls *t = stream->tls;

  if (!t->unsendable && t->nr_sealed == 0)
    t->unsendable = !seal (t, msg);
  if (t->unsendable) {
    errno = EPROTO;
    return -1;
  }
  return drain (stream, flags);
}

/* --- Receiving -------------------------------------------------------------
 */

/* Receive once into `in`, which is empty.  As recv. */
static ssize_t
fill (struct stream *stream, int flags)
{
  struct tls *t = stream->tls;
  ssize_t n = receive (stream->fd, t->in, IN_ROOM, flags);

  t->in_start = 0;
  t->in_end = n > 0 ? (size_t)n : 0;
  atomic_fetch_add (&t->unopened, t->in_end);
  return n;
}

/* Open the next bytes.  GNUTLS_E_AGAIN: `in` is empty, and holds no record's
 * end.  0: close_notify.
 */
static ssize_t
open_some (struct tls *t, void *to, size_t size)
{
  ssize_t n;

  do {
    LOCK_FOR_SCOPE (&t->lock);
    n = gnutls_record_recv (t->session, to, size);
    /* A record may hold no byte, or only a key update or a warning. */
  } while (n < 0 && !gnutls_error_is_fatal ((int)n) && t->in_end > t->in_start);
  if (n > 0)
    atomic_store (&t->unopened, t->in_end - t->in_start);
  return n < 0 && !gnutls_error_is_fatal ((int)n) ? GNUTLS_E_AGAIN : n;
}

/* What opening led to. */
struct opened {
  size_t bytes;
  ssize_t last; /* GNUTLS_E_AGAIN, or 0, or an error; or > 0: no more room */
};

static struct opened
open_all (struct tls *t, struct iovec *iov, size_t nr)
{
  struct opened opened = { .last = 1 };

  for (size_t i = 0; i < nr && opened.last > 0; i++) {
    size_t done = 0;

    while (done < iov[i].iov_len && opened.last > 0) {
      opened.last = open_some (t, (uint8_t *)iov[i].iov_base + done,
                               iov[i].iov_len - done);
      if (opened.last > 0) {
        done += (size_t)opened.last;
        opened.bytes += (size_t)opened.last;
      }
    }
  }
  return opened;
}

/* Open what has come.  Returns how many bytes. */
static size_t
take_opened (struct tls *t, struct iovec *iov, size_t nr)
{
  struct opened opened = { .last = GNUTLS_E_AGAIN };

  if (!t->over)
    opened = open_all (t, iov, nr);
  t->over = t->over || (opened.last <= 0 && opened.last != GNUTLS_E_AGAIN);
  if (opened.last < 0 && opened.last != GNUTLS_E_AGAIN) {
    t->over_with = EPROTO;
    t->trouble = opened.last == GNUTLS_E_FATAL_ALERT_RECEIVED
                     ? tls_alert_name (t->session)
                     : gnutls_strerror ((int)opened.last);
  }
  return opened.bytes;
}

static ssize_t
tls_receive (struct stream *stream, struct iovec *iov, size_t nr, int flags)
{
  struct tls *t = stream->tls;
  bool filled = false;

  for (;;) {
    size_t bytes = take_opened (t, iov, nr);
    ssize_t n;

    if (bytes > 0 || t->over) {
      errno = t->over_with;
      return bytes > 0 || errno == 0 ? (ssize_t)bytes : -1;
    }
    errno = EAGAIN;
    /* Once: records without a byte must not keep the thread here. */
    if (filled && (flags & MSG_DONTWAIT))
      return -1;
    n = fill (stream, flags);
    if (n == 0)
      errno = ECONNRESET; /* without close_notify: cut */
    if (n <= 0)
      return -1;
    filled = true;
  }
}

static bool
tls_has_input (const struct stream *stream)
{
  const struct tls *t = stream->tls;

  return t->over || t->in_end > t->in_start
         || gnutls_record_check_pending (t->session) > 0;
}

/* However many empty records come, they are not more than part of one. */
static size_t
tls_partial (const struct stream *stream)
{
  size_t bytes = atomic_load (&stream->tls->unopened);

  return bytes < RECORD_ROOM ? bytes : RECORD_ROOM;
}

/* --- Coming and going ------------------------------------------------------
 */

static void
tls_part (struct stream *stream)
{
  struct tls *t = stream->tls;

  pthread_mutex_lock (&t->lock);
  (void)gnutls_bye (t->session, GNUTLS_SHUT_WR);
  pthread_mutex_unlock (&t->lock);
  (void)drain (stream, MSG_DONTWAIT);
}

static void
tls_free (struct tls *t)
{
  if (t->session)
    gnutls_deinit (t->session);
  tls_secrets_free (t->kept);
  pthread_mutex_destroy (&t->lock);
  free (t);
}

static void
tls_end (struct stream *stream)
{
  tls_free (stream->tls);
  *stream = stream_plain (stream->fd);
}

static const struct stream_kind tls_stream = {
  .receive = tls_receive,
  .send = tls_send,
  .has_input = tls_has_input,
  .partial = tls_partial,
  .part = tls_part,
  .end = tls_end,
};

static struct tls *
tls_new (unsigned flags)
{
  struct tls *t = malloc (sizeof *t);

  if (t == NULL)
    return NULL;
  /* Not the buffers: their pages stay untouched until they are used. */
  memset (t, 0, offsetof (struct tls, staged));
  t->in_start = t->in_end = 0;
  atomic_init (&t->unopened, 0);
  t->over = false;
  t->over_with = 0;
  t->trouble = NULL;
  pthread_mutex_init (&t->lock, NULL);
  if (gnutls_init (&t->session, flags | GNUTLS_NONBLOCK | GNUTLS_NO_TICKETS)
      < 0) {
    t->session = NULL;
    tls_free (t);
    return NULL;
  }
  gnutls_transport_set_ptr (t->session, t);
  gnutls_transport_set_pull_function (t->session, pull);
  gnutls_transport_set_pull_timeout_function (t->session, pull_timeout);
  gnutls_transport_set_push_function (t->session, push);
  return t;
}

/* --- For the handshake -----------------------------------------------------
 */

int
tls_begin (struct stream *stream, unsigned flags)
{
  struct tls *t = tls_new (flags);

  if (t == NULL)
    return set_error (-ENOMEM, "TLS");
  *stream = (struct stream){ .kind = &tls_stream, .fd = stream->fd, .tls = t };
  return 0;
}

void
tls_keep (struct stream *stream, struct tls_secrets *secrets)
{
  stream->tls->kept = secrets;
}

size_t
tls_bytes (void)
{
  return sizeof (struct tls);
}

gnutls_session_t
tls_session (const struct stream *stream)
{
  return stream->tls->session;
}

bool
tls_has_received (const struct stream *stream)
{
  return stream->tls->in_end > stream->tls->in_start;
}

ssize_t
tls_fill (struct stream *stream)
{
  return fill (stream, MSG_DONTWAIT);
}

ssize_t
tls_drain (struct stream *stream)
{
  return drain (stream, MSG_DONTWAIT);
}

const char *
tls_alert_name (gnutls_session_t session)
{
  const char *name = gnutls_alert_get_name (gnutls_alert_get (session));

  return name ? name : "an alert that GnuTLS does not know";
}

const char *
tls_trouble (const struct stream *stream)
{
  return stream->tls ? stream->tls->trouble : NULL;
}
