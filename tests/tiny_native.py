"""What the tests of the native build share: a llama.cpp of one file, a patch for it, a console that keeps its text."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

CMAKE = """\
cmake_minimum_required(VERSION 3.18)
project(tiny C CXX)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
add_executable(llama-server main.cpp)
target_compile_definitions(llama-server PRIVATE
    NUMBER="${LLAMA_BUILD_NUMBER}" COMMIT="${LLAMA_BUILD_COMMIT}" SERIES="${LLAMA_PATCH_SERIES}")
"""

MAIN = """\
#include <cstdio>

int main() {
    fprintf(stderr, "version: 0.1 (build %s, commit %s)\\n", NUMBER, COMMIT);
    return 0;
}
"""

PATCH = """\
diff --git a/main.cpp b/main.cpp
index 1111111..2222222 100644
--- a/main.cpp
+++ b/main.cpp
@@ -2,5 +2,6 @@

 int main() {
     fprintf(stderr, "version: 0.1 (build %s, commit %s)\\n", NUMBER, COMMIT);
+    fprintf(stderr, "patches: %s\\n", SERIES);
     return 0;
 }
""".replace("@@\n\n", "@@\n \n")

NEW_FILE = """\
diff --git a/src/memory.h b/src/memory.h
new file mode 100644
index 0000000..3333333
--- /dev/null
+++ b/src/memory.h
@@ -0,0 +1,2 @@
+#pragma once
+int memory();
"""


def make_tree(folder: Path) -> Path:
    """Make a tree that builds a `llama-server` which only tells its version."""
    folder.mkdir()
    (folder / "CMakeLists.txt").write_text(CMAKE)
    (folder / "main.cpp").write_text(MAIN)
    (folder / "LICENSE").write_text("the licence\n")
    return folder


def make_patches(folder: Path) -> Path:
    """Make a series of one patch, after which the server tells its patches too."""
    folder.mkdir()
    (folder / "series").write_text("# in this order\n0001-series.patch  # says which\n\n")
    (folder / "0001-series.patch").write_text(PATCH)
    return folder


class Transcript:
    """A console of the given kind and what was printed on it."""

    def __init__(self, terminal: bool = False) -> None:
        self._file = io.StringIO()
        self.console = Console(file=self._file, width=200, force_terminal=terminal)

    @property
    def text(self) -> str:
        """All that was printed."""
        return self._file.getvalue()
