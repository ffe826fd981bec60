"""Compile every Triton kernel ahead of time, with its launcher's arguments, and measure the machine code.

    python -m tests.support.aot cuda:90 [case ...]      prints a table; --json prints what test_aot.py reads
    python -m tests.support.aot --write                 writes the table of docs/kernels.md, all cases and targets

The launchers run on CPU tensors and a recorder replaces the launch, so argument types, alignment, block sizes and
switches are those of a real call. Run without TRITON_INTERPRET. The cases build each kernel with no option, where it
should be fastest, and with every option, where registers run out first.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from alp_kernels.objective import PRESETS, LossRows, Objective
from alp_kernels.reference import HeadRows, LogitTransform, Norm, Points, SparseRows
from alp_kernels.stream import LOGITS_LAYER, SAMPLED_LAYER, Stream
from alp_kernels.triton import engine, noise

TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "cuda:100": GPUTarget("cuda", 100, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}
COLUMNS = ("registers", "shared", "spills", "per_element", "loops", "instructions", "wide_loads", "wide_stores")
DOCUMENT = Path(__file__).parents[2] / "docs" / "kernels.md"
MARK = "<!-- python -m tests.support.aot --write -->"
RARE = {
    "(target % Q >= start) & (target % Q < start + BLOCK_Q)",  # one tile of a row
    "tl.max(tile, axis=0) > LIMIT",  # true for few rows, a few times
    "_rescale",
    "may_keep | (mass > point - done)",  # a tile with entries
    "_write_kept",  # a pass writes one entry
    "_write_hits",
    "point < begin + mass",  # a block with a point
    "token == V",  # the part rounds to 1
}
"""Branches and functions whose instructions are not counted per element."""
POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}

D, V = 4096, 151936
ROWS = 6  # enough to fill a CPU, which counts as one multiprocessor
IDS = torch.zeros(ROWS, dtype=torch.int64)
NUMBERED, NAMED = Stream(1 << 63, 1 << 31, 5, 1 << 33), Stream(1, 2, LOGITS_LAYER, 0, IDS)
AT_POINTER = NUMBERED._replace(at=torch.zeros(2, dtype=torch.int64))
PLAIN = LogitTransform()
FULL = LogitTransform(1.5, 30.0, torch.ones(ROWS), torch.ones(()), NAMED)
EVERYTHING = Objective(denominator="old", weight="mask", kl="k3", kl_coef=0.1, entropy_coef=0.1)


def _numbers(count: int = 1) -> list[Tensor]:
    return [torch.zeros(ROWS) for _ in range(count)]


def _logits(dtype: torch.dtype) -> Tensor:
    return torch.zeros(ROWS, V, dtype=dtype)


def _perturb_fwd(dtype: torch.dtype, stream: Stream, scale: str, rounding: str) -> None:
    engine.perturb_fwd(torch.zeros(2, D, dtype=dtype), torch.ones(()), stream, scale, rounding)


def _head_bwd(dtype: torch.dtype, head: LogitTransform, has_dentropy: bool) -> None:
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


def _select(dtype: torch.dtype, head: LogitTransform = PLAIN, bits: int = 12, num_rows: int = ROWS) -> None:
    ids = torch.zeros(num_rows, dtype=torch.int64)
    rows = HeadRows(*(torch.zeros(num_rows) for _ in range(3)))
    with mock.patch.object(torch, "empty", torch.zeros):  # kernels that are recorded write no counts
        engine.select(
            torch.zeros(num_rows, V, dtype=dtype), ids, head, rows, Points(bits, Stream(1, 2, SAMPLED_LAYER, 0, ids))
        )


def _sparse(dtype: torch.dtype) -> None:
    dx = SparseRows(torch.ones_like(IDS), IDS.int(), torch.ones(ROWS))
    engine.sparse_products(dx, torch.zeros(ROWS, D, dtype=dtype), torch.zeros(V, D, dtype=dtype), True, True, True)


def _logits_of(dtype: torch.dtype, bias: Tensor | None) -> None:
    matrices = torch.zeros(ROWS, D, dtype=dtype), torch.zeros(V, D, dtype=dtype)
    engine.sparse_logits(*matrices, bias, torch.ones_like(IDS), IDS.int())


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
    "head_exp bf16": lambda: engine.head_exp(_logits(torch.bfloat16), IDS, PLAIN),
    "head_exp bf16 few rows": lambda: engine.head_exp(_logits(torch.bfloat16)[:1], IDS[:1], PLAIN),
    "head_exp fp32": lambda: engine.head_exp(_logits(torch.float32), IDS, PLAIN),
    "head_bwd bf16": lambda: _head_bwd(torch.bfloat16, PLAIN, False),
    "head_bwd fp32 full": lambda: _head_bwd(torch.float32, FULL, True),
    "head_token_loss bf16 alp": lambda: engine.head_token_loss(
        _logits(torch.bfloat16), IDS, PLAIN, LossRows(*_numbers(3)), PRESETS["alp-token"]
    ),
    "head_token_loss bf16 entropy": lambda: engine.head_token_loss(
        _logits(torch.bfloat16), IDS, PLAIN, LossRows(*_numbers(3)), Objective(entropy_coef=0.1)
    ),
    "head_token_loss fp32 everything": lambda: engine.head_token_loss(
        _logits(torch.float32), IDS, FULL, LossRows(*_numbers(5)), EVERYTHING
    ),
    "head_token_loss fp16 everything": lambda: engine.head_token_loss(
        _logits(torch.float16), IDS, FULL, LossRows(*_numbers(5)), EVERYTHING
    ),
    "select bf16": lambda: _select(torch.bfloat16, num_rows=16),
    "select bf16 two warps": lambda: _select(torch.bfloat16, num_rows=8),
    "select bf16 few rows": lambda: _select(torch.bfloat16, num_rows=2),
    "select fp32": lambda: _select(torch.float32, num_rows=16),
    "select fp16 full": lambda: _select(torch.float16, FULL._replace(sigma=None, stream=None), bits=20),
    "sparse_products bf16": lambda: _sparse(torch.bfloat16),
    "sparse_products fp32": lambda: _sparse(torch.float32),
    "sparse_logits bf16": lambda: _logits_of(torch.bfloat16, None),
    "sparse_logits fp32": lambda: _logits_of(torch.float32, torch.zeros(V)),
}


def launches(call: Callable[[], Any]) -> list[tuple[JITFunction, tuple[Any, ...], dict[str, int]]]:
    """Return the kernels that `call` would launch, with their arguments in order and the launch options."""
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
    """Return the source that Triton's just-in-time compiler would build for these arguments."""
    signature, constants, attributes = {}, {}, {}
    for position, (parameter, value) in enumerate(zip(kernel.params, args, strict=True)):
        is_aligned = False
        if parameter.is_constexpr or value is None:
            kind, constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            kind, is_aligned = POINTERS[value.dtype], True  # the allocator aligns tensors
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


