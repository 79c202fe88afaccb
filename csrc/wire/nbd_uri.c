/* SPDX-License-Identifier: BSD-3-Clause */

/* NBD URIs: doc/uri.md of the NBD project, with libnbd's parameters.
 *
 *   nbds://[USER@]HOST[:PORT][/EXPORT][?tls-psk-file=FILE][&...]
 *   nbds+unix://[USER@]/[EXPORT]?socket=PATH[&...]
 *
 * and the same with nbd, without TLS: libnbd takes those of remotes apart, and
 * this file those of calls between nodes.  Nodes name their three files of
 * X.509 one by one, and the node that they call (tls_identity.c); libnbd has no
 * such parameters.  The configuration has checked the characters
 * (nbd_mirror/volume/config_values.py).  An unknown parameter of TLS is
 * refused: it may have been meant to protect.
 */

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "wire/nbd_uri.h"

#define TCP "nbds://"
#define UNIX "nbds+unix://"
#define PLAIN_TCP "nbd://"
#define PLAIN_UNIX "nbd+unix://"
#define DEFAULT_PORT "10809"
#define NONCE_DIGITS 32

static bool
begins_with (const char *text, const char *begin)
{
  return strncmp (text, begin, strlen (begin)) == 0;
}

bool
nbd_uri_is_secure (const char *text)
{
  return begins_with (text, TCP) || begins_with (text, UNIX);
}

static int
digit (char c)
{
  if (c >= '0' && c <= '9')
    return c - '0';
  c |= 0x20;
  return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* In place: it only gets shorter.  False: a '%' without two digits, or a NUL.
 */
static bool
decode (char *text)
{
  char *to = text;

  for (const char *at = text; *at; at++) {
    int value = *at;

    if (*at == '%') {
      int high = digit (at[1]), low = high < 0 ? -1 : digit (at[2]);

      if (low < 0 || high + low == 0)
        return false;
      value = high * 16 + low;
      at += 2;
    }
    *to++ = (char)value;
  }
  *to = '\0';
  return true;
}

/* Cut the text at the first of these characters.  Returns what is behind it, or
 * NULL.
 */
static char *
cut (char *text, const char *at)
{
  char *found = strpbrk (text, at);

  if (found)
    *found++ = '\0';
  return found;
}

static int
bad (const char *what, const char *text)
{
  return set_message (-EINVAL, "the URI's %s cannot be used: %s", what, text);
}

/* [USER@]HOST[:PORT]; the host may be an IPv6 address in brackets. */
static int
parse_authority (struct nbd_uri *uri, char *text)
{
  char *host = strrchr (text, '@'), *end;

  if (host) {
    *host++ = '\0';
    uri->user = text;
  }
  else
    host = text;
  uri->host = host;
  uri->port = DEFAULT_PORT;
  end = host;
  if (*host == '[') {
    uri->host = host + 1;
    end = cut (host, "]");
    if (end == NULL)
      return bad ("host", host);
  }
  end = strchr (end, ':');
  if (end) {
    *end = '\0';
    uri->port = end + 1;
  }
  if ((uri->user && !decode (text)) || !decode ((char *)(uintptr_t)uri->host))
    return bad ("host", text);
  return 0;
}

/* `value` is NULL without a "=". */
static int
parse_parameter (struct nbd_uri *uri, const char *name, const char *value)
{
  static const struct {
    const char *name;
    size_t place;
  } known[] = {
    { "socket", offsetof (struct nbd_uri, socket) },
    { "tls-psk-file", offsetof (struct nbd_uri, psk_file) },
    { "tls-certificates", offsetof (struct nbd_uri, certificates) },
    { "tls-certificate-file", offsetof (struct nbd_uri, certificate) },
    { "tls-key-file", offsetof (struct nbd_uri, private_key) },
    { "tls-ca-file", offsetof (struct nbd_uri, ca) },
    { "tls-name", offsetof (struct nbd_uri, name) },
  };

  for (size_t i = 0; i < sizeof known / sizeof *known; i++)
    if (strcmp (name, known[i].name) == 0) {
      if (value == NULL || *value == '\0')
        return bad ("parameter without a value", name);
      memcpy ((char *)uri + known[i].place, &value, sizeof value);
      return 0;
    }
  return begins_with (name, "tls") ? bad ("parameter", name) : 0;
}

static int
parse_query (struct nbd_uri *uri, char *text)
{
  int rc = 0;

  while (text && rc == 0) {
    char *next = cut (text, "&;"), *value = cut (text, "=");

    if (!decode (text) || (value && !decode (value)))
      rc = bad ("parameter", text);
    else
      rc = parse_parameter (uri, text, value);
    text = next;
  }
  return rc;
}

/* What is behind the scheme; NULL: it is none of these. */
static const char *
take_scheme (const char *text, struct nbd_uri *uri, bool *tcp)
{
  static const struct {
    const char *text;
    bool secure, tcp;
  } known[] = { { TCP, true, true },
                { UNIX, true, false },
                { PLAIN_TCP, false, true },
                { PLAIN_UNIX, false, false } };

  for (size_t i = 0; i < sizeof known / sizeof *known; i++)
    if (begins_with (text, known[i].text)) {
      uri->secure = known[i].secure;
      *tcp = known[i].tcp;
      return text + strlen (known[i].text);
    }
  return NULL;
}

int
nbd_uri_parse (const char *text, struct nbd_uri *uri)
{
  char *authority, *path, *query;
  const char *rest;
  bool tcp;
  int rc;

  *uri = (struct nbd_uri){ .export = "" };
  rest = take_scheme (text, uri, &tcp);
  if (rest == NULL)
    return bad ("scheme", text);
  uri->room = strdup (rest);
  if (uri->room == NULL)
    return set_error (-ENOMEM, "connect");
  authority = uri->room;
  query = cut (authority, "?");
  path = cut (authority, "/");
  rc = parse_authority (uri, authority);
  if (rc == 0 && path)
    uri->export = path;
  if (rc == 0 && path && !decode (path))
    rc = bad ("export", path);
  if (rc == 0)
    rc = parse_query (uri, query);
  if (rc == 0 && tcp == (uri->socket != NULL))
    rc = bad (tcp ? "parameter" : "scheme without a parameter", "socket");
  if (rc == 0 && tcp && uri->host[0] == '\0')
    uri->host = "localhost";
  if (rc < 0)
    nbd_uri_free (uri);
  return rc;
}

void
nbd_uri_free (struct nbd_uri *uri)
{
  free (uri->room);
  uri->room = NULL;
}

bool
nbd_uri_is_claim (const char *text)
{
  struct nbd_uri uri;
  const char *nonce;
  bool is;

  if (nbd_uri_parse (text, &uri) < 0)
    return false;
  nonce = strrchr (uri.export, '.');
  is = nonce && strchr (uri.export, '@') && strlen (nonce + 1) == NONCE_DIGITS
       && strspn (nonce + 1, "0123456789abcdef") == NONCE_DIGITS;
  nbd_uri_free (&uri);
  return is;
}
