"""Compiles every Triton kernel ahead of time, as its launcher would start it, and measures the machine code.

    python -m tests.aot cuda:90 [case ...]      prints a table; --json prints what test_aot.py reads
    python -m tests.aot --write                 writes the table of docs/kernels.md, all cases and targets

The launchers run on CPU tensors while a recorder stands in for the launch: argument types, alignment, block sizes and
switches are those of a real call. Must run without TRITON_INTERPRET. Cases are chosen so that each kernel is built at
its plainest, where it should be fastest, and with everything switched on, where registers run out first.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from alp_kernels.noise import LOGITS_LAYER, Stream
from alp_kernels.objective import PRESETS, LossRows, Objective
from alp_kernels.reference import Head, HeadRows, Norm
from alp_kernels.triton import engine

TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "cuda:100": GPUTarget("cuda", 100, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}
COLUMNS = ("registers", "shared", "spills", "per_element", "instructions", "wide_loads", "wide_stores")
DOCUMENT = Path(__file__).parents[1] / "docs" / "kernels.md"
MARK = "<!-- python -m tests.aot --write -->"
MIN_LOOP = 60
"""A shorter loop is none of ours but a compiler's."""
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}

D, V = 4096, 151936
IDS = torch.zeros(2, dtype=torch.int64)
NUMBERED, NAMED = Stream(1 << 63, 1 << 31, 5, 1 << 33), Stream(1, 2, LOGITS_LAYER, 0, IDS)
AT_POINTER = NUMBERED._replace(at=torch.zeros(2, dtype=torch.int64))
PLAIN = Head()
FULL = Head(1.5, 30.0, torch.ones(2), torch.ones(()), NAMED)
EVERYTHING = Objective(denominator="old", weight="mask", kl="k3", kl_coef=0.1, entropy_coef=0.1)


def _numbers(count: int = 1) -> list[Tensor]:
    return [torch.zeros(2) for _ in range(count)]


def _logits(dtype: torch.dtype) -> Tensor:
    return torch.zeros(2, V, dtype=dtype)


def _perturb_fwd(dtype: torch.dtype, stream: Stream, scale: str, rounding: str) -> None:
    engine.perturb_fwd(torch.zeros(2, D, dtype=dtype), torch.ones(()), stream, scale, rounding)


def _head_bwd(dtype: torch.dtype, head: Head, has_dentropy: bool) -> None:
    rows = HeadRows(*_numbers(3))
    engine.head_bwd(_logits(dtype), IDS, head, rows, *_numbers(), _numbers()[0] if has_dentropy else None)


def _norm(dtype: torch.dtype) -> Norm:
    return Norm(torch.zeros(D, dtype=dtype), 1e-6, 0.0)


def _rms_norm_fwd(dtype: torch.dtype, stream: Stream, scale: str, rounding: str, num_channels: int = D) -> None:
    norm = Norm(torch.zeros(num_channels, dtype=dtype), 1e-6, 0.0)
    engine.perturb_rms_norm_fwd(
        torch.zeros(2, num_channels, dtype=dtype), torch.ones(()), stream, scale, rounding, norm
    )


def _rms_norm_bwd(dtype: torch.dtype, stream: Stream, rms: Tensor | None) -> None:
    rows = (torch.zeros(2, D, dtype=dtype) for _ in range(3))
    engine.perturb_rms_norm_bwd(*rows, torch.ones(2), rms, stream, _norm(dtype), True, True)


