/* SPDX-License-Identifier: BSD-3-Clause */

/* Compare the local disk with the volume's samples before it is used.
 *
 *   content compared       the device is          result
 *   a sample differs       any                    refused
 *   same, and not empty    the same, or unknown   used
 *   same, and not empty    another                used, and reported: a copy
 *                                                 or a device with a new name
 *   none, or only zeroes   the same, or unknown   used
 *   none, or only zeroes   another                refused: nothing proves it
 *
 * After a crash of a small volume that was busy everywhere, no sample can be
 * compared.  Any new disk holds zeroes, so zeroes prove nothing.  Nor does a
 * block that cannot be read: sectors go bad.  Some samples are not believed,
 * and so refuse nothing: those of another session (an older program ran since),
 * those of a superblock that has lost a slot, and all samples if the activity
 * log is lost.
 *
 * The check runs before a start changes any file (open.c): if the operator then
 * puts the right disk back, the state still matches it.
 */

#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "api.h"
#include "base/error.h"
#include "base/fault.h"
#include "base/file.h"
#include "life/identity_check.h"
#include "life/node_open.h"
#include "life/recover.h"
#include "logs/activity.h"
#include "logs/dirty_map.h"
#include "logs/layout.h"
#include "logs/superblock.h"
#include "volume/device_id.h"
#include "volume/identity.h"
#include "volume/node.h"
#include "volume/volume.h"

struct comparison {
  struct disk_sample
      samples[NR_SAMPLES]; /* of blocks that cannot have changed */
  uint32_t nr;
  uint32_t compared, with_data, differ;
  uint64_t offset; /* of the first block that differs */
  /* Of this disk, and of the earlier one, from device_describe. */
  char device[sizeof ((struct disk_superblock *)0)->local_device];
  char left[sizeof ((struct disk_superblock *)0)->local_device];
  bool same_device; /* `device` is `left`, or one of the two is not known */
};

static void
choose_samples_locked (const struct nbdm *v, struct comparison *c)
{
  for (uint32_t i = 0; i < NR_SAMPLES; i++) {
    uint64_t number = le64toh (v->sb.samples[i].block);

    if (number == 0 || sample_in_flux_locked (v, number - 1))
      continue;
    c->samples[c->nr++] = v->sb.samples[i];
  }
}

static void
compare_sample (const struct nbdm *v, int fd, const struct disk_sample *sample,
                uint8_t *buf, struct comparison *c)
{
  uint64_t block = le64toh (sample->block) - 1;
  uint64_t length = sample_length (v, block), offset = block * SAMPLE_BLOCK;

  if (full_pread (fd, buf, length, offset) < 0)
    return;
  c->compared++;
  if (sample_crc (buf, length) == le64toh (sample->crc)) {
    c->with_data += sample->crc != 0;
    return;
  }
  if (c->differ == 0 || offset < c->offset)
    c->offset = offset;
  c->differ++;
}

static void
compare_device (int fd, struct comparison *c)
{
  device_describe (fd, c->device, sizeof c->device);
  c->same_device = c->left[0] == '\0' || c->device[0] == '\0'
                   || strncmp (c->left, c->device, sizeof c->device) == 0;
}

static int
compare (const struct nbdm *v, int fd, struct comparison *c)
{
  uint8_t *buf = malloc (SAMPLE_BLOCK);

  if (buf == NULL)
    return set_error (-ENOMEM, "samples of the local disk");
  for (uint32_t i = 0; i < c->nr; i++)
    compare_sample (v, fd, &c->samples[i], buf, c);
  free (buf);
  compare_device (fd, c);
  return 0;
}

static int
judge (const char *path, const struct comparison *c)
{
  if (c->differ > 0 && c->same_device)
    return set_message (
        -EMEDIUMTYPE,
        "the local disk %s is not the same disk as before: %u of %u samples "
        "differ, the first at byte %llu; another program wrote to it, or an "
        "older copy of it or of the state was put back; nothing was written to "
        "it",
        path, c->differ, c->compared, (unsigned long long)c->offset);
  if (c->differ > 0)
    return set_message (
        -EMEDIUMTYPE,
        "the local disk %s is not the same disk as before: %u of %u samples "
        "differ, the first at byte %llu; it is %s, and was %.239s; nothing was "
        "written to it",
        path, c->differ, c->compared, (unsigned long long)c->offset, c->device,
        c->left);
  if (c->with_data == 0 && !c->same_device)
    return set_message (
        -EMEDIUMTYPE,
        "the local disk %s may not be the same disk as before: it is %s, and "
        "was %.239s, and none of its content could be compared; nothing was "
        "written to it",
        path, c->device, c->left);
  return 0;
}

