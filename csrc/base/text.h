/* SPDX-License-Identifier: BSD-3-Clause */

/* Characters of text from other programs.  See text.c. */

#ifndef NBDM_TEXT_H
#define NBDM_TEXT_H

#include <stddef.h>

/* Length of the UTF-8 character that begins there; 0: no valid one, or a
 * control character.
 */
size_t text_plain_char (const char *text);

#endif /* NBDM_TEXT_H */
