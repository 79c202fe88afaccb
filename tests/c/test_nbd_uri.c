/* SPDX-License-Identifier: BSD-3-Clause */

/* NBD URIs with TLS are taken apart as libnbd does, or refused. */

#include "wire/nbd_uri.h"
#include "test.h"

static void
assert_same (const char *found, const char *expected)
{
  if (found == NULL || expected == NULL)
    assert (found == expected);
  else
    assert (strcmp (found, expected) == 0);
}

static void
assert_parts (const char *text, const struct nbd_uri *expected)
{
  struct nbd_uri uri;

  assert (nbd_uri_is_secure (text));
  assert (nbd_uri_parse (text, &uri) == 0);
  if (expected->socket == NULL) {
    assert_same (uri.host, expected->host);
    assert_same (uri.port, expected->port);
  }
  assert_same (uri.socket, expected->socket);
  assert_same (uri.export, expected->export);
  assert_same (uri.user, expected->user);
  assert_same (uri.psk_file, expected->psk_file);
  assert_same (uri.certificates, expected->certificates);
  nbd_uri_free (&uri);
}

static void
test_parts (void)
{
  static const struct {
    const char *text;
    struct nbd_uri uri;
  } cases[] = {
    { "nbds://h", { .host = "h", .port = "10809", .export = "" } },
    { "nbds://", { .host = "localhost", .port = "10809", .export = "" } },
    { "nbds://h:1/", { .host = "h", .port = "1", .export = "" } },
    { "nbds://u@h:1/a/b%20c",
      { .host = "h", .port = "1", .export = "a/b c", .user = "u" } },
    { "nbds://[::1]", { .host = "::1", .port = "10809", .export = "" } },
    { "nbds://u%40v@[fe80::1%25eth0]:99/x?a=b",
      { .host = "fe80::1%eth0", .port = "99", .export = "x", .user = "u@v" } },
    { "nbds://h?tls-psk-file=/a%26b&&other&tls-certificates=/c;unknown=1",
      { .host = "h",
        .port = "10809",
        .export = "",
        .psk_file = "/a&b",
        .certificates = "/c" } },
    { "nbds+unix:///?socket=/s", { .socket = "/s", .export = "" } },
    { "nbds+unix://v@/disk?socket=/s%3f&tls-psk-file=k",
      { .socket = "/s?", .export = "disk", .user = "v", .psk_file = "k" } },
  };

  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
    assert_parts (cases[i].text, &cases[i].uri);
  assert (!nbd_uri_is_secure ("nbd://h"));
  assert (!nbd_uri_is_secure ("nbd+unix:///?socket=/s"));
}

/* What may have been meant to protect is not left out. */
static void
test_refused (void)
{
  static const char *const texts[] = {
    "nbds://h/%",
    "nbds://h/%4",
    "nbds://h/%zz",
    "nbds://h/a%00b",
    "nbds://u%@h",
    "nbds://[::1",
    "nbds://h?socket=/s",
    "nbds+unix:///x",
    "nbds+unix:///x?tls-psk-file=k",
    "nbds://h?tls-verify-peer=false",
    "nbds://h?tls-psk-file=%0",
    "nbds://h?tls-psk-file",
    "nbds://h?tls-psk-file=",
    "nbds://h?a=b&tls-certificates",
    "nbds://h?tls-certificates=&tls-psk-file=k",
    "nbds://h?tls-verify-peer",
    "nbds+unix:///x?socket",
    "nbds+unix:///x?socket=",
  };
  struct nbd_uri uri;

  for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
    assert (nbd_uri_parse (texts[i], &uri) == -EINVAL);
}

#define NONCE "0123456789abcdef0123456789abcdef"

static void
test_claims (void)
{
  static const char *const claims[] = {
    "nbd://h/pg@1.alpha.2." NONCE,
    "nbds://u@h:1/pg%401.alpha.2." NONCE "?tls-psk-file=/k",
    "nbd+unix:///pg@1.a.b.2." NONCE "?socket=/s",
  };
  static const char *const others[] = {
    "nbd://h",
    "nbd://h/pg.meta",
    "nbd://u@h/pg." NONCE,
    "nbd://h/pg@1.alpha.2." NONCE "0",
    "nbd://h/pg@1.alpha.2.0123456789abcdef0123456789abcdeF",
    "nbd://h/?x=pg@1.alpha.2." NONCE,
    "http://h/pg@1.alpha.2." NONCE,
  };

  for (unsigned i = 0; i < sizeof claims / sizeof *claims; i++)
    assert (nbd_uri_is_claim (claims[i]));
  for (unsigned i = 0; i < sizeof others / sizeof *others; i++)
    assert (!nbd_uri_is_claim (others[i]));
}

int
main (void)
{
  RUN (test_parts);
  RUN (test_refused);
  RUN (test_claims);
  return 0;
}
