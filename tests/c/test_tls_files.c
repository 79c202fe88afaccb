/* SPDX-License-Identifier: BSD-3-Clause */

/* The files of TLS: a secret that others can have opens nothing, at a start, at
 * each handshake, and at a client.
 */

#define _GNU_SOURCE

#include "wire/nbd_uri.h"
#include "wire/tls_secrets.h"
#include "direct_secured.h"

/* The line names the file, and no door opens with a secret of others. */
static void
test_files (void)
{
  struct folder folder = folder_make ();
  char path[PATH_MAX + 16];
  struct nbdm_tls files = { .psk = path };
  const struct nbdm_limits usual = { 0 };
  struct direct_server *server;
  int fd;

  bring_up_secured ();
  assert (nbdm_server_open (site.volume, &served.listener, 1, &usual, &server)
          == 0);
  snprintf (path, sizeof path, "%s/psk", folder.path);
  assert (nbdm_server_tls (server, 1, &files) == -EINVAL);
  assert (nbdm_server_tls (server, 0, &files) == -ENOENT);
  ASSERT_SAYS (path);
  fd = open (path, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  assert (fd >= 0 && write (fd, "a:0011\n", 7) == 7);
  close (fd);
  assert (nbdm_server_tls (server, 0, &files) == -EACCES);
  ASSERT_SAYS ("other users");
  assert (chmod (path, 0600) == 0);
  if (geteuid () == 0) { /* only root can give a file away */
    assert (chown (path, 65534, (gid_t)-1) == 0);
    assert (nbdm_server_tls (server, 0, &files) == -EACCES);
    ASSERT_SAYS ("other users");
    assert (chown (path, 0, (gid_t)-1) == 0);
  }
  files = (struct nbdm_tls){ .certificate = path, .private_key = path };
  assert (nbdm_server_tls (server, 0, &files) == -EINVAL);
  ASSERT_SAYS (path);
  /* Others could change a certificate, and read its key. */
  assert (chmod (path, 0644) == 0);
  assert (nbdm_server_tls (server, 0, &files) == -EACCES);
  ASSERT_SAYS ("other users may read this secret");
  for (unsigned i = 0; i < 2; i++) {
    assert (chmod (path, i ? 0602 : 0620) == 0);
    assert (nbdm_server_tls (server, 0, &files) == -EACCES);
    ASSERT_SAYS ("other users may change this file");
  }
  files.private_key = NULL;
  assert (nbdm_server_tls (server, 0, &files) == -EINVAL);
  nbdm_server_close (server);
  take_down ();
  unlink (path);
  assert (rmdir (folder.path) == 0);
  close (folder.fd);
}

/* A new file takes the path. */
static void
put_file (const char *path, const char *text, mode_t mode)
{
  size_t size = strlen (text);
  int fd;

  unlink (path);
  fd = open (path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  assert (fd >= 0 && write (fd, text, size) == (ssize_t)size);
  assert (fchmod (fd, mode) == 0);
  close (fd);
}

#define KEY_LINE TLS_RELAY_USER ":" TLS_RELAY_KEY "\n"
#define SHORT_KEY "00112233445566778899aabbccddee"

/* What may take the place of a file of shared keys. */
static const struct {
  const char *text; /* NULL: a FIFO */
  mode_t mode;
  bool linked;
  const char *key; /* of a client that has what the file says */
  const char *words;
} bad_keys[] = {
  { KEY_LINE, 0644, false, NULL, "other users" },
  { KEY_LINE, 0644, true, NULL, "other users" },
  { KEY_LINE, 0620, false, NULL, "other users" },
  { NULL, 0600, false, NULL, "it is no plain file" },
  { NULL, 0600, true, NULL, "it is no plain file" },
  { TLS_RELAY_USER ":" SHORT_KEY "\n", 0600, false, SHORT_KEY,
    "fewer than 16 bytes" },
  { TLS_RELAY_USER ":ab\n", 0600, false, NULL, "fewer than 16 bytes" },
  { TLS_RELAY_USER ":\n", 0600, false, NULL, "fewer than 16 bytes" },
  { TLS_RELAY_USER ":" TLS_RELAY_KEY "q\n", 0600, false, NULL,
    "no hexadecimal number" },
};
#define NR_BAD_KEYS (sizeof bad_keys / sizeof *bad_keys)

static void
put_bad_key (unsigned i, const char *path, const char *target)
{
  const char *file = bad_keys[i].linked ? target : path;

  unlink (path);
  unlink (target);
  if (bad_keys[i].text)
    put_file (file, bad_keys[i].text, bad_keys[i].mode);
  else
    assert (mkfifo (file, bad_keys[i].mode) == 0);
  if (bad_keys[i].linked)
    assert (symlink (target, path) == 0);
}

/* A file that is changed while the door is open is checked as at its start: it
 * lets no client in, keeps no thread, and the right one lets clients in again.
 */
static void
test_keys_replaced (void)
{
  struct folder folder = folder_make ();
  char path[PATH_MAX + 16], target[PATH_MAX + 16], at[96];
  struct client c;

  snprintf (path, sizeof path, "%s/psk", folder.path);
  snprintf (target, sizeof target, "%s/target", folder.path);
  bring_up_secured ();
  door_close (&served);
  put_file (path, KEY_LINE, 0600);
  door_psk = path;
  snprintf (at, sizeof at, "%s/direct", site.dir);
  door_open (&served, site.volume, at);
  for (unsigned i = 0; i < NR_BAD_KEYS; i++) {
    const struct tls_options has = { .key = bad_keys[i].key };

    put_bad_key (i, path, target);
    assert_turned_away (&has);
    put_file (path, KEY_LINE, 0600);
    c = client_open (door, true);
    round_trip (&c, (uint8_t)i);
    client_leave (&c);
  }
  unlink (path);
  assert_turned_away (&(struct tls_options){ 0 });
  take_down ();
  unlink (target);
  assert (rmdir (folder.path) == 0);
  close (folder.fd);
}

/* A client checks its own file in the same way, and so does a start. */
static void
test_bad_keys_are_not_loaded (void)
{
  struct folder folder = folder_make ();
  char path[PATH_MAX + 16], target[PATH_MAX + 16];
  const struct nbd_uri uri = { .psk_file = path, .user = TLS_RELAY_USER };
  const struct nbdm_tls files = { .psk = path };
  struct tls_secrets *secrets;

  alarm (150);
  snprintf (path, sizeof path, "%s/psk", folder.path);
  snprintf (target, sizeof target, "%s/target", folder.path);
  for (unsigned i = 0; i < NR_BAD_KEYS; i++) {
    put_bad_key (i, path, target);
    assert (tls_secrets_of_uri (&uri, &secrets) < 0);
    ASSERT_SAYS (bad_keys[i].words);
    ASSERT_SAYS (path);
    assert (tls_secrets_load (&files, &secrets) < 0);
    ASSERT_SAYS (bad_keys[i].words);
  }
  put_file (path, "other:" TLS_RELAY_KEY "\r\n" KEY_LINE, 0600);
  assert (tls_secrets_of_uri (&uri, &secrets) == 0);
  tls_secrets_free (secrets);
  put_file (path, "other:" TLS_RELAY_KEY "\n", 0600);
  assert (tls_secrets_of_uri (&uri, &secrets) == -EINVAL);
  ASSERT_SAYS ("it has no key of " TLS_RELAY_USER);
  unlink (path);
  unlink (target);
  assert (rmdir (folder.path) == 0);
  close (folder.fd);
}

int
main (void)
{
  RUN (test_files);
  RUN (test_keys_replaced);
  RUN (test_bad_keys_are_not_loaded);
  return 0;
}