CASES: dict[str, Callable[[], Any]] = {
    "philox": lambda: engine.philox((IDS,) * 4, (1, 2)),
    "normal": lambda: engine.normal(2, D, NUMBERED, torch.device("cpu")),
    "perturb_fwd bf16": lambda: _perturb_fwd(torch.bfloat16, NUMBERED, "absolute", "nearest"),
    "perturb_fwd bf16 at a pointer": lambda: _perturb_fwd(torch.bfloat16, AT_POINTER, "absolute", "nearest"),
    "perturb_fwd fp32 rms": lambda: _perturb_fwd(torch.float32, NAMED, "rms", "nearest"),
    "perturb_fwd fp16 rms stochastic": lambda: _perturb_fwd(torch.float16, NAMED, "rms", "stochastic"),
    "perturb_bwd bf16": lambda: engine.perturb_bwd(torch.zeros(2, D, dtype=torch.bfloat16), NUMBERED, None),
    "perturb_bwd fp32 rms": lambda: engine.perturb_bwd(torch.zeros(2, D), NAMED, torch.ones(2)),
    "measure bf16": lambda: engine.measure(*(torch.zeros(2, D, dtype=torch.bfloat16) for _ in range(2)), 2),
    "perturb_rms_norm_fwd bf16": lambda: _rms_norm_fwd(torch.bfloat16, NUMBERED, "absolute", "nearest"),
    "perturb_rms_norm_fwd fp16 rms stochastic": lambda: _rms_norm_fwd(torch.float16, NAMED, "rms", "stochastic"),
    "perturb_rms_norm_fwd fp32 long": lambda: _rms_norm_fwd(torch.float32, NUMBERED, "absolute", "nearest", 10001),
    "perturb_rms_norm_bwd bf16": lambda: _rms_norm_bwd(torch.bfloat16, NUMBERED, None),
    "perturb_rms_norm_bwd fp32 rms": lambda: _rms_norm_bwd(torch.float32, NAMED, torch.ones(2)),
    "scale bf16": lambda: engine.scale_(torch.zeros(2, D, dtype=torch.bfloat16), torch.ones(())),
    "head_fwd bf16": lambda: engine.head_fwd(_logits(torch.bfloat16), IDS, PLAIN),
    "head_fwd fp32 full": lambda: engine.head_fwd(_logits(torch.float32), IDS, FULL),
    "head_bwd bf16": lambda: _head_bwd(torch.bfloat16, PLAIN, False),
    "head_bwd fp32 full": lambda: _head_bwd(torch.float32, FULL, True),
    "head_token_loss bf16 alp": lambda: engine.head_token_loss(
        _logits(torch.bfloat16), IDS, PLAIN, LossRows(*_numbers(3)), PRESETS["alp-token"]
    ),
    "head_token_loss fp32 everything": lambda: engine.head_token_loss(
        _logits(torch.float32), IDS, FULL, LossRows(*_numbers(5)), EVERYTHING
    ),
    "head_token_loss fp16 everything": lambda: engine.head_token_loss(
        _logits(torch.float16), IDS, FULL, LossRows(*_numbers(5)), EVERYTHING
    ),
}


def launches(call: Callable[[], Any]) -> list[tuple[JITFunction, tuple[Any, ...], dict[str, int]]]:
    """The kernels that `call` would start, with their arguments in order and the launch's options."""
    recorded: list[tuple[JITFunction, tuple[Any, ...], dict[str, int]]] = []

    def record(self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **options: int) -> None:
        recorded.append((self, args, options))

    original, JITFunction.run = JITFunction.run, record
    try:
        call()
    finally:
        JITFunction.run = original
    return recorded


def source(kernel: JITFunction, args: tuple[Any, ...]) -> ASTSource:
    """What Triton's just-in-time compiler would make of these arguments."""
    signature, constants, attributes = {}, {}, {}
    for position, (parameter, value) in enumerate(zip(kernel.params, args, strict=True)):
        is_aligned = False
        if parameter.is_constexpr or value is None:
            kind, constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            kind, is_aligned = POINTERS[value.dtype], True  # as the allocator gives them
        elif isinstance(value, float):
            kind = "fp32"
        else:
            kind = parameter.annotation_type or "i32"
            is_aligned = not parameter.do_not_specialize and value % 16 == 0
        signature[parameter.name] = kind
        if is_aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def hot_instructions(text: str) -> int:
    """Instructions of the longest loop of a listing, or of the whole kernel where it has none of MIN_LOOP or more."""
    labels: dict[str, int] = {}
    count, longest = 0, 0
    for line in text.splitlines():
        if label := re.match(r"^(\.L\w+):", line):
            labels[label[1]] = count
        elif instruction := re.match(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*);", line) or re.match(r"^\t([a-z]+_.*)", line):
            if instruction[1].startswith(("NOP", "s_nop")):
                continue
            count += 1
            target = re.search(r"(?:BRA.*`\(|branch\w*\s+)(\.L\w+)", instruction[1])
            if target and target[1] in labels:
                body = count - labels[target[1]]
                longest = max(longest, body if body >= MIN_LOOP else 0)
    return longest or count


