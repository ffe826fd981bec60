"""From a grid's cells to numbers: each quantity of each cell, its spread over seeds, and contrasts in words.

How a cell counts:
- finished: with all it recorded;
- failed: with what it recorded until it stopped. Its final accuracy is the last one measured, its last reward is held to
  the planned end of the run, and it counts as collapsed;
- unfinished: with what it recorded so far, in the summary of its arm; contrasts leave it out;
- a cell without a quantity is left out of that quantity, and the number of seeds or pairs is smaller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from .grid import Cell, Grid
from .statistics import Paired, area, has_collapsed, holm, mean_sd, paired, spikes

LAST = 5
"""An end value is the mean of this many last steps."""
SIGNIFICANT = 0.05


# ------------------------------------------------------------------ one cell


def status(cell: Cell) -> str:
    return "finished" if cell.outcome is not None else "failed" if cell.failure is not None else "unfinished"


def series(cell: Cell, key: str) -> tuple[list[float], list[float]]:
    """Return the steps with a finite number for `key`, and their values."""
    points = [(m["step"], m[key]) for m in cell.metrics if _is_number(m.get(key))]
    return [step for step, _ in points], [value for _, value in points]


def seconds_of(step: dict[str, Any]) -> float | None:
    """Return the seconds of a whole step: step_s, or the sum of its phases."""
    if _is_number(step.get("step_s")):
        return float(step["step_s"])
    phases = [value for key, value in step.items() if key.endswith("_s") and _is_number(value)]
    return sum(phases) if phases else None


def accuracies(cell: Cell, key: str = "train") -> tuple[list[float], list[float]]:
    """Return steps and evaluated accuracies in order: before the run, during it (eval/...), and after it."""
    steps, values = series(cell, f"eval/{key}")
    last = cell.metrics[-1]["step"] if cell.metrics else 0
    outcome = cell.outcome or {"before": cell.before or {}}
    if key in outcome["before"] and (not steps or steps[0] > 0):
        steps, values = [0, *steps], [outcome["before"][key], *values]
    if key in outcome.get("after", {}):
        if steps and steps[-1] == last > 0:  # the same model, evaluated twice
            steps, values = steps[:-1], values[:-1]
        steps, values = [*steps, last], [*values, outcome["after"][key]]
    return steps, values


def is_collapsed(cell: Cell) -> bool:
    """Whether the cell failed, or its greedy or sampled accuracy ended below half of its best (of 0.05 or more)."""
    return cell.failure is not None or any(has_collapsed(accuracies(cell, key)[1]) for key in ("train", "greedy"))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _reduced(reduce: Callable[[list[float]], float], key: str, cell: Cell, grid: Grid) -> float | None:
    _, values = series(cell, key)
    return reduce(values) if values else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _end(values: Sequence[float]) -> float:
    return _mean(values[-LAST:])


def _accuracy(pick: Callable[[list[float]], float], key: str, cell: Cell, grid: Grid) -> float | None:
    _, values = accuracies(cell, key)
    return pick(values) if values else None


def _final_pass(cell: Cell, grid: Grid) -> float | None:
    known = {key for m in cell.metrics for key in m if key.startswith("eval/pass@")}
    known |= {f"eval/{key}" for key in (cell.outcome or {}).get("after", {}) if key.startswith("pass@")}
    key = max(known, key=lambda name: int(name.split("@")[1]), default="eval/pass@1")
    return _accuracy(_last, key.removeprefix("eval/"), cell, grid)


def _last(values: Sequence[float]) -> float:
    return values[-1]


def _reward_area(cell: Cell, grid: Grid) -> float | None:
    steps, values = series(cell, "reward")
    planned = grid.arms[cell.arm].get("steps", 0)
    if cell.failure is not None and steps and steps[-1] < planned:
        steps, values = [*steps, steps[-1] + 1, planned], [*values, values[-1], values[-1]]
    return area(steps, values) if steps else None


def _collapsed(cell: Cell, grid: Grid) -> float | None:
    return float(is_collapsed(cell)) if cell.metrics or cell.failure is not None else None


def _spikes(reduce: Callable[[list[float]], float], key: str, cell: Cell, grid: Grid) -> float | None:
    steps, values = series(cell, key)
    if not steps or 2 * len(steps) < len(cell.metrics):
        return None  # recorded at fewer than half of the steps: too sparse to show a jump
    lag = grid.arms[cell.arm].get("rollout", {}).get("lag", 0)
    return reduce(spikes(values, start=sum(step <= lag for step in steps)))


def _number_of(found: list[float]) -> float:
    return float(len(found))


def _variance(key: str, cell: Cell, grid: Grid) -> float | None:
    _, values = series(cell, key)
    return _mean([value * value for value in values]) if values else None


def _share_above(threshold: float, key: str, cell: Cell, grid: Grid) -> float | None:
    _, values = series(cell, key)
    return _mean([float(value > threshold) for value in values]) if values else None


def _sigma(cell: Cell, grid: Grid) -> float | None:
    recorded = [m["sigma"] for m in cell.metrics if m.get("sigma")]
    return _mean(recorded[-1]) if recorded else None


def _grad_norm_max(cell: Cell, grid: Grid) -> float | None:
    values = series(cell, "grad_norm_max")[1] or series(cell, "grad_norm")[1]
    return max(values, default=None)


def _seconds(reduce: Callable[[list[float]], float], cell: Cell, grid: Grid) -> float | None:
    values = [s for m in cell.metrics if (s := seconds_of(m)) is not None]
    return reduce(values) if values else None


# ------------------------------------------------------------------ the quantities


@dataclass(frozen=True)
class Quantity:
    """One number of a cell."""

    key: str
    label: str
    of: Callable[[Cell, Grid], float | None]
    how: str
    """How the number is computed from a cell's steps."""
    is_ratio: bool = False
    """Contrasts use quotients, on the log scale: for values that span orders of magnitude."""
    is_count: bool = False
    """The table shows the sum over seeds."""
    prefix: str = ""
    """Put before the label outside its group's table."""

    @property
    def name(self) -> str:
        return f"{self.prefix} {self.label}".strip()


