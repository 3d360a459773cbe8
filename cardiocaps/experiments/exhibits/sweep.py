"""Figure 6: metrics over the weight λ_reg of the regression loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cardiocaps.config import TrainConfig
from cardiocaps.evaluation.names import METRIC_NAMES
from cardiocaps.experiments.exhibits.exhibit import Exhibit
from cardiocaps.experiments.exhibits.panels import SMALL, draw_line, logarithmic, wrapped
from cardiocaps.experiments.plan import SYSTEMS
from cardiocaps.experiments.reported import BEST_LAMBDAS
from cardiocaps.experiments.summaries import Row, Summary
from cardiocaps.plots import BLUE, GREY, VERMILION, dress, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_METRICS = ("auroc", "average_precision", "accuracy")


@dataclass(frozen=True)
class Sweep(Exhibit):
    """Adds the column of λ_reg and draws three metrics over it."""

    def varied(self, system: str) -> Mapping[str, float]:
        return {"lambda": lambda_of(system)}

    def sections(self, rows: Sequence[Row], found: Mapping[str, Summary], bootstrap: int) -> list[str]:
        named = " and ".join(f"{value:g}" for value in BEST_LAMBDAS)
        own = f"The paper names {named} as the best λ_reg, in different places."
        return [own, *super().sections(rows, found, bootstrap)]

    def draw(self, summaries: Sequence[Summary]) -> Figure:
        """A panel for each metric: the means over the seeds with their intervals, and the seeds as small dots."""
        figure = new_figure(6.6, 7.2, wrapped(self.title, 60))
        blocks: Any = figure.subfigures(2, 1, height_ratios=[6.5, 0.3])
        body, foot = blocks
        panels = body.subplots(len(_METRICS), 1, sharex=True, sharey=True)
        ordered = sorted(summaries, key=lambda s: lambda_of(s.system))
        at = [lambda_of(s.system) for s in ordered]
        for axes, name in zip(panels, _METRICS, strict=True):
            estimates = [s.report.metrics[name] for s in ordered]
            draw_line(axes, at, estimates, label="mean", interval_label="its 95 % interval", color=BLUE, marker="o")
            dots = [
                (value, run.metrics[name].value) for value, s in zip(at, ordered, strict=True) for run in s.report.runs
            ]
            if len(dots) > len(at):  # a little to the right, where no interval covers them
                x, y = zip(*((1.12 * value, y) for value, y in dots), strict=True)
                axes.plot(x, y, ".", color=VERMILION, markersize=4, label="single seeds")
            for value in BEST_LAMBDAS:
                axes.axvline(value, color=GREY, linestyle=":", linewidth=1.2, zorder=0)
            text = METRIC_NAMES[name]
            dress(axes, "", text[0].upper() + text[1:])
        for value in BEST_LAMBDAS:
            above = panels[0].get_xaxis_transform()
            text = f"best in the\npaper: {value:g}"
            panels[0].text(value, 1.02, text, ha="center", va="bottom", fontsize=SMALL, color=GREY, transform=above)
        below = panels[-1]
        for axes in panels:
            logarithmic(axes, at, [f"{value:g}" for value in at])
        below.set_xlim(min(*at, *BEST_LAMBDAS) / 1.5, max(*at, *BEST_LAMBDAS) * 1.5)
        below.set_xlabel("λ_reg (weight of the regression loss)")
        handles = panels[0].get_legend_handles_labels()
        foot.legend(*handles, loc="center", ncols=len(handles[0]), frameon=False, fontsize=SMALL)
        return figure


def lambda_of(system: str) -> float:
    """The λ_reg of a system, by its key."""
    return float(SYSTEMS[system].settings.get("regression_weight", TrainConfig.regression_weight))
