"""A pretrained encoder beside the same network at random initialisation."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

ENOUGH = 0.02                                                # of accuracy: a smaller difference is called no gain
ENCODERS = ("pretrained", "random")


class ProbeComparison:
    """The numbers of probes of several encoders, and what they amount to.

    Random features of high dimension are a strong baseline, so a number of a pretrained encoder says little without it.
    """

    def __init__(self) -> None:
        self.measured: dict[str, dict[str, list[float]]] = defaultdict(lambda: {encoder: [] for encoder in ENCODERS})

    def add(self, encoder: str, numbers: Mapping[str, float]) -> None:
        """Note what the probes of one encoder found.

        Args:
            encoder: `pretrained` or `random`.
            numbers: accuracy, 0 to 1, by name.
        """
        for name, value in numbers.items():
            self.measured[name][encoder].append(value)

    def numbers(self) -> dict[str, float]:
        """Of each number its mean over pretrainings, `_random`, the mean at random initialisation, and `_gain`, the difference of the two;
        `_std` and `_random_std`, the deviations, where there are two or more."""
        found = {}
        for name, values in self.measured.items():
            pretrained, random = (values[encoder] for encoder in ENCODERS)
            found[name] = float(np.mean(pretrained))
            found[f"{name}_random"] = float(np.mean(random))
            found[f"{name}_gain"] = found[name] - found[f"{name}_random"]
            for key, some in ((f"{name}_std", pretrained), (f"{name}_random_std", random)):
                if len(some) > 1:
                    found[key] = float(np.std(some, ddof=1))
        return found

    def table(self) -> str:
        """A line a number: mean, deviation and number of encoders of either kind, the difference in points, and whether it is one."""
        width = max(len("probe"), *map(len, self.measured))
        lines = [f" {'probe':<{width}}  {'pretrained':<19}  {'random':<19}  {'difference':>10}"]
        for name, values in self.measured.items():
            gain = float(np.mean(values["pretrained"]) - np.mean(values["random"]))
            verdict = "" if gain >= ENOUGH else "  no gain at this budget"
            cells = "  ".join(f"{_cell(values[encoder]):<19}" for encoder in ENCODERS)
            lines.append(f" {name:<{width}}  {cells}  {100 * gain:>+10.1f}{verdict}")
        return "\n".join([*lines, " accuracy on the test images, ± deviation over so many encoders of its kind; the difference in points"])


def _cell(values: list[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "        "
    return f"{np.mean(values):.3f}{spread} ({len(values)})"
