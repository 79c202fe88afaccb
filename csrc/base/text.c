/* SPDX-License-Identifier: BSD-3-Clause */

/* Characters of text from other programs, which may try to control a terminal
 * or to look like our own lines.
 */

#include <stdbool.h>

#include "base/text.h"

/* Does a character of UTF-8 begin there, and is it the shortest form of one?  A
 * terminal may take a longer form for the same character.
 */
static bool
is_shortest (const unsigned char *at)
{
  switch (at[0]) {
  case 0xe0:
    return at[1] >= 0xa0;
  case 0xed:
    return at[1] < 0xa0; /* else a half of a character of UTF-16 */
  case 0xf0:
    return at[1] >= 0x90;
  case 0xf4:
    return at[1] < 0x90; /* else beyond the last character */
  default:
    return at[0] >= 0xc2 && at[0] < 0xf5;
  }
}

/* U+0080 to U+009F are control characters of a terminal as well: U+009B is ESC
 * [ in one.  U+2028 and U+2029 end a line for some programs, and U+202A to
 * U+202E and U+2066 to U+2069 show text in another order.
 */
static bool
is_control (const unsigned char *at)
{
  switch (at[0]) {
  case 0xc2:
    return at[1] < 0xa0;
  case 0xe2:
    return (at[1] == 0x80 && at[2] >= 0xa8 && at[2] <= 0xae)
           || (at[1] == 0x81 && at[2] >= 0xa6 && at[2] <= 0xa9);
  default:
    return at[0] < 0x80 && ((at[0] < ' ' && at[0] != '\t') || at[0] == 0x7f);
  }
}

size_t
text_plain_char (const char *text)
{
  const unsigned char *at = (const unsigned char *)text;
  size_t size = at[0] < 0x80 ? 1 : at[0] < 0xe0 ? 2 : at[0] < 0xf0 ? 3 : 4;

  for (size_t i = 1; i < size; i++)
    if ((at[i] & 0xc0) != 0x80)
      return 0;
  if (size > 1 && !is_shortest (at))
    return 0;
  return is_control (at) ? 0 : size;
}
