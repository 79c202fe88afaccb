/* SPDX-License-Identifier: BSD-3-Clause */

/* A client's request as the executor's, and its end as an answer.  See
 * direct_io.c.
 */

#ifndef NBDM_DIRECT_IO_H
#define NBDM_DIRECT_IO_H

struct op;

/* The session's thread: have it carried out, and then answered.  The op is not
 * ours any more.
 */
void op_submit (struct op *op);

#endif /* NBDM_DIRECT_IO_H */
