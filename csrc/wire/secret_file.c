/* SPDX-License-Identifier: BSD-3-Clause */

/* The files of TLS are read whole, by one open.
 *
 * Every check is made on the open descriptor, so the file that was checked is
 * the one that is read, even if another one takes its path meanwhile.  The
 * owner of the folder may do that at any time; so a server checks its file of
 * shared keys again at each handshake.
 *
 * No open or read waits for another process: a FIFO is opened without its
 * writer, and then refused.  Else one FIFO in the place of a key would keep a
 * thread for each client that comes.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/error.h"
#include "wire/secret_file.h"

#define MAX_FILE (4 << 20) /* bytes; a bundle of many CAs has a quarter MiB */
#define LEAST_KEY 16u      /* bytes; a shorter key can be guessed */

struct kind {
  mode_t forbidden;
  const char *complaint;
};

static int
bad_file (const char *path, const char *why)
{
  return set_message (-EINVAL, "TLS: %s: %s", path, why);
}

static int
check (int fd, const char *path, const struct kind *kind, size_t *size)
{
  struct stat st;

  if (fstat (fd, &st) < 0)
    return set_error (-errno, "TLS: %s", path);
  if (!S_ISREG (st.st_mode))
    return bad_file (path, "it is no plain file");
  if (st.st_mode & kind->forbidden
      || (st.st_uid != 0 && st.st_uid != geteuid ()))
    return set_message (-EACCES, "TLS: %s: %s", path, kind->complaint);
  if (st.st_size > MAX_FILE)
    return bad_file (path, "it has more than 4 MiB");
  *size = (size_t)st.st_size;
  return 0;
}

static int
read_whole (int fd, const char *path, size_t size, gnutls_datum_t *text)
{
  unsigned char *bytes = malloc (size + 1);
  ssize_t n = 1;

  if (bytes == NULL)
    return set_error (-ENOMEM, "TLS");
  *text = (gnutls_datum_t){ .data = bytes };
  while (text->size < size && n > 0) {
    n = read (fd, bytes + text->size, size - text->size);
    if (n > 0)
      text->size += (unsigned)n;
  }
  bytes[text->size] = '\0';
  if (n >= 0)
    return 0;
  n = -errno;
  secret_file_free (text);
  return set_error ((int)n, "TLS: %s", path);
}

static int
read_checked (const char *path, const struct kind *kind, gnutls_datum_t *text)
{
  int fd = open (path, O_RDONLY | O_NONBLOCK | O_CLOEXEC | O_NOCTTY), rc;
  size_t size = 0;

  if (fd < 0)
    return set_error (-errno, "TLS: %s", path);
  rc = check (fd, path, kind, &size);
  if (rc == 0)
    rc = read_whole (fd, path, size, text);
  close (fd);
  return rc;
}

/* Any reader of a secret could be this server. */
int
secret_file_read (const char *path, gnutls_datum_t *text)
{
  static const struct kind secret
      = { S_IRWXG | S_IRWXO,
          "other users may read this secret, or change it; chown it to this "
          "user, and chmod 600 it" };

  return read_checked (path, &secret, text);
}

/* A user that can add a certificate to `ca` can be any client or server. */
int
certificate_file_read (const char *path, gnutls_datum_t *text)
{
  static const struct kind certificate
      = { S_IWGRP | S_IWOTH,
          "other users may change this file, and so choose which certificates "
          "count; chown it to this user, and chmod 644 it" };

  return read_checked (path, &certificate, text);
}

void
secret_file_free (gnutls_datum_t *text)
{
  if (text->data)
    gnutls_memset (text->data, 0, text->size);
  free (text->data);
  *text = (gnutls_datum_t){ 0 };
}

/* --- Shared keys -----------------------------------------------------------
 */

/* A user's name comes from the other side, and may hold a NUL. */
static bool
is_named (const char *name, const gnutls_datum_t *user)
{
  return user == NULL
         || (strlen (name) == user->size
             && memcmp (name, user->data, user->size) == 0);
}

/* Find the line and cut it after the name.  Returns the key's digits, or NULL.
 */
static char *
find_line (char *text, const gnutls_datum_t *user, const char **name)
{
  char *line;

  while ((line = strsep (&text, "\n"))) {
    char *hex = strchr (line, ':');

    if (hex == NULL)
      continue;
    *hex++ = '\0';
    hex[strcspn (hex, "\r")] = '\0';
    *name = line;
    if (is_named (line, user))
      return hex;
  }
  return NULL;
}

static int
decode (const char *path, char *hex, gnutls_datum_t *key)
{
  const gnutls_datum_t digits
      = { (unsigned char *)hex, (unsigned)strlen (hex) };

  if (digits.size < 2 * LEAST_KEY)
    return bad_file (path, "the key has fewer than 16 bytes, and could be "
                           "guessed");
  if (gnutls_hex_decode2 (&digits, key) < 0)
    return bad_file (path, "the key is no hexadecimal number, two digits a "
                           "byte");
  return 0;
}

int
psk_read (const char *path, const gnutls_datum_t *user, struct psk *psk)
{
  int rc = secret_file_read (path, &psk->text);
  char *hex;

  if (rc < 0)
    return rc;
  hex = find_line ((char *)psk->text.data, user, &psk->name);
  rc = hex ? decode (path, hex, &psk->key) : 1;
  if (rc != 0)
    secret_file_free (&psk->text);
  return rc;
}

void
psk_free (struct psk *psk)
{
  gnutls_memset (psk->key.data, 0, psk->key.size);
  gnutls_free (psk->key.data);
  secret_file_free (&psk->text);
}