ABOVE = {"token": (4.0, 0.1), "sequence": (4.0, 1.0)}
"""Thresholds of the ratio's maximum (ALP's own upper clip) and of its variance; the same for all arms."""


def _ratio_quantities(level: str) -> tuple[Quantity, ...]:
    folder, name = f"clean/{level}_ratio", f"{level} ratio"

    def quantity(key: str, label: str, of: Callable[[Cell, Grid], float | None], how: str) -> Quantity:
        return Quantity(f"{level}_{key}", label, of, how, is_ratio=True, prefix=name)

    large, wide = ABOVE[level]

    def share(key: str, label: str, of: Callable[[Cell, Grid], float | None]) -> Quantity:
        return Quantity(f"{level}_{key}", label, of, "share of the steps in which this holds", prefix=name)

    quantiles = ("q01", "q05", "q50", "q95", "q99", "q99.9")
    hill = partial(_reduced, median, f"clean/hill_{level}")
    return (
        *(
            quantity(q, q, partial(_reduced, median, f"{folder}/{q}"), "in each step, median over steps")
            for q in quantiles
        ),
        quantity("min", "min", partial(_reduced, min, f"{folder}/min"), "smallest of any step"),
        quantity("max", "max", partial(_reduced, max, f"{folder}/max"), "largest of any step"),
        quantity("variance", "variance", partial(_variance, f"{folder}/std"), "in each step, mean over steps"),
        share("max_above", f"max above {large:g}", partial(_share_above, large, f"{folder}/max")),
        share("variance_above", f"variance above {wide:g}", partial(_share_above, wide**0.5, f"{folder}/std")),
        quantity(
            "hill", "tail index", hill, "Hill's estimate in each step, median over steps; a small value is a heavy tail"
        ),
    )