class Listing(NamedTuple):
    """Machine code in program order."""

    instructions: list[str]
    lines: list[tuple[str, int] | None]  # each instruction's Python file and line; Triton's cache keeps no folder
    labels: dict[str, int]


def listing(text: str) -> Listing:
    """Parse the output of nvdisasm -g -c or the AMD compiler's assembly, without no-ops."""
    out, line = Listing([], [], {}), None
    files = dict(re.findall(r'^\s*\.file\s+(\d+) ".*?" "(.*?)"', text, re.M))
    for row in text.splitlines():
        if label := re.match(r"^(\.L\w+):", row):
            out.labels[label[1]] = len(out.instructions)
        elif place := re.match(r"\s*//## File \"(.*?)\", line (\d+)", row):
            line = Path(place[1]).name, int(place[2])
        elif place := re.match(r"\s*\.loc\s+(\d+) (\d+)", row):
            line = files[place[1]], int(place[2])
        elif instruction := re.match(r"^\s+/\*[0-9a-f]{4,}\*/\s+((?!NOP).*);|^\t((?!s_nop)[a-z]+_.*)", row):
            out.instructions.append(instruction[1] or instruction[2])
            out.lines.append(line)
    return out


def loops(code: Listing) -> dict[str, int]:
    """Count the instructions in each function's loops, without RARE branches; an inner loop is not counted twice."""
    following = [_following(code, i) for i in range(len(code.instructions))]
    bodies: dict[tuple[str, int], set[int]] = {}  # by the loop's line; the shortest copy: longer ones have masks
    for last, targets in enumerate(following):
        for first in targets:
            if first < last and (way := _shortest(following, first, last)):
                body = _body(code, following, way)
                # the line of the backward branch, or of any instruction if the compiler rotated the loop
                places = {code.lines[last]} & _for_lines().keys() or {code.lines[i] for i in way} & _for_lines().keys()
                for place in places:
                    if place is not None and len(body) < len(bodies.get(place, following)):
                        bodies[place] = body
    found: dict[str, int] = {}
    for place, body in bodies.items():
        inner = [other for other in bodies.values() if other < body]
        name = _for_lines()[place]
        found[name] = found.get(name, 0) + len(body.difference(*inner))
    return found


