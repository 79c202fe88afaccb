/* SPDX-License-Identifier: BSD-3-Clause */

/* The thread that enforces all time limits.  See ticker.c. */

#ifndef NBDM_TICKER_H
#define NBDM_TICKER_H

struct nbdm;

int ticker_start (struct nbdm *v);
void ticker_join (struct nbdm *v);

#endif /* NBDM_TICKER_H */
