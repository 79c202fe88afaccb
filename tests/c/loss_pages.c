/* SPDX-License-Identifier: BSD-3-Clause */

/* The state directory's files and names, each with the versions that lost
 * power may leave.  See loss.h.
 *
 * A version is what a page was seen to hold at a recorded call.  A sync makes
 * durable what was there when it began, and drops what is older; what was
 * written while it ran may or may not be on the disk.  Names are versioned as
 * one: file systems journal them in order, so that what is left of several
 * changes is a beginning of them.
 */

#include <sys/mman.h>

#include "loss.h"

#define PAGE 4096u
#define MAX_PAGES 256u
#define MAX_VERSIONS 8u
#define MAX_NAMES 16u
#define MAX_DIRECTORIES 32u
#define MAX_INODES 4096u

/* What there may be, all but `lock`, which is no state. */
static const char *const files[]
    = { "superblock", "activity",    "inflight", "dirty.dr0",
        "dirty.dr1",  "dirty.local", "failed",   "unflushed" };

struct version {
  uint64_t stamp;
  uint8_t *bytes;
};

struct page {
  unsigned nr; /* the first is the oldest that may be on the disk */
  struct version version[MAX_VERSIONS];
};

struct inode {
  int fd;
  bool synced; /* its size is durable */
  unsigned nr_pages;
  struct page page[MAX_PAGES];
};

struct name {
  char text[96];
  struct inode *inode;
};

struct directory {
  uint64_t stamp;
  unsigned nr;
  struct name name[MAX_NAMES];
};

static struct directory directories[MAX_DIRECTORIES]; /* oldest first */
static unsigned nr_directories;
static struct inode *inodes[MAX_INODES]; /* all, until pages_drop */
static unsigned nr_inodes;
static uint64_t clock_now;

static void
add_version (struct page *page, const uint8_t *bytes, uint64_t stamp)
{
  /* Any but the oldest and the newest may go: it makes the model weaker by
   * one content of one page.
   */
  if (page->nr == MAX_VERSIONS) {
    unsigned victim = 1 + (unsigned)(stamp % (MAX_VERSIONS - 2));

    free (page->version[victim].bytes);
    memmove (&page->version[victim], &page->version[victim + 1],
             (MAX_VERSIONS - victim - 1) * sizeof page->version[0]);
    page->nr--;
  }
  page->version[page->nr].stamp = stamp;
  page->version[page->nr].bytes = malloc (PAGE);
  assert (page->version[page->nr].bytes);
  memcpy (page->version[page->nr++].bytes, bytes, PAGE);
}

/* Take in what changed; false: nothing had. */
static bool
collect_inode (struct inode *inode)
{
  static uint8_t buf[(MAX_PAGES + 1) * PAGE];
  static const uint8_t zeroes[PAGE];
  ssize_t n = pread (inode->fd, buf, sizeof buf, 0);
  size_t size = n < 0 ? 0 : (size_t)n;
  bool changed = false;

  assert (n >= 0 && size <= MAX_PAGES * PAGE);
  memset (buf + size, 0, PAGE); /* what lies behind its end in its last page */
  for (unsigned i = 0; i * PAGE < size; i++) {
    struct page *page = &inode->page[i];

    if (i == inode->nr_pages) {
      add_version (page, zeroes, 0); /* as a file that grows would read */
      inode->nr_pages++;
    }
    if (memcmp (page->version[page->nr - 1].bytes, buf + i * PAGE, PAGE) != 0) {
      add_version (page, buf + i * PAGE, ++clock_now);
      changed = true;
    }
  }
  return changed;
}

/* Read until two reads are equal, which makes them one instant. The engine's
 * threads store into the mappings while this reads, and a bit that they move
 * from one page to another must be seen in one of them.
 */
void
pages_collect (void)
{
  const struct directory *now = &directories[nr_directories - 1];
  bool changed = true;

  for (unsigned tries = 0; changed; tries++) {
    changed = false;
    assert (tries < 10000);
    for (unsigned i = 0; i < now->nr; i++)
      changed = collect_inode (now->name[i].inode) || changed;
  }
}

static void
drop_oldest (struct page *page)
{
  free (page->version[0].bytes);
  memmove (&page->version[0], &page->version[1],
           --page->nr * sizeof page->version[0]);
}

/* The next version of the names, a copy of the last to be changed. */
static struct directory *
change_names (void)
{
  struct directory *next;

  if (nr_directories == MAX_DIRECTORIES) {
    memmove (&directories[1], &directories[2],
             (MAX_DIRECTORIES - 2) * sizeof directories[0]);
    nr_directories--;
  }
  next = &directories[nr_directories];
  if (nr_directories > 0)
    *next = directories[nr_directories - 1];
  nr_directories++;
  next->stamp = ++clock_now;
  return next;
}

static struct name *
find_name (struct directory *directory, const char *text)
{
  for (unsigned i = 0; i < directory->nr; i++)
    if (strcmp (directory->name[i].text, text) == 0)
      return &directory->name[i];
  return NULL;
}