int
identity_check_size (const struct nbdm *v, const char *path,
                     uint64_t local_size)
{
  if (local_size >= v->size)
    return 0;
  return set_message (-ENOMEDIUM,
                      "the local disk %s has %llu bytes, the volume %llu: it "
                      "is another disk, or its end was cut off and is lost; "
                      "nothing was written to it",
                      path, (unsigned long long)local_size,
                      (unsigned long long)v->size);
}

/* --- at a start ---------------------------------------------------------- */

/* Load the set as the start finds it; recovery loads it again to change it. */
static bool
load_activity (struct nbdm *v)
{
  uint64_t nr_extents = (v->size - 1) / EXTENT_SIZE + 1;
  bool clean;
  int rc
      = activity_open (&v->activity, v->dirfd, v->uuid, le64toh (v->sb.session),
                       ACTIVITY_EXTENTS, EXTENT_SIZE, nr_extents, &clean);

  return rc == 0 && volume_check_log (v, "activity", &v->activity.header) == 0;
}

/* Are the identity's fields of the superblock's session? */
static bool
maintained (const struct nbdm *v)
{
  return (le64toh (v->sb.compatible) & FEATURE_IDENTITY)
         && v->sb.identity_session == v->sb.session;
}

/* And were the samples maintained up to the last instant? */
static bool
believed (const struct nbdm *v)
{
  return maintained (v) && !v->identity.doubted;
}

void
identity_take_by_force (struct nbdm *v)
{
  if (!v->identity.forced)
    return;
  for (uint32_t i = 0; i < v->nr_remotes; i++) {
    struct remote *r = &v->remotes[i];

    if (r->disk.is_node)
      continue;
    dirty_map_mark (&r->disk.dm, 0, v->nr_regions, true);
    r->assumed = false;
    if (r->state == NBDM_IN_SYNC)
      r->state = NBDM_OUT_OF_SYNC;
    disk_explain_locked (&r->disk,
                         "the local disk was taken by force: all of it is "
                         "copied");
  }
  node_took_disk (v);
  snprintf (v->reason, sizeof v->reason,
            "the local disk is not the same disk as before, and was taken by "
            "force: everything is copied to every remote");
}

static void
note_changes (struct nbdm *v, const struct comparison *c, uint64_t local_size)
{
  uint64_t before = le64toh (v->sb.local_size);

  if (before && local_size != before)
    snprintf (v->identity.note, sizeof v->identity.note,
              "the local disk had %llu bytes and has %llu: the volume still "
              "has %llu",
              (unsigned long long)before, (unsigned long long)local_size,
              (unsigned long long)v->size);
  else if (!c->same_device)
    snprintf (v->identity.note, sizeof v->identity.note,
              "the local disk is another device than before, with the same "
              "content: it is %.80s",
              c->device);
}

/* The same disk with a new mount of its file system, or attached again: it was
 * unplugged, an array was stopped, a network volume was reconnected.  Its
 * answered and unflushed writes may be gone, as after lost power, although the
 * page cache of the state survived.  For another device with the same content
 * the flag stays false: its active extents must be compared with the remotes.
 */
static void
note_instance (struct nbdm *v, const struct comparison *c)
{
  static const uint64_t unknown[3];
  uint64_t now[3];

  device_instance (v->local.file.fd, now);
  for (unsigned i = 0; i < 3; i++)
    now[i] = htole64 (now[i]);
  v->identity.cache_lost
      = c->same_device && memcmp (now, unknown, sizeof now) != 0
        && memcmp (v->sb.local_instance, unknown, sizeof unknown) != 0
        && memcmp (v->sb.local_instance, now, sizeof now) != 0;
}

/* The samples of a superblock that has lost a slot may be old, and so may the
 * instance.  But an instance that is gone never comes back: if it is not the
 * present one, the cache may be lost.
 */
static void
note_doubted_instance (struct nbdm *v)
{
  struct comparison c = { 0 };

  memcpy (c.left, v->sb.local_device, sizeof c.left);
  compare_device (v->local.file.fd, &c);
  note_instance (v, &c);
}

static int
check_believed (struct nbdm *v, const struct nbdm_params *params,
                uint64_t local_size)
{
  struct comparison c = { 0 };
  int rc;

  memcpy (c.left, v->sb.local_device, sizeof c.left);
  if (!v->local.disk.map_lost) /* else local may miss everything */
    choose_samples_locked (v, &c);
  rc = compare (v, v->local.file.fd, &c);
  if (rc == 0)
    rc = judge (params->local, &c);
  if (rc == -EMEDIUMTYPE && params->local_choice == NBDM_LOCAL_FORCED) {
    if (v->local.state != NBDM_LOCAL_OK)
      return set_message (rc,
                          "%s; it cannot be taken by force, because the "
                          "earlier disk missed writes that only the remotes "
                          "have",
                          last_error ());
    v->identity.forced = true;
    return 0;
  }
  if (rc == 0) {
    note_changes (v, &c, local_size);
    note_instance (v, &c);
  }
  return rc;
}

