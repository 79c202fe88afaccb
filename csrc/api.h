/* SPDX-License-Identifier: BSD-3-Clause */

/* nbdm.h, for C: CFFI reads that file as it is, so no guard stands in it. */

#ifndef NBDM_API_H
#define NBDM_API_H

#include <stdint.h>

#include "nbdm.h"

#endif /* NBDM_API_H */
