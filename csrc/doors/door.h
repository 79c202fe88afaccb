/* SPDX-License-Identifier: BSD-3-Clause */

/* Calls from the native door to Python: start and stop, never a request.
 *
 * CFFI's embedding API reads these declarations (so no guard, include or
 * conditional stands here) and makes the C functions; their bodies are in
 * nbd_mirror/server/native.py.  All are called on nbdkit's main thread.
 */

/* Open the volume of this configuration file, before any fork.  Returns NULL
 * only if Python itself could not start: any other failure was reported and has
 * ended the process.  `shutdown` asks nbdkit to end; Python may call it on any
 * thread.
 */
struct nbdm *nbdm_door_open (const char *config, void (*shutdown) (void));

/* Start the threads, after any fork. */
void nbdm_door_start (void);

/* Stop cleanly and close the volume; no request may follow. */
void nbdm_door_stop (void);