def measure(compiled: Any) -> dict[str, float]:
    """Registers, memory and instructions of a compiled kernel."""
    shared = {"shared": compiled.metadata.shared}
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        field = {key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in _AMD_FIELDS}  # type: ignore[index]
        body = re.findall(r"^\t([a-z]+_[a-z0-9_]+)", text, re.M)
        return shared | {
            "registers": field["vgpr_count"],
            "spills": field["vgpr_spill_count"],  # scalar ones go to lanes of vector registers; "stack" would show more
            "stack": field["private_segment_fixed_size"],
            "instructions": len(body),
            "hot": hot_instructions(text),
            "float64": sum("_f64" in name for name in body),
            "wide_loads": sum(name == "global_load_dwordx4" or name == "buffer_load_dwordx4" for name in body),
            "wide_stores": sum(name == "global_store_dwordx4" or name == "buffer_store_dwordx4" for name in body),
        }
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [_tool("cuobjdump"), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
        sass = subprocess.run([_tool("nvdisasm"), file.name], capture_output=True, text=True, check=True)
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage.stdout)[1]) for key in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    body = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass.stdout, re.M)
    return shared | {
        "registers": registers,
        "spills": sum(name.startswith(("STL", "LDL")) for name in body),
        "stack": stack + local,
        "instructions": sum(name != "NOP" for name in body),
        "hot": hot_instructions(sass.stdout),
        "float64": ptx.count(".f64"),
        "wide_loads": len(re.findall(r"ld\.global\S*\.v(?:4\.b32|8\.b16)", ptx)),
        "wide_stores": len(re.findall(r"st\.global\S*\.v(?:4\.b32|8\.b16)", ptx)),
    }


_AMD_FIELDS = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")


def _tile_elements(arguments: dict[str, Any]) -> int:
    """How many elements a program takes at a time."""
    if "BLOCK_Q" in arguments:
        return 4 * int(arguments.get("BLOCK_N", 1)) * int(arguments["BLOCK_Q"])
    return int(arguments.get("BLOCK_D") or 4 * arguments["BLOCK"])  # philox: four words


def build(target: str, cases: list[str]) -> dict[str, dict[str, float]]:
    """Measurements of each kernel of each case: {"case: kernel": {...}}."""
    found: dict[str, dict[str, float]] = {}
    for case in cases:
        for kernel, args, options in launches(CASES[case]):
            driver.set_active(SimpleNamespace(get_current_target=lambda: TARGETS[target]))  # read by target_info
            compiled = triton.compile(source(kernel, args), target=TARGETS[target], options=options)
            row = measure(compiled)
            threads = compiled.metadata.num_warps * TARGETS[target].warp_size
            elements = _tile_elements({p.name: value for p, value in zip(kernel.params, args, strict=True)})
            row["per_element"] = round(row["hot"] * threads / elements, 1)
            found[f"{case}: {kernel.__name__}"] = row
    return found


def table(measured: dict[str, dict[str, dict[str, float]]]) -> str:
    """The table of docs/kernels.md: {target: what build returns} as Markdown."""
    lines = [
        f"Triton {triton.__version__}",
        "",
        f"| kernel | target | {' | '.join(COLUMNS)} |",
        "|---|---|" + "---:|" * len(COLUMNS),
    ]
    for name in next(iter(measured.values())):
        for target, rows in measured.items():
            lines.append(f"| {name} | {target} | {' | '.join(str(rows[name][column]) for column in COLUMNS)} |")
    return "\n".join(lines) + "\n"


def committed_table() -> str:
    return DOCUMENT.read_text().split(MARK, 1)[1].split(MARK, 1)[0].strip() + "\n"


def main(arguments: list[str]) -> None:
    if arguments == ["--write"]:
        before, _, after = DOCUMENT.read_text().split(MARK)
        child = [sys.executable, "-m", "tests.aot", "--json"]
        measured = {
            target: json.loads(subprocess.run([*child, target], capture_output=True, text=True, check=True).stdout)
            for target in TARGETS
        }
        DOCUMENT.write_text(f"{before}{MARK}\n{table(measured)}{MARK}{after}")
        return
    as_json = "--json" in arguments
    target, *cases = (a for a in arguments if a != "--json")
    found = build(target, cases or list(CASES))
    print(json.dumps(found) if as_json else table({target: found}))


if __name__ == "__main__":
    main(sys.argv[1:])
