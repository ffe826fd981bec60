"""A run's plots draw exactly what was recorded, with axes that fit the data."""

import re
from pathlib import Path

from alp.runs.plots import PLOTS, plots_of, save_plots


def steps(count, **more):
    return [
        {"step": s, "reward": 0.1 * s, "accuracy": 0.1 * s, "k1_kl": -0.01, "k3_kl": 0.02} | more
        for s in range(1, count + 1)
    ]


def test_only_what_was_recorded_is_drawn(tmp_path: Path) -> None:
    metrics = steps(4)
    assert plots_of({"a": metrics}) == ["reward", "kl"]
    assert plots_of({"a": metrics, "b": steps(4, sigma=[0.01, 0.02])}) == ["reward", "kl", "sigma"]
    save_plots("a", steps(4, **{"sigma": [0.01], "tool/calls": 2.0}), tmp_path / "plots")
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {"reward", "kl", "sigma", "tools"}


def test_every_curve_has_its_name_in_the_legend_and_the_same_runs_give_the_same_bytes() -> None:
    runs = {"one": steps(3), "two": steps(5)}
    plot = PLOTS["reward"](runs)
    assert [name for name, _ in plot.legend] == ["one reward", "one accuracy", "two reward", "two accuracy"]
    assert len({css for _, css in plot.legend}) == 4
    assert plot.svg() == PLOTS["reward"](runs).svg()
    assert plot.svg().count('class="line') == 2 * len(plot.legend)  # in the panel, and in the legend


def test_step_axes_have_whole_steps() -> None:
    for count in (1, 2, 3, 7, 10, 13, 120):
        chart = PLOTS["reward"]({"a": steps(count)}).chart
        assert all(re.fullmatch(r"\d+", text) for _, text in chart.x.marks), (count, chart.x.marks)
        assert chart.x.marks
