/* SPDX-License-Identifier: BSD-3-Clause */

/* Translates a client's request for the executor, and its end to an answer.
 * See direct_io.c.
 */

#ifndef NBDM_DIRECT_IO_H
#define NBDM_DIRECT_IO_H

struct op;

/* Let the executor carry out the op and then answer it.  The caller must not
 * use the op after this.  Only the session's thread calls it.
 */
void op_submit (struct op *op);

#endif /* NBDM_DIRECT_IO_H */
