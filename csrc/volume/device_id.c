/* SPDX-License-Identifier: BSD-3-Clause */

/* Properties that identify a disk across reboots, as far as the kernel reports
 * them.
 *
 * The kernel assigns names like /dev/sdb and device numbers anew at each boot,
 * so they identify nothing.  These properties do:
 *
 *   a file          its inode number and time of birth
 *   a loop device   the file behind it, and the offset in that file
 *   device mapper   its uuid (LVM, LUKS, multipath), else its name
 *   md              the array's uuid
 *   a partition     its number, and its disk
 *   another device  its wwid, else its serial number
 *
 * A file system whose inode numbers change (FUSE) gives no identity.
 */

#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/loop.h>
#include <linux/magic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "logs/superblock.h"
#include "volume/device_id.h"

/* Since Linux 5.15; older headers lack it, and older kernels refuse it. */
#ifndef BLKGETDISKSEQ
#define BLKGETDISKSEQ _IOR (0x12, 128, __u64)
#endif

#define MAX_PATH 96
#define MAX_WORD 160

static void
describe_file (int fd, char *text, size_t size)
{
  struct statx stx;
  struct statfs fs;

  text[0] = '\0';
  if (fstatfs (fd, &fs) == 0 && (uint64_t)fs.f_type == FUSE_SUPER_MAGIC)
    return;
  if (statx (fd, "", AT_EMPTY_PATH, STATX_INO | STATX_BTIME, &stx) < 0)
    return;
  if (stx.stx_mask & STATX_BTIME)
    snprintf (text, size, "inode %llu made at %lld.%09u",
              (unsigned long long)stx.stx_ino, (long long)stx.stx_btime.tv_sec,
              stx.stx_btime.tv_nsec);
  else
    snprintf (text, size, "inode %llu", (unsigned long long)stx.stx_ino);
}

/* Read the first line of a file below the device's folder in /sys, without
 * trailing spaces and with unprintable characters replaced.  False: no such
 * line.
 */
static bool
read_word (const char *folder, const char *name, char *word)
{
  char path[MAX_PATH + 32];
  ssize_t n;
  int fd;

  snprintf (path, sizeof path, "%s/%s", folder, name);
  fd = open (path, O_RDONLY | O_CLOEXEC);
  if (fd < 0)
    return false;
  n = read (fd, word, MAX_WORD - 1);
  close (fd);
  word[n > 0 ? n : 0] = '\0';
  word[strcspn (word, "\n")] = '\0';
  n = (ssize_t)strlen (word);
  while (n > 0 && word[n - 1] == ' ')
    word[--n] = '\0';
  for (char *c = word; *c; c++)
    if ((unsigned char)*c < ' ' || (unsigned char)*c > '~')
      *c = '?';
  return n > 0;
}

static void
describe_loop (int fd, const char *backing, char *text, size_t size)
{
  struct loop_info64 info;
  struct stat st;
  char behind[MAX_WORD];
  int file;

  if (ioctl (fd, LOOP_GET_STATUS64, &info) < 0)
    return;
  snprintf (behind, sizeof behind, "inode %llu",
            (unsigned long long)info.lo_inode);
  /* The path may lead to another file by now. */
  file = open (backing, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file >= 0 && fstat (file, &st) == 0 && st.st_ino == info.lo_inode)
    describe_file (file, behind, sizeof behind);
  if (file >= 0)
    close (file);
  if (behind[0])
    snprintf (text, size, "loop over %s from byte %llu", behind,
              (unsigned long long)info.lo_offset);
}

static void
describe_device (const char *folder, char *text, size_t size)
{
  static const struct {
    const char *file, *word;
  } names[] = { { "dm/uuid", "device mapper uuid" },
                { "dm/name", "device mapper name" },
                { "md/uuid", "md uuid" },
                { "wwid", "wwid" },
                { "device/wwid", "wwid" },
                { "serial", "serial number" },
                { "device/serial", "serial number" } };
  char word[MAX_WORD];

  for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
    if (read_word (folder, names[i].file, word)) {
      snprintf (text, size, "%s %s", names[i].word, word);
      return;
    }
}

static void
describe_block (int fd, dev_t dev, char *text, size_t size)
{
  char folder[MAX_PATH], parent[MAX_PATH + 4], word[MAX_WORD];
  char disk[MAX_WORD + 32] = "";

  snprintf (folder, sizeof folder, "/sys/dev/block/%u:%u", major (dev),
            minor (dev));
  if (read_word (folder, "loop/backing_file", word))
    describe_loop (fd, word, text, size);
  else if (read_word (folder, "partition", word)) {
    snprintf (parent, sizeof parent, "%s/..", folder);
    describe_device (parent, disk, sizeof disk);
    if (disk[0])
      snprintf (text, size, "partition %.16s of %s", word, disk);
  }
  else
    describe_device (folder, text, size);
}

void
device_describe (int fd, char *text, size_t size)
{
  struct stat st;

  text[0] = '\0';
  if (fstat (fd, &st) < 0)
    return;
  if (S_ISBLK (st.st_mode))
    describe_block (fd, st.st_rdev, text, size);
  else
    describe_file (fd, text, size);
}

/* The kernel reuses a device number, but never a disk sequence number. */
void
device_instance (int fd, uint64_t instance[3])
{
  struct stat st;
  uint64_t seq = 0;
  bool known = fstat (fd, &st) == 0;

  memset (instance, 0, 3 * sizeof *instance);
  if (known && S_ISBLK (st.st_mode)) {
    if (ioctl (fd, BLKGETDISKSEQ, &seq) < 0)
      seq = 0;
    instance[0] = seq;
    instance[1] = st.st_rdev;
  }
  else if (known && file_mount_id (fd, instance) < 0)
    memset (instance, 0, 3 * sizeof *instance);
}