def _body(code: Listing, following: list[list[int]], way: list[int]) -> set[int]:
    """Return the body of the loop whose shortest cycle is `way`, without instructions that only rare branches reach."""
    first, last, on_way = way[-1], way[0], set(way)
    taken = [
        [t for t in targets if t in on_way or code.lines[i] not in _rare_lines()] if i in on_way else targets
        for i, targets in enumerate(following)
    ]
    taken[last] = []
    reached = _reached(taken, first)
    before: list[list[int]] = [[] for _ in taken]
    for i in reached:
        for target in taken[i]:
            before[target].append(i)
    return reached & _reached(before, last)


def _reached(following: list[list[int]], first: int) -> set[int]:
    seen, queue = {first}, [first]
    for i in queue:
        queue += [target for target in dict.fromkeys(following[i]) if target not in seen]
        seen.update(following[i])
    return seen


def _following(code: Listing, i: int) -> list[int]:
    """Return the instructions that may run next after instruction i."""
    text = code.instructions[i]
    branch = re.search(r"(?:BRA(?!\.DIV).*`\(|branch\w*\s+)(\.L\w+)", text)  # BRA.DIV: if the warp's threads were apart
    targets = [code.labels[branch[1]]] if branch else []
    if not text.startswith(("EXIT", "s_endpgm", "s_branch")) and (
        branch is None or text.startswith(("@", "s_cbranch"))
    ):
        targets.append(i + 1)
    return [target for target in targets if target < len(code.instructions)]


def _shortest(following: list[list[int]], first: int, last: int) -> list[int]:
    """Return the shortest path from `first` to `last`, last instruction first; empty if there is none."""
    before, reached = {first: first}, [first]
    for i in reached:
        for target in following[i]:
            if target not in before:
                before[target] = i
                reached.append(target)
    if last not in before:
        return []
    way = [last]
    while way[-1] != first:
        way.append(before[way[-1]])
    return way


@functools.cache
def _for_lines() -> dict[tuple[str, int], str]:
    """Map the file and line of each loop in alp_kernels.triton that is not unrolled to its function."""
    return {
        place: name
        for place, name, node in _statements()
        if isinstance(node, (ast.For, ast.While)) and not _is_unrolled(node)
    }


@functools.cache
def _rare_lines() -> set[tuple[str, int]]:
    return {place for place, _, node in _statements() if isinstance(node, ast.If) and ast.unparse(node.test) in RARE}


def _is_unrolled(node: ast.For | ast.While) -> bool:
    return isinstance(node, ast.For) and "static_range" in ast.unparse(node.iter)


def _statements() -> Iterator[tuple[tuple[str, int], str, ast.stmt]]:
    """Yield (file and line, function name, statement) for every statement in alp_kernels.triton's functions."""
    for path in Path(noise.__file__).parent.glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                for node in ast.walk(function):
                    if isinstance(node, ast.stmt):
                        yield (path.name, node.lineno), function.name, node


