"""Builds csrc/ into a plain C-ABI shared library: no torch headers, no Python ABI.

SRA_KERNELS_BUILD=auto  build if there is a compiler, otherwise install without (the default)
                 =cpu   fail when the CPU library cannot be built
                 =none  leave it out
"""

import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

BUILD = os.environ.get("SRA_KERNELS_BUILD", "auto")
if BUILD not in ("auto", "cpu", "none"):
    raise SystemExit(f"SRA_KERNELS_BUILD={BUILD!r} is unknown. Use auto, cpu or none.")

# No -ffast-math: it breaks the range reduction of exp (measured: relative gradient error 0.42).
FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
OPENMP = [] if platform.system() == "Darwin" else ["-fopenmp"]


class BuildPlainLibrary(build_ext):
    """A file name without a Python tag, and an install that goes on without the library."""

    def get_export_symbols(self, ext):
        return []

    def get_ext_filename(self, fullname):
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except Exception as error:
            if BUILD == "cpu":
                raise
            print(f"sra: {ext.name} was not built ({error}); the torch backend will serve")

    def copy_extensions_to_source(self):
        """Editable installs copy what was built; what was not built is not an error."""
        built = [
            ext for ext in self.extensions if Path(self.get_ext_fullpath_built(ext.name)).exists()
        ]
        self.extensions = built
        super().copy_extensions_to_source()

    def get_ext_fullpath_built(self, name):
        return Path(self.build_lib) / self.get_ext_filename(self.get_ext_fullname(name))


setup(
    cmdclass={"build_ext": BuildPlainLibrary},
    ext_modules=[]
    if BUILD == "none"
    else [
        Extension(
            "sra_kernels._cpu",
            sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp")),
            include_dirs=["csrc/include"],
            depends=sorted(str(p) for p in Path("csrc").rglob("*.h")),
            language="c++",
            extra_compile_args=FLAGS + OPENMP,
            extra_link_args=OPENMP,
        )
    ],
)
