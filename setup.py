"""Builds csrc/ into plain C-ABI shared libraries: no torch headers, no Python ABI.

SRA_KERNELS_BUILD=auto  the CPU library where there is a C++ compiler, the CUDA library where there
                        is nvcc (NVCC, the PATH, CUDA_HOME or /usr/local/cuda); otherwise without
                 =cpu   the CPU library alone; fail when it cannot be built
                 =cuda  both; fail when either cannot be built
                 =none  neither
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

BUILD = os.environ.get("SRA_KERNELS_BUILD", "auto")
DEMANDED = {"auto": (), "cpu": ("_cpu",), "cuda": ("_cpu", "_cuda"), "none": ()}
if BUILD not in DEMANDED:
    raise SystemExit(f"SRA_KERNELS_BUILD={BUILD!r} is unknown. Use auto, cpu, cuda or none.")

# No -ffast-math: it breaks the range reduction of exp (measured: relative gradient error 0.42).
FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
OPENMP = [] if platform.system() == "Darwin" else ["-fopenmp"]
# Binaries for A100, H100 and B200 (each serves its whole generation), PTX for what comes after.
CUDA_TARGETS = (80, 90, 100)
CUDA_FLAGS = ["-O3", "-std=c++17", "--shared", "--threads", "2", "-Xcompiler", "-fPIC"]


def find_nvcc():
    homes = [os.environ.get("CUDA_HOME", "/nonexistent"), "/usr/local/cuda"]
    named = os.environ.get("NVCC")
    if named is not None:
        return shutil.which(named)
    return shutil.which("nvcc") or shutil.which(
        "nvcc", path=os.pathsep.join(f"{home}/bin" for home in homes)
    )


def generated(nvcc):
    """The flags for those targets that this nvcc knows: the last needs CUDA 12.8."""
    listing = subprocess.run([nvcc, "--list-gpu-arch"], check=True, stdout=subprocess.PIPE)
    known = [n for n in CUDA_TARGETS if f"compute_{n}" in listing.stdout.decode().split()]
    if not known:
        raise RuntimeError(f"{nvcc} knows no GPU of {CUDA_TARGETS}")
    codes = [(n, f"sm_{n}") for n in known] + [(known[-1], f"compute_{known[-1]}")]
    return [flag for n, code in codes for flag in ("-gencode", f"arch=compute_{n},code={code}")]


class BuildPlainLibraries(build_ext):
    """File names without a Python tag, and an install that goes on without a library."""

    def get_export_symbols(self, ext):
        return []

    def get_ext_filename(self, fullname):
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext):
        name = ext.name.rpartition(".")[2]
        try:
            if name == "_cuda":
                self.build_cuda(ext)
            else:
                super().build_extension(ext)
        except Exception as error:
            if name in DEMANDED[BUILD]:
                raise
            print(f"sra: {ext.name} was not built ({error}); another backend will serve")

    def build_cuda(self, ext):
        nvcc = find_nvcc()
        if nvcc is None:
            raise FileNotFoundError("there is no nvcc")
        target = Path(self.get_ext_fullpath(ext.name))
        if target.exists() and target.stat().st_mtime > newest([*ext.sources, *ext.depends]):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        include = [f"-I{folder}" for folder in ext.include_dirs]
        subprocess.run(
            [nvcc, *CUDA_FLAGS, *generated(nvcc), *include, *ext.sources, "-o", target], check=True
        )

    def copy_extensions_to_source(self):
        """Editable installs copy what was built; what was not built is not an error."""
        self.extensions = [
            ext
            for ext in self.extensions
            if (Path(self.build_lib) / self.get_ext_filename(ext.name)).exists()
        ]
        super().copy_extensions_to_source()


class PlainWheel(bdist_wheel):
    """Nothing in the libraries depends on Python or torch: one wheel a platform serves them all."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


def newest(paths):
    return max(os.stat(path).st_mtime for path in paths)


def sources(folder, *endings):
    return sorted(str(p) for e in endings for p in Path("csrc", folder).rglob(f"*.{e}"))


cpu = Extension(
    "sra_kernels._cpu",
    sources("cpu", "cpp"),
    include_dirs=["csrc/include"],
    depends=sources("cpu", "h") + sources("include", "h"),
    language="c++",
    extra_compile_args=FLAGS + OPENMP,
    extra_link_args=OPENMP,
)
cuda = Extension(
    "sra_kernels._cuda",
    sources("cuda", "cu"),
    include_dirs=["csrc/include"],
    depends=sources("cuda", "h", "cuh") + sources("include", "h"),
)
setup(
    cmdclass={"build_ext": BuildPlainLibraries, "bdist_wheel": PlainWheel},
    ext_modules={"none": [], "cpu": [cpu]}.get(BUILD, [cpu, cuda]),
)