def measure(compiled: Any) -> dict[str, Any]:
    """Registers, memory and instructions of a compiled kernel."""
    shared = {"shared": compiled.metadata.shared}
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        field = {key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in _AMD_FIELDS}  # type: ignore[index]
        body = re.findall(r"^\t([a-z]+_[a-z0-9_]+)", text, re.M)
        return shared | {
            "registers": field["vgpr_count"],
            "spills": field["vgpr_spill_count"],  # scalar registers spill to vector lanes, further ones show in "stack"
            "stack": field["private_segment_fixed_size"],
            "instructions": len(body),
            "loops": loops(listing(text)),
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
        sass = subprocess.run([_tool("nvdisasm"), "-g", "-c", file.name], capture_output=True, text=True, check=True)
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage.stdout)[1]) for key in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    body = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass.stdout, re.M)
    return shared | {
        "registers": registers,
        "spills": sum(name.startswith(("STL", "LDL")) for name in body),
        "stack": stack + local,
        "instructions": sum(name != "NOP" for name in body),
        "loops": loops(listing(sass.stdout)),
        "float64": ptx.count(".f64"),
        "wide_loads": len(re.findall(r"ld\.global\S*\.v(?:4\.b32|8\.b16)", ptx)),
        "wide_stores": len(re.findall(r"st\.global\S*\.v(?:4\.b32|8\.b16)", ptx)),
    }


_AMD_FIELDS = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")


def _tile_elements(arguments: dict[str, Any]) -> int:
    """Return how many elements a program processes in one tile."""
    if "BLOCK_V" in arguments:
        return int(arguments["BLOCK_V"])
    if "BLOCK_E" in arguments:
        return int(arguments["BLOCK_E"]) * int(arguments.get("BLOCK_D", 1))
    if "BLOCK_Q" in arguments:
        return 4 * int(arguments.get("BLOCK_N", 1)) * int(arguments["BLOCK_Q"])
    return int(arguments.get("BLOCK_D") or 4 * arguments["BLOCK"])  # philox: four words


def build(target: str, cases: list[str]) -> dict[str, dict[str, Any]]:
    """Measurements of each kernel of each case: {"case: kernel": {...}}."""
    found: dict[str, dict[str, Any]] = {}
    for case in cases:
        for kernel, args, options in launches(CASES[case]):
            driver.set_active(SimpleNamespace(get_current_target=lambda: TARGETS[target]))  # read by target_info
            compiled = triton.compile(source(kernel, args), target=TARGETS[target], options=options)
            row = measure(compiled)
            threads = compiled.metadata.num_warps * TARGETS[target].warp_size
            elements = _tile_elements({p.name: value for p, value in zip(kernel.params, args, strict=True)})
            per_element = {name: count * threads / elements for name, count in row["loops"].items()}
            often = [count for name, count in per_element.items() if name not in RARE]
            row["per_element"] = round(sum(often) if often else row["instructions"] * threads / elements, 1)
            row["loops"] = ", ".join(f"{name} {count:.1f}" for name, count in sorted(per_element.items()))
            found[f"{case}: {kernel.__name__}"] = row
    return found


def table(measured: dict[str, dict[str, dict[str, Any]]]) -> str:
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
        child = [sys.executable, "-m", "tests.support.aot", "--json"]
        measured = {
            target: json.loads(subprocess.run([*child, target], capture_output=True, text=True, check=True).stdout)
            for target in TARGETS
        }
        before, _, after = DOCUMENT.read_text().split(MARK)
        DOCUMENT.write_text(f"{before}{MARK}\n{table(measured)}{MARK}{after}")
        return
    as_json = "--json" in arguments
    target, *cases = (a for a in arguments if a != "--json")
    found = build(target, cases or list(CASES))
    print(json.dumps(found) if as_json else table({target: found}))


if __name__ == "__main__":
    main(sys.argv[1:])
