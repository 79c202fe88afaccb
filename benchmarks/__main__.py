# SPDX-License-Identifier: BSD-3-Clause
"""The command. An interrupt while its parts are imported ends it in silence."""

import sys

try:
    from .bench import main

    status = main()
except KeyboardInterrupt:
    status = 130
sys.exit(status)
