/* SPDX-License-Identifier: BSD-3-Clause */

/* What lost power may leave: a model of the state directory and of the disks,
 * fed by the engine's own system calls (the linker's --wrap) and NBD commands.
 *
 *   loss_pages.c   the files of the state directory.  A page may hold, sector
 *                  by sector, anything it held since it was last synced; a
 *                  name may be any it was since the directory was last synced
 *   loss_disks.c   the disks, by region.  A region may hold what it held when
 *                  it was last flushed, or what any later write brought, also
 *                  one that was only begun or only sent
 *   loss_record.c  the calls that feed both, and the lock that makes each of
 *                  them, and a look at all of it, one instant; those of the
 *                  remotes are in loss_remotes.c
 *   loss_judge.c   what recovery makes of it, at such an instant
 *
 * So a crash is not tried out, it is computed, at every recorded call: what the
 * state files may be is put into a directory and recovered from; whatever could
 * differ between any content of local and any content of a remote must then be
 * dirty.
 */

#ifndef NBDM_LOSS_H
#define NBDM_LOSS_H

#include "nbd_peer.h"
#include "site.h"

#define LOSS_UNIT                                                              \
  4096u /* bytes; the region size of a volume under the model                  \
         */

/* --- loss_record.c --------------------------------------------------- */

/* The test's function for each recorded call, which holds the lock. `sync` is
 * true before and after each call that makes something durable.
 */
typedef void (*loss_event) (bool sync);

/* Record what this site's volume does from now on, as of what lies there now,
 * which counts as durable; remotes are as they were recorded, all zeroes at
 * first.  `boot` is the boot id the engine reads; NULL: the
 * kernel's own.
 */
void loss_record (const struct site *site, loss_event event);
void loss_stop_recording (void);
void loss_set_boot (const char *boot);
/* Until NULL is set again, this thread reads this boot id, and its calls are
 * not recorded.
 */
void loss_pretend_boot (const char *boot);
void loss_lock (void);
void loss_unlock (void);

/* --- loss_remotes.c -------------------------------------------------- */

/* For the peers of the site (struct peer_params). */
void loss_enter (void *remote);
void loss_applied (void *remote, const struct peer_command *cmd);
void loss_leave (void *remote);
/* Commands of earlier connections will not arrive any more. */
void loss_forget_old (uint32_t remote);

/* --- loss_pages.c ---------------------------------------------------- */

enum loss_how {
  LOSS_UNSYNCED, /* all that was not synced is lost */
  LOSS_NOTHING,  /* all of it had reached the disk, or the kernel lives */
  LOSS_PAGES,    /* each page as it may be */
  LOSS_SECTORS   /* each sector of each page */
};

struct inode;

void pages_adopt (int dirfd);
void pages_drop (void);
struct inode *pages_open (const char *name, int fd);
void pages_rename (const char *from, const char *to);
void pages_unlink (const char *name);
/* Take in what the files hold now. */
void pages_collect (void);
/* A sync begins: the stamp for its end.  NULL: of the directory. */
uint64_t pages_stamp (const struct inode *inode);
void pages_synced (struct inode *inode, uint64_t stamp, uint64_t offset,
                   uint64_t length);
/* Write into the directory, which is emptied, what may be left. */
void pages_leave (int dirfd, enum loss_how how, uint64_t *random);

/* --- loss_disks.c ---------------------------------------------------- */

#define LOSS_LOCAL 0u /* disks: remote i is 1 + i */

struct write_op;

void disks_init (uint64_t size, uint32_t nr_disks);
void disks_free (void);
/* Take the local disk as it is, all of it durable, because the primary has lost
 * power. Not for a remote, whose cache survives that.
 */
void disk_adopt_local (int fd);
/* A remote lost power: all it holds is durable.  What was sent may be under
 * way still.
 */
void disk_lost_power (uint32_t disk, const uint8_t *image);
/* A write that begins, or is sent (`serial` of the connection, `cookie`);
 * `data` NULL: zeroes.
 */
struct write_op *disk_begin (uint32_t disk, uint64_t offset, uint64_t length,
                             const void *data, uint64_t serial);
void disk_set_cookie (struct write_op *op, uint64_t cookie);
struct write_op *disk_find (uint32_t disk, uint64_t cookie, uint64_t offset,
                            uint64_t length);
/* Is it with this `data` that it was begun? */
bool disk_brings (const struct write_op *op, const void *data);
/* It never happens. */
void disk_cancel (uint32_t disk, struct write_op *op);
/* The write has ended: a read sees it. With `durable` the medium has it and no
 * older content.
 */
void disk_end (uint32_t disk, struct write_op *op, bool durable);
/* What had ended by the stamp is durable. */
uint64_t disk_stamp (void);
void disk_flushed (uint32_t disk, uint64_t stamp);
/* Of earlier connections and not applied: cancelled. */
void disk_forget (uint32_t disk, uint64_t before_serial);
/* Bit by region: may local and the remote differ after lost power of both, or
 * with `lived` after the primary's process died and the remote lost power?
 */
void disks_may_differ (uint32_t disk, bool lived, uint64_t *bits);
/* Bit by region: a command that was sent may still arrive. */
void disk_may_change (uint32_t disk, uint64_t *bits);
/* Make what lost power may leave on the local disk: any content of each
 * region.
 */
void disk_leave_local (int fd, enum loss_how how, uint64_t *random);
/* The same for a part of the disk, in another file, whatever that holds now. */
void disk_leave_part (int fd, uint64_t offset, uint64_t length,
                      enum loss_how how, uint64_t *random);
/* Is this, and nothing else, what lost power would leave there? */
bool disk_holds (uint32_t disk, uint64_t offset, uint64_t length,
                 const void *data);
/* Are the images what the model takes them for? */
void disk_check (uint32_t disk, int fd, const uint8_t *image);

#endif /* NBDM_LOSS_H */
