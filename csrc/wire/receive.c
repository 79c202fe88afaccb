/* SPDX-License-Identifier: BSD-3-Clause */

/* Receive bytes from a process that may also send open files.
 *
 * On a unix socket any message can carry descriptors (SCM_RIGHTS).  If the
 * receiver has no room for them, the kernel closes the files on the thread that
 * receives.  The last close of a file may wait: a TCP socket with SO_LINGER
 * waits for as long as its owner has chosen.  So a hostile server could block
 * the ticker, and a hostile client a thread that holds a range.  Therefore this
 * file receives the descriptors, and a separate thread closes them.
 *
 * Urgent bytes (MSG_OOB) carry files too.  A recv skips such a byte, and the
 * kernel closes its files at once, on the same thread.  So the socket is told
 * to deliver urgent bytes like others: receive_prepare.
 *
 * The close of a socket closes the files of its unread messages.  So such a
 * thread also closes a socket that still has bytes.
 *
 * Linux from 6.16 can refuse files when they are sent (SO_PASSRIGHTS): sendmsg
 * gives EPERM, and nothing arrives.  A socket that is accepted has the option
 * of its listener.  All of the above stays for files that were sent before the
 * option was set, and for older kernels.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "wire/receive.h"

/* Linux 6.16.  Debian's headers are older than the kernels that it may run on;
 * two architectures number the options on their own.
 */
#if !defined SO_PASSRIGHTS && !defined __sparc__ && !defined __hppa__
#define SO_PASSRIGHTS 83
#endif

#define MAX_FILES 253 /* in a message: the kernel's SCM_MAX_FD */
#define STACK_BYTES (64u << 10)

struct files {
  size_t nr;
  int fds[MAX_FILES];
};

static void *
close_files (void *opaque)
{
  struct files *files = opaque;

  for (size_t i = 0; i < files->nr; i++)
    close (files->fds[i]);
  free (files);
  return NULL;
}

/* False: no thread could start, and the files are still open. */
static bool
close_apart (struct files *files)
{
  pthread_attr_t attr;
  pthread_t thread;
  int err = pthread_attr_init (&attr);

  if (err)
    return false;
  pthread_attr_setdetachstate (&attr, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize (&attr, STACK_BYTES);
  err = pthread_create (&thread, &attr, close_files, files);
  pthread_attr_destroy (&attr);
  return err == 0;
}

/* Without memory or a thread the files stay open: a leak is better than a wait.
 */
static void
give_away (struct msghdr *msg)
{
  struct files *files = malloc (sizeof *files);

  if (files == NULL)
    return;
  files->nr = 0;
  for (struct cmsghdr *c = CMSG_FIRSTHDR (msg); c; c = CMSG_NXTHDR (msg, c)) {
    size_t nr = (c->cmsg_len - CMSG_LEN (0)) / sizeof (int);

    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS
        || nr > MAX_FILES - files->nr)
      continue;
    memcpy (files->fds + files->nr, CMSG_DATA (c), nr * sizeof (int));
    files->nr += nr;
  }
  if (!close_apart (files))
    free (files);
}

void
receive_prepare (int fd)
{
  const int on = 1;

  (void)setsockopt (fd, SOL_SOCKET, SO_OOBINLINE, &on, sizeof on);
#ifdef SO_PASSRIGHTS
  const int off = 0;

  /* ENOPROTOOPT on an older kernel, EOPNOTSUPP over TCP. */
  (void)setsockopt (fd, SOL_SOCKET, SO_PASSRIGHTS, &off, sizeof off);
#endif
}

ssize_t
receive_iov (int fd, struct iovec *iov, size_t nr, int flags)
{
  union {
    char room[CMSG_SPACE (MAX_FILES * sizeof (int))];
    struct cmsghdr align;
  } control;
  struct msghdr msg = { .msg_iov = iov,
                        .msg_iovlen = nr,
                        .msg_control = control.room,
                        .msg_controllen = sizeof control.room };
  ssize_t n = recvmsg (fd, &msg, flags | MSG_CMSG_CLOEXEC);

  if (n < 0 || (msg.msg_controllen == 0 && !(msg.msg_flags & MSG_CTRUNC)))
    return n;
  give_away (&msg);
  errno = EBADMSG;
  return -1;
}

ssize_t
receive (int fd, void *buf, size_t size, int flags)
{
  struct iovec iov = { buf, size };

  return receive_iov (fd, &iov, 1, flags);
}

static bool
is_unix (int fd)
{
  int domain = AF_UNSPEC;
  socklen_t size = sizeof domain;

  return getsockopt (fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) == 0
         && domain == AF_UNIX;
}

void
close_socket (int fd)
{
  struct files *files;
  int unread = 0;

  if (!is_unix (fd)) {
    close (fd);
    return;
  }
  (void)shutdown (fd, SHUT_RDWR); /* nothing more can come */
  files = ioctl (fd, FIONREAD, &unread) == 0 && unread > 0
              ? malloc (sizeof *files)
              : NULL;
  if (files) {
    *files = (struct files){ .nr = 1, .fds = { fd } };
    if (close_apart (files))
      return;
    free (files);
  }
  close (fd);
}
