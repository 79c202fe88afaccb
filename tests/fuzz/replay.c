/* SPDX-License-Identifier: BSD-3-Clause */

/* Run every input of the corpus without libFuzzer, so that any compiler can
 * test what the fuzzers found.
 */

#include <assert.h>
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>

int LLVMFuzzerInitialize (int *argc, char ***argv);
int LLVMFuzzerTestOneInput (const uint8_t *data, size_t size);

static const char *current;

static void
tell (void)
{
  if (current)
    fprintf (stderr, "replay: it was %s\n", current);
}

static void
replay (const char *path)
{
  static uint8_t data[1 << 16];
  FILE *file = fopen (path, "rb");
  size_t size;

  assert (file);
  size = fread (data, 1, sizeof data, file);
  fclose (file);
  current = path;
  printf ("%s\n", path);
  fflush (stdout); /* the last line names the one that crashed */
  LLVMFuzzerTestOneInput (data, size);
  current = NULL;
}

int
main (int argc, char *argv[])
{
  unsigned nr = 0;

  atexit (tell);
  LLVMFuzzerInitialize (&argc, &argv);
  for (int i = 1; i < argc; i++) {
    DIR *dir = opendir (argv[i]);
    struct dirent *entry;

    assert (dir);
    while ((entry = readdir (dir))) {
      char path[4096];

      snprintf (path, sizeof path, "%s/%s", argv[i], entry->d_name);
      if (entry->d_name[0] == '.')
        continue;
      replay (path);
      nr++;
    }
    closedir (dir);
  }
  assert (nr > 0);
  return 0;
}