struct inode *
pages_open (const char *text, int fd)
{
  struct name *name;
  struct inode *inode;
  struct directory *names;

  if (nr_directories > 0) {
    name = find_name (&directories[nr_directories - 1], text);
    if (name)
      return name->inode;
  }
  inode = calloc (1, sizeof *inode);
  assert (inode && nr_inodes < MAX_INODES);
  inodes[nr_inodes++] = inode;
  inode->fd = fcntl (fd, F_DUPFD_CLOEXEC, 3);
  assert (inode->fd >= 0);
  names = change_names ();
  assert (names->nr < MAX_NAMES);
  snprintf (names->name[names->nr].text, sizeof names->name[0].text, "%s",
            text);
  names->name[names->nr++].inode = inode;
  return inode;
}

void
pages_unlink (const char *text)
{
  struct directory *names = change_names ();
  struct name *name = find_name (names, text);

  if (name)
    *name = names->name[--names->nr];
}

void
pages_rename (const char *from, const char *to)
{
  struct directory *names = change_names ();
  struct name *old = find_name (names, to);

  if (old)
    *old = names->name[--names->nr];
  old = find_name (names, from);
  assert (old);
  snprintf (old->text, sizeof old->text, "%s", to);
}

void
pages_drop (void)
{
  for (unsigned i = 0; i < nr_inodes; i++) {
    for (unsigned p = 0; p < inodes[i]->nr_pages; p++)
      for (unsigned v = 0; v < inodes[i]->page[p].nr; v++)
        free (inodes[i]->page[p].version[v].bytes);
    close (inodes[i]->fd);
    free (inodes[i]);
  }
  nr_inodes = nr_directories = 0;
}

void
pages_adopt (int dirfd)
{
  /* What lies there is durable: so it was left by pages_leave, or a clean
   * stop.
   */
  pages_drop ();
  memset (change_names (), 0, sizeof directories[0]);
  for (unsigned i = 0; i < sizeof files / sizeof files[0]; i++) {
    int fd = openat (dirfd, files[i], O_RDWR | O_CLOEXEC);

    if (fd < 0)
      continue;
    pages_open (files[i], fd);
    close (fd);
  }
  pages_collect ();
  for (unsigned i = 0; i < nr_inodes; i++)
    pages_synced (inodes[i], clock_now, 0, UINT64_MAX);
  directories[0] = directories[nr_directories - 1];
  nr_directories = 1;
}

uint64_t
pages_stamp (const struct inode *inode TEST_UNUSED)
{
  pages_collect ();
  return clock_now;
}

static void
names_synced (uint64_t stamp)
{
  while (nr_directories > 1 && directories[1].stamp <= stamp) {
    memmove (&directories[0], &directories[1],
             (nr_directories - 1) * sizeof directories[0]);
    nr_directories--;
  }
}

void
pages_synced (struct inode *inode, uint64_t stamp, uint64_t offset,
              uint64_t length)
{
  if (inode == NULL) {
    names_synced (stamp);
    return;
  }
  inode->synced = true;
  for (uint64_t i = offset / PAGE; i < inode->nr_pages; i++) {
    struct page *page = &inode->page[i];

    if (length <= i * PAGE - offset)
      break;
    while (page->nr > 1 && page->version[1].stamp <= stamp)
      drop_oldest (page);
  }
}

/* --- what is left ---------------------------------------------------- */

static const uint8_t *
choose (const struct page *page, enum loss_how how, uint64_t *random)
{
  if (how == LOSS_UNSYNCED)
    return page->version[0].bytes;
  if (how == LOSS_NOTHING)
    return page->version[page->nr - 1].bytes;
  return page->version[peer_random (random) % page->nr].bytes;
}

static void
leave_page (int fd, unsigned index, const struct page *page, enum loss_how how,
            uint64_t *random)
{
  uint8_t buf[PAGE];
  unsigned piece = how == LOSS_SECTORS ? 512 : PAGE;

  for (unsigned at = 0; at < PAGE; at += piece)
    memcpy (buf + at, choose (page, how, random) + at, piece);
  assert (pwrite (fd, buf, PAGE, (off_t)index * PAGE) == PAGE);
}

static void
leave_file (int dirfd, const struct name *name, enum loss_how how,
            uint64_t *random)
{
  const struct inode *inode = name->inode;
  int fd = openat (dirfd, name->text, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC,
                   0600);
  unsigned nr = inode->nr_pages;

  assert (fd >= 0);
  if (!inode->synced && how == LOSS_UNSYNCED)
    nr = 0;
  for (unsigned i = 0; i < nr; i++)
    leave_page (fd, i, &inode->page[i], how, random);
  if (nr == inode->nr_pages && nr > 0) {
    struct stat st;
    assert (fstat (inode->fd, &st) == 0 && ftruncate (fd, st.st_size) == 0);
  }
  close (fd);
}

static void
empty_directory (int dirfd)
{
  static const char *const endings[] = { "", "~new", "~bad" };
  char file[96];

  for (unsigned i = 0; i < sizeof files / sizeof files[0]; i++)
    for (unsigned e = 0; e < 3; e++) {
      snprintf (file, sizeof file, "%s%s", files[i], endings[e]);
      assert (unlinkat (dirfd, file, 0) == 0 || errno == ENOENT);
    }
}

void
pages_leave (int dirfd, enum loss_how how, uint64_t *random)
{
  const struct directory *names = &directories[nr_directories - 1];

  if (how == LOSS_UNSYNCED)
    names = &directories[0];
  else if (how != LOSS_NOTHING)
    names = &directories[peer_random (random) % nr_directories];
  empty_directory (dirfd);
  for (unsigned i = 0; i < names->nr; i++)
    leave_file (dirfd, &names->name[i], how, random);
}