GROUPS: dict[str, tuple[Quantity, ...]] = {
    "Learning": (
        Quantity(
            "final_accuracy",
            "final accuracy",
            partial(_accuracy, _last, "train"),
            "sampled on the training path after the run; for a failed run the last one measured",
        ),
        Quantity(
            "best_accuracy",
            "best accuracy",
            partial(_accuracy, max, "train"),
            "the largest of all evaluations, including those before and after the run",
        ),
        Quantity("final_pass", "pass@k", _final_pass, "after the run, at the largest k that was evaluated"),
        Quantity("final_greedy", "greedy", partial(_accuracy, _last, "greedy"), "greedy accuracy after the run"),
        Quantity(
            "reward_area",
            "reward, area",
            _reward_area,
            "area under the reward curve, divided by its width in steps; a failed run keeps its last reward",
        ),
        Quantity(
            "collapsed",
            "collapsed",
            _collapsed,
            "failed, or greedy or sampled accuracy ended below half of its best (of 0.05 or more)",
            is_count=True,
        ),
    ),
    "Divergence of the clean policy from the rollout engine (nats per token)": (
        Quantity("k3_max", "k3 KL, max", partial(_reduced, max, "clean/k3_kl"), "largest of any step", True),
        Quantity("k3_mean", "k3 KL, mean", partial(_reduced, _mean, "clean/k3_kl"), "mean over steps", True),
        Quantity("k3_end", "k3 KL, end", partial(_reduced, _end, "clean/k3_kl"), f"mean of the last {LAST}", True),
        Quantity("k1_max", "k1 KL, max", partial(_reduced, max, "clean/k1_kl"), "largest of any step"),
        Quantity("k1_end", "k1 KL, end", partial(_reduced, _end, "clean/k1_kl"), f"mean of the last {LAST}"),
        Quantity(
            "kl_spikes",
            "KL spikes",
            partial(_spikes, _number_of, "clean/k3_kl"),
            "jumps of the k3 KL to over twice the median of the 5 steps before and by 0.01 or more, after the lag's ramp",
            is_count=True,
        ),
        Quantity(
            "kl_spike_size",
            "largest spike",
            partial(_spikes, partial(max, default=0.0), "clean/k3_kl"),
            "height of the largest spike above that median; 0 without a spike",
        ),
        Quantity(
            "step_kl_max",
            "step KL, max",
            partial(_reduced, max, "step_kl"),
            "k3 KL from the policy before a step's updates to the one after, largest",
            True,
        ),
        Quantity(
            "step_kl_mean",
            "step KL, mean",
            partial(_reduced, _mean, "step_kl"),
            "k3 KL from the policy before a step's updates to the one after, mean over steps",
            True,
        ),
        Quantity(
            "step_kl_spikes",
            "step KL spikes",
            partial(_spikes, _number_of, "step_kl"),
            "jumps of the step KL, by the rule of KL spikes",
            is_count=True,
        ),
    ),
    "Ratio of the clean policy to the rollout engine, by token": _ratio_quantities("token"),
    "Ratio of the clean policy to the rollout engine, by sequence": _ratio_quantities("sequence"),
    "Updates": (
        Quantity(
            "ess",
            "ESS / tokens",
            partial(_reduced, _mean, "clean/ess_frac"),
            "effective sample size of the clean ratio, mean over steps",
        ),
        Quantity("ess_min", "ESS, min", partial(_reduced, min, "clean/ess_frac"), "smallest of any step"),
        Quantity("entropy", "entropy, end", partial(_reduced, _end, "entropy"), f"nats, mean of the last {LAST}"),
        Quantity("grad_norm", "gradient norm", partial(_reduced, _mean, "grad_norm"), "before clipping, mean", True),
        Quantity("grad_norm_max", "gradient norm, max", _grad_norm_max, "largest of any optimiser step", True),
        Quantity("sigma", "sigma, end", _sigma, "at the last step, mean over layers"),
    ),
    "Cost": (
        Quantity("step_s", "seconds a step", partial(_seconds, median), "median over steps", True),
        Quantity("run_s", "seconds in all", partial(_seconds, sum), "sum over steps", True),
        Quantity(
            "peak_mib", "peak MiB", partial(_reduced, max, "peak_mib"), "memory of the process, or of the GPU", True
        ),
    ),
}
QUANTITIES = {quantity.key: quantity for group in GROUPS.values() for quantity in group}
MAIN = ("final_accuracy", "reward_area", "k3_mean", "k3_max", "token_max")
"""The quantities whose contrasts the report puts first and docs/evidence.md lists; the report's tables have all."""


# ------------------------------------------------------------------ arms and contrasts


@dataclass(frozen=True)
class Entry:
    """One quantity of one arm over its seeds."""

    mean: float
    sd: float
    total: float
    n: int


Values = dict[tuple[str, int], dict[str, float]]
"""Quantities by (arm, seed); those that a cell lacks are absent."""


def measure(grid: Grid) -> Values:
    values: Values = {}
    for cell in grid.cells:
        found = {key: quantity.of(cell, grid) for key, quantity in QUANTITIES.items()}
        values[cell.arm, cell.seed] = {key: value for key, value in found.items() if value is not None}
    return values


def summarise(grid: Grid, values: Values) -> dict[str, dict[str, Entry]]:
    """Return entries by arm and quantity, without quantities that no seed has."""
    table: dict[str, dict[str, Entry]] = {}
    for arm in grid.arms:
        mine = [cell for (name, _), cell in values.items() if name == arm]
        columns = {key: [cell[key] for cell in mine if key in cell] for key in QUANTITIES}
        table[arm] = {
            key: Entry(*mean_sd(column), sum(column), len(column)) for key, column in columns.items() if column
        }
    return table


