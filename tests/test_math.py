"""The C++ kernels' elementary functions against float64, over their whole range."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

CSRC = Path(__file__).parent.parent / "csrc"
SHIM = """
#include "math.h"
#define SHIM(NAME, TYPE, OF) \\
  extern "C" CLONES void NAME(const TYPE* x, TYPE* y, int64_t n) { \\
    for (int64_t i = 0; i < n; ++i) y[i] = OF; \\
  }
SHIM(exp_f32, float, sra::exp_of(x[i]))
SHIM(expm1_f32, float, sra::expm1_of(x[i]))
SHIM(excess_f32, float, sra::exp_excess(x[i]))
SHIM(log1p_f32, float, sra::log1p_of(x[i]).value)
SHIM(shortfall_f32, float, sra::log1p_of(x[i]).shortfall)
SHIM(tanh_f32, float, sra::tanh_of(x[i]))
SHIM(load_f16, float, sra::load(sra::f16{uint16_t(int(x[i]))}))
SHIM(excess_f64, double, sra::exp_excess(x[i]))
SHIM(shortfall_f64, double, sra::log1p_of(x[i]).shortfall)
"""


def excess(x):  # e^x - 1 - x
    return np.where(np.abs(x) < 0.1, series(x, lambda k: 1 / factorial(k)), np.expm1(x) - x)


def shortfall(u):  # u - log(1 + u)
    return np.where(np.abs(u) < 0.1, series(u, lambda k: (-1) ** k / k), u - np.log1p(u))


def factorial(k):
    return float(np.prod(np.arange(1, k + 1, dtype=float)))


def series(x, coefficient):
    return sum(coefficient(k) * x**k for k in range(40, 1, -1))


# name -> (in float64, from, to, units in the last place)
FLOAT32 = {
    "exp": (np.exp, -87.2, 88.0, 1.0),
    "expm1": (np.expm1, -20.0, 88.0, 1.5),
    "excess": (excess, -0.5, 0.5, 2.0),
    "log1p": (np.log1p, -0.999, 1e6, 3.0),
    "tanh": (np.tanh, -12.0, 12.0, 2.0),
}


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("math")
    (folder / "shim.cpp").write_text(SHIM)
    flags = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
    subprocess.run(
        ["g++", *flags, f"-I{CSRC / 'cpu'}", f"-I{CSRC / 'include'}", "shim.cpp", "-o", "shim.so"],
        cwd=folder, check=True,
    )  # fmt: skip
    library = ctypes.CDLL(str(folder / "shim.so"))

    def call(name, x):
        y = np.empty_like(x)
        getattr(library, name)(
            x.ctypes.data_as(ctypes.c_void_p), y.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int64(len(x)),
        )  # fmt: skip
        return y

    return call


def samples(low, high, dtype):
    """Even steps, and magnitudes down to 1e-6 on either side of 0."""
    near = np.concatenate([sign * np.logspace(-6, 0, 20_001) for sign in (-1, 1)])
    x = np.concatenate([np.linspace(low, high, 200_001), near[(near > low) & (near < high)]])
    return x.astype(dtype)


@pytest.mark.parametrize("name", FLOAT32)
def test_float32_is_good_to_the_last_places(shim, name):
    function, low, high, ulps = FLOAT32[name]
    x = samples(low, high, np.float32)
    want = function(x.astype(np.float64))
    got = shim(f"{name}_f32", x).astype(np.float64)
    unit = np.spacing(np.abs(want).astype(np.float32)).astype(np.float64)
    assert (np.abs(got - want) / unit).max() < ulps


def test_the_shortfall_of_log1p_keeps_its_accuracy_near_zero(shim):
    x = samples(-0.5, 0.5, np.float32)
    x = x[x != 0]
    want = shortfall(x.astype(np.float64))
    got = shim("shortfall_f32", x).astype(np.float64)
    assert (np.abs(got / want - 1)).max() < 2e-6
    naive = (x - np.log1p(x)).astype(np.float64)  # what it is there for
    assert (np.abs(naive / want - 1)).max() > 1e-2


@pytest.mark.parametrize(("name", "function"), [("excess", excess), ("shortfall", shortfall)])
def test_float64(shim, name, function):
    x = samples(-0.5, 0.5, np.float64)
    x = x[x != 0]
    assert (np.abs(shim(f"{name}_f64", x) / function(x) - 1)).max() < 3e-14


def test_the_ends_of_the_range(shim):
    x = np.array([-np.inf, -1e30, -88.0, 0.0, np.nan], dtype=np.float32)
    np.testing.assert_array_equal(shim("exp_f32", x), [0, 0, 0, 1, np.nan])
    assert np.isnan(shim("log1p_f32", np.array([np.nan], dtype=np.float32)))[0]
    np.testing.assert_array_equal(
        shim("tanh_f32", np.array([-1e30, 1e30, np.inf], dtype=np.float32)), [-1, 1, 1]
    )


def test_every_float16_is_read_as_it_is(shim):
    bits = np.arange(2**16)
    want = bits.astype(np.uint16).view(np.float16).astype(np.float32)
    got = shim("load_f16", bits.astype(np.float32))
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(want))
