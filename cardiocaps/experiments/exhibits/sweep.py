"""Figure 6: metrics over the weight λ_reg of the regression loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cardiocaps.config import TrainConfig
from cardiocaps.evaluation.names import METRIC_NAMES
from cardiocaps.experiments.exhibits.exhibit import Exhibit
from cardiocaps.experiments.exhibits.panels import SMALL, wrapped
from cardiocaps.experiments.plan import SYSTEMS
from cardiocaps.experiments.reported import BEST_LAMBDAS
from cardiocaps.experiments.summaries import Row, Summary
from cardiocaps.plots import BLUE, GREEN, GREY, VERMILION, dress, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Sweep(Exhibit):
    """Adds the column of λ_reg and draws three metrics over it."""

    def regression_weight(self, system: str) -> float:
        return lambda_of(system)

    def sections(self, rows: Sequence[Row], found: Mapping[str, Summary], bootstrap: int) -> list[str]:
        named = " and ".join(f"{value:g}" for value in BEST_LAMBDAS)
        own = f"The paper names {named} as the best λ_reg, in different places."
        return [own, *super().sections(rows, found, bootstrap)]

    def draw(self, summaries: Sequence[Summary]) -> Figure:
        figure = new_figure(6.6, 4.6, wrapped(self.title, 60))
        axes = figure.add_subplot()
        ordered = sorted(summaries, key=lambda s: lambda_of(s.system))
        at = [lambda_of(s.system) for s in ordered]
        lines = (("auroc", BLUE, "o-"), ("average_precision", VERMILION, "s--"), ("accuracy", GREEN, "^-."))
        for place, (name, colour, style) in enumerate(lines):
            estimates = [s.report.metrics[name] for s in ordered]
            axes.errorbar(
                [value * 1.06 ** (place - 1) for value in at],  # a little apart, so that no bar covers another
                [e.value for e in estimates],
                yerr=[0 if math.isnan(e.sd) else e.sd for e in estimates],
                fmt=style,
                color=colour,
                markersize=5,
                linewidth=1.5,
                capsize=2.5,
                label=METRIC_NAMES[name],
            )
        axes.set_xscale("log")
        for value in BEST_LAMBDAS:
            axes.axvline(value, color=GREY, linestyle=":", linewidth=1.2, zorder=0)
            above = axes.get_xaxis_transform()
            text = f"paper: {value:g}"
            axes.text(value, 1.01, text, ha="center", va="bottom", fontsize=SMALL, color=GREY, transform=above)
        axes.set_xticks(at, [f"{value:g}" for value in at], fontsize=SMALL)
        axes.minorticks_off()
        dress(axes, "λ_reg (weight of the regression loss)", "Mean over the seeds, with standard deviation")
        axes.set_xlim(min(*at, *BEST_LAMBDAS) / 1.5, max(*at, *BEST_LAMBDAS) * 1.5)
        axes.legend(frameon=False, fontsize=9, loc="best")
        return figure


def lambda_of(system: str) -> float:
    """The λ_reg of a system, by its key."""
    return float(SYSTEMS[system].settings.get("regression_weight", TrainConfig.regression_weight))
