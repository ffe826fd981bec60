"""Loads the shared library `_native.so` through ctypes and declares its structures (interface.h) and function types.

Importing this module raises ImportError or OSError with the reason if the library cannot be used.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path

INTERFACE = 8
"""Must equal INTERFACE in interface.h: a library built from other sources may have other structures."""

CARRY = 5  # as in interface.h

ISA_VARIABLE = "ALP_KERNELS_ISA"
ISAS = ("avx512", "avx2", "portable")


class Stream(Structure):
    _fields_ = [
        ("seed", c_uint64),
        ("row_start", c_int64),
        ("row_ids", c_void_p),
        ("step", c_uint32),
        ("layer", c_uint32),
    ]


class PerturbFwd(Structure):
    _fields_ = [
        ("h", c_void_p),
        ("u", c_void_p),
        ("sigma", c_void_p),
        ("rms", c_void_p),
        ("D", c_int64),
        ("stochastic", c_int32),
    ]


class PerturbBwd(Structure):
    _fields_ = [("du", c_void_p), ("rms", c_void_p), ("D", c_int64)]


class Measure(Structure):
    _fields_ = [("h", c_void_p), ("u", c_void_p), ("sums", c_void_p), ("D", c_int64)]


class PerturbRmsNormFwd(Structure):
    _fields_ = [
        ("perturb", PerturbFwd),
        ("y", c_void_p),
        ("rstd", c_void_p),
        ("scale", c_void_p),
        ("eps", c_float),
    ]


class PerturbRmsNormBwd(Structure):
    _fields_ = [
        ("du", c_void_p),
        ("dy", c_void_p),
        ("u", c_void_p),
        ("rstd", c_void_p),
        ("rms", c_void_p),
        ("scale", c_void_p),
        ("dh", c_void_p),
        ("dsigma", c_void_p),
        ("dweight", c_void_p),
        ("D", c_int64),
    ]


class Head(Structure):
    _fields_ = [
        ("x", c_void_p),
        ("targets", c_void_p),
        ("temperature", c_void_p),
        ("sigma", c_void_p),
        ("V", c_int64),
        ("start", c_int64),
        ("width", c_int64),
        ("logit_scale", c_float),
        ("softcap", c_float),
    ]


class HeadFwd(Structure):
    _fields_ = [
        ("logp", c_void_p),
        ("entropy", c_void_p),
        ("lse", c_void_p),
        ("carry", c_void_p),
        ("base", c_void_p),
        ("sums", c_void_p),
        ("bases", c_void_p),
        ("pieces", c_int64),
    ]


class HeadBwd(Structure):
    _fields_ = [
        ("logp", c_void_p),
        ("entropy", c_void_p),
        ("lse", c_void_p),
        ("dlogp", c_void_p),
        ("dentropy", c_void_p),
        ("rows", c_void_p),
        ("dx", c_void_p),
    ]


class Select(Structure):
    _fields_ = [
        ("logp", c_void_p),
        ("lse", c_void_p),
        ("sums", c_void_p),
        ("bases", c_void_p),
        ("tokens", c_void_p),
        ("p", c_void_p),
        ("counts", c_void_p),
        ("room", c_int64),
        ("pieces", c_int64),
        ("first", c_int64),
        ("bits", c_int32),
    ]


class Sparse(Structure):
    _fields_ = [
        ("starts", c_void_p),
        ("rows", c_void_p),
        ("values", c_void_p),
        ("hidden", c_void_p),
        ("weight", c_void_p),
        ("dhidden", c_void_p),
        ("dweight", c_void_p),
        ("N", c_int64),
        ("V", c_int64),
        ("D", c_int64),
    ]


class SparseLogits(Structure):
    _fields_ = [
        ("rows", c_void_p),
        ("tokens", c_void_p),
        ("entries", c_void_p),
        ("hidden", c_void_p),
        ("weight", c_void_p),
        ("x", c_void_p),
        ("D", c_int64),
    ]


_FUNCTIONS: dict[str, tuple[type | None, list[type]]] = {
    "alp_choose_isa": (c_char_p, [c_char_p]),
    "alp_philox": (None, [c_void_p, c_void_p, c_int64, c_uint64]),
    "alp_normals": (None, [c_void_p, c_void_p, c_void_p, c_void_p, c_int64]),
    "alp_words": (None, [POINTER(Stream), c_void_p, c_int64, c_int64, c_int32]),
    "alp_normal": (None, [POINTER(Stream), c_void_p, c_int64, c_int64, c_int32]),
    "alp_perturb_fwd": (None, [POINTER(Stream), POINTER(PerturbFwd), c_int64, c_int32, c_int32]),
    "alp_perturb_bwd": (c_float, [POINTER(Stream), POINTER(PerturbBwd), c_int64, c_int32, c_int32]),
    "alp_measure": (None, [POINTER(Measure), c_int64, c_int32, c_int32]),
    "alp_perturb_rms_norm_fwd": (None, [POINTER(Stream), POINTER(PerturbRmsNormFwd), c_int64, c_int32, c_int32]),
    "alp_perturb_rms_norm_bwd": (None, [POINTER(Stream), POINTER(PerturbRmsNormBwd), c_int64, c_int32, c_int32]),
    "alp_head_fwd": (None, [POINTER(Stream), POINTER(Head), POINTER(HeadFwd), c_int64, c_int32, c_int32]),
    "alp_head_bwd": (c_float, [POINTER(Stream), POINTER(Head), POINTER(HeadBwd), c_int64, c_int32, c_int32]),
    "alp_head_select": (
        None,
        [POINTER(Stream), POINTER(Head), POINTER(HeadFwd), POINTER(Select), c_int64, c_int32, c_int32],
    ),
    "alp_pack": (None, [POINTER(Select), c_void_p, c_void_p, c_int64]),
    "alp_by_token": (
        None,
        [c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p],
    ),
    "alp_sparse_products": (None, [POINTER(Sparse), c_int32, c_int32]),
    "alp_entries_by_token": (
        None,
        [c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p],
    ),
    "alp_sparse_logits": (None, [POINTER(SparseLogits), c_int64, c_int32, c_int32]),
}


def _load() -> ctypes.CDLL:
    path = Path(__file__).with_name("_native.so")
    if not path.exists():
        raise ImportError(
            "alp-kernels was installed without a C++ compiler; install GCC or Clang and reinstall it "
            "(in a checkout: cmake -S . -B build && cmake --build build)"
        )
    library = ctypes.CDLL(str(path))
    if library.alp_interface() != INTERFACE:
        raise ImportError("the native library was built from other sources; build or install it again")
    for function, (result, arguments) in _FUNCTIONS.items():
        getattr(library, function).restype = result
        getattr(library, function).argtypes = arguments
    return library


def choose_isa(library: ctypes.CDLL) -> str:
    """Use the instruction set that ALP_KERNELS_ISA names, or this CPU's best; returns its name."""
    asked = os.environ.get(ISA_VARIABLE, "")
    if asked and asked not in ISAS:
        raise ImportError(f"{ISA_VARIABLE}={asked!r}; it needs one of {', '.join(ISAS)}, or none for this CPU's best")
    chosen = library.alp_choose_isa(asked.encode())
    if chosen is None:
        best = library.alp_choose_isa(b"").decode()
        raise ImportError(f"{ISA_VARIABLE}={asked!r}, but this CPU or build has no {asked}; its best is {best!r}")
    return chosen.decode()


library = _load()
isa = choose_isa(library)
"""The instruction set in use: the best this CPU has, or the one ALP_KERNELS_ISA names."""
