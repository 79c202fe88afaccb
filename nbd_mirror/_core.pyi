# SPDX-License-Identifier: BSD-3-Clause
# What mypy knows of the compiled module: CFFI makes both names at build time.
from typing import Any

ffi: Any
lib: Any