@dataclass(frozen=True)
class Contrast:
    """One quantity of an arm against a baseline arm, over the seeds for which both have it."""

    arm: str
    baseline: str
    quantity: Quantity
    is_ratio: bool
    """Whether `paired` holds differences of natural logarithms."""
    paired: Paired
    p_corrected: float
    """Corrected by Holm over the contrasts of this quantity: Student's p, or the sign-flip p if that is nan."""
    lost: tuple[int, int]
    """Number of pairs in which the arm collapsed, and in which the baseline did."""

    @property
    def verdict(self) -> str:
        """ "higher" or "lower" if the corrected p is below 0.05 and the bootstrap interval excludes 0."""
        p = self.paired
        if p.n < 2:
            return "not tested"
        if self.p_corrected < SIGNIFICANT and (p.low > 0 or p.high < 0):
            return "higher" if p.mean > 0 else "lower"
        return "cannot be told apart"

    @property
    def sizes(self) -> tuple[float, float, float]:
        """Return the difference, or quotient, and the ends of its interval."""
        p = self.paired
        return tuple(map(_exp, (p.mean, p.low, p.high))) if self.is_ratio else (p.mean, p.low, p.high)  # type: ignore[return-value]

    @property
    def sentence(self) -> str:
        p, label = self.paired, self.quantity.name
        sign = "/" if self.is_ratio else "-"
        if p.n == 0:
            return f"{self.arm} {sign} {self.baseline}: {label}: no seed has both"
        size, low, high = (short(value, signed=not self.is_ratio) for value in self.sizes)
        said = f"{self.arm} {sign} {self.baseline}: {label} {'x ' if self.is_ratio else ''}{size}"
        if p.n < 2:
            return f"{said}, not tested (1 seed)"
        lost = [
            f"{name} collapsed on {count}"
            for name, count in zip((self.arm, self.baseline), self.lost, strict=True)
            if count
        ]
        inside = "; ".join([f"p {p_text(self.p_corrected)}, {p.n} seeds", *lost])
        return f"{said} [{low}, {high}], {self.verdict} ({inside})"


def contrast(grid: Grid, values: Values) -> list[Contrast]:
    """Return every contrast of the grid in every quantity, by quantity, without unfinished cells."""
    ended = {(cell.arm, cell.seed): is_collapsed(cell) for cell in grid.cells if status(cell) != "unfinished"}
    found: list[Contrast] = []
    for key, quantity in QUANTITIES.items():
        pairs = {
            names: [
                seed
                for seed in grid.seeds
                if all((arm, seed) in ended and key in values.get((arm, seed), {}) for arm in names)
            ]
            for names in grid.contrasts
        }
        numbers = [values[arm, s][key] for names, seeds in pairs.items() for s in seeds for arm in names]
        is_ratio = quantity.is_ratio and min(numbers, default=0.0) > 0
        scale = math.log if is_ratio else float
        results = [
            paired([scale(values[arm, s][key]) - scale(values[baseline, s][key]) for s in seeds])
            for (arm, baseline), seeds in pairs.items()
        ]
        corrected = holm([p.p_flip if math.isnan(p.p_t) else p.p_t for p in results])
        for ((arm, baseline), seeds), result, p in zip(pairs.items(), results, corrected, strict=True):
            if result.n or any(key in values.get((name, s), {}) for name in (arm, baseline) for s in grid.seeds):
                lost = (sum(ended[arm, s] for s in seeds), sum(ended[baseline, s] for s in seeds))
                found.append(Contrast(arm, baseline, quantity, is_ratio, result, p, lost))
    return found


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))


# ------------------------------------------------------------------ numbers in words


def short(value: float, signed: bool = False, digits: int = 3) -> str:
    """Format with `digits` significant digits: plain decimals from 1e-4 to 1e6, scientific notation elsewhere."""
    if not math.isfinite(value):
        return "-" if math.isnan(value) else str(value)
    sign = "+" if signed else ""
    if value == 0:
        return f"{value:{sign}.0f}"
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:{sign}.{digits - 1}e}"
    return f"{value:{sign}.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def p_text(p: float) -> str:
    return "-" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def entry_text(quantity: Quantity, entry: Entry | None, num_seeds: int) -> str:
    """Format mean ± sd, and the number of seeds if some lack the quantity; a count becomes its sum over seeds."""
    if entry is None:
        return "-"
    if quantity.is_count:
        text = f"{entry.total:.0f} in {entry.n} runs"
    else:
        sd = 0.0 if entry.sd < 1e-12 * abs(entry.mean) else entry.sd  # equal values, rounded mean
        text = short(entry.mean) if math.isnan(sd) else f"{short(entry.mean)} ± {short(sd, digits=2)}"
        text += "" if entry.n == num_seeds else f" ({entry.n})"
    return text