/* At a start no other thread runs yet. */
static void
adopt (struct nbdm *v)
{
  struct described_disk disk;

  identity_describe (v, &disk);
  identity_adopt_locked (v, &disk);
}

int
identity_check_start (struct nbdm *v, const struct nbdm_params *params,
                      uint64_t local_size)
{
  bool active_known = load_activity (v);
  int rc = 0;

  if (!believed (v)) {
    if (maintained (v) && v->local.state != NBDM_LOCAL_FAILED)
      note_doubted_instance (v);
    identity_forget_locked (v);
  }
  else if (!active_known) {
    /* Durably, before an empty log replaces the lost one: if this start ended
     * between the two, the next one would believe old samples.
     */
    identity_forget_locked (v);
    rc = superblock_store (v->sb_fd, &v->sb, &v->nodes);
  }
  else if (v->local.state != NBDM_LOCAL_FAILED)
    rc = check_believed (v, params, local_size);
  activity_close (&v->activity);
  fault_point ("identity_checked");
  if (rc == 0 && v->local.state != NBDM_LOCAL_FAILED && !v->identity.forced)
    adopt (v);
  return rc;
}

/* A forced disk belongs to the volume only now, when all remotes' maps are
 * durably dirty: after a start that failed earlier the disk is still refused.
 */
void
identity_begin (struct nbdm *v)
{
  if (v->identity.forced) {
    identity_forget_locked (v);
    adopt (v);
  }
  v->sb.compatible = htole64 (FEATURE_IDENTITY);
  v->sb.identity_session = v->sb.session;
}

/* --- after local failed -------------------------------------------------- */

void
identity_choose_locked (const struct nbdm *v, struct attached_check *check)
{
  struct comparison c = { 0 };

  choose_samples_locked (v, &c);
  memcpy (check->samples, c.samples, sizeof check->samples);
  check->nr = c.nr;
  memcpy (check->device, v->sb.local_device, sizeof check->device);
}

int
identity_check_attached (const struct nbdm *v, struct attached_check *check,
                         const struct local_file *disk, const char *path)
{
  struct comparison c = { .nr = check->nr };
  int rc;

  memcpy (c.samples, check->samples, sizeof c.samples);
  memcpy (c.left, check->device, sizeof c.left);
  rc = compare (v, disk->fd, &c);
  /* Where the content proves nothing, the comparison with a remote comes next.
   */
  check->unproven = c.with_data == 0 && !c.same_device;
  return rc == 0 && c.differ > 0 ? judge (path, &c) : rc;
}

/* Only a remote that misses nothing may serve: data that it misses would be
 * lost.
 */
static bool
has_everything (const struct remote *r)
{
  return r->state == NBDM_IN_SYNC && node_has_generation_locked (r)
         && !r->disk.map_lost && r->disk.dm.mapping
         && r->disk.dm.map[MAP_DIRTY].nr_set == 0
         && r->disk.dm.map[MAP_DOUBTS].nr_set == 0;
}

/* Delete local's map before the superblock says failed: if this start ends
 * before it creates a new map, the next must find a lost map, not one of a disk
 * that misses nothing.  While the superblock still says ok, the old map is not
 * needed.
 */
static int
forget_local_map (struct nbdm *v)
{
  dirty_map_close (&v->local.disk.dm);
  v->local.disk.map_lost
      = true; /* a new map says that local misses everything */
  if (unlinkat (v->dirfd, "dirty." LOCAL_NAME, 0) < 0 && errno != ENOENT)
    return set_error (-errno, "cannot remove dirty." LOCAL_NAME);
  if (fsync (v->dirfd) < 0)
    return set_error (-errno, "cannot make the names in the state directory "
                              "durable");
  return 0;
}

int
identity_give_up_local (struct nbdm *v)
{
  bool found = false;
  int rc;

  if (!v->identity.given_up)
    return 0;
  for (uint32_t i = 0; i < v->nr_remotes; i++)
    found = found || has_everything (&v->remotes[i]);
  if (!found)
    return set_message (-ENOTCONN,
                        "no remote was in sync at the end: without the local "
                        "disk its newest writes are lost");
  rc = forget_local_map (v);
  if (rc < 0)
    return rc;
  v->sb.local_state = htole32 (NBDM_LOCAL_FAILED);
  return superblock_store (v->sb_fd, &v->sb, &v->nodes);
}
