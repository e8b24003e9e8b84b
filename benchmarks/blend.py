"""Blending at the size of the LMSYS competition: how long all fits take, and what each is worth.

    OMP_NUM_THREADS=2 python benchmarks/blend.py [--rows 57477] [--members 10] [--folds 5]

Simulates members that err around true probabilities, each in its own way and with its own confidence; labels are drawn
from the truth. Every way to blend is fitted to all rows and cross-fitted, as `pairclf blend` does, and the gains of the
best are ordered. The last line is one JSON object of figures.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from pairclf.console import stdout
from pairclf.scores.blend import HeldOutRows, blends_of, cross_fit, gains
from pairclf.scores.probabilities import probabilities
from pairclf.task import LMSYS


def simulated(rows: int, members: int, seed: int = 0) -> HeldOutRows:
    """Members whose logits are the truth's with an error of their own, scaled by 0.7 to 1.4."""
    generator = np.random.default_rng(seed)
    truth = generator.normal(size=(rows, 3))
    labels = (probabilities(truth, LMSYS).cumsum(axis=1)[:, :2] < generator.random((rows, 1))).sum(axis=1)
    shared = generator.normal(size=(rows, 3))  # what all members get wrong
    scores = []
    for _ in range(members):
        error = generator.uniform(0.3, 0.6) * shared + generator.uniform(0.3, 0.9) * generator.normal(size=(rows, 3))
        scores.append(probabilities(generator.uniform(0.7, 1.4) * (truth + error), LMSYS))
    return HeldOutRows(np.stack(scores), np.eye(3)[labels], np.ones(rows), LMSYS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=57_477)
    parser.add_argument("--members", type=int, default=10)
    parser.add_argument("--folds", type=int, default=5)
    options = parser.parse_args()
    rows = simulated(options.rows, options.members)
    folds = np.random.default_rng(1).integers(options.folds, size=options.rows)
    figures: dict[str, object] = {"rows": options.rows, "members": options.members, "folds": options.folds}
    wall, cpu, best = time.perf_counter(), time.process_time(), ("", np.inf)
    ways = blends_of(LMSYS)
    for name, fit in ways.items():
        start = time.perf_counter()
        fitted = fit(rows)
        nested = rows.loss(cross_fit(fit, rows, folds, lambda: None))
        own = rows.loss(fitted.of(rows.members, LMSYS))
        best = min(best, (name, nested), key=lambda pair: pair[1])
        seconds = time.perf_counter() - start
        figures[name] = {"seconds": round(seconds, 2), "nested": round(nested, 5), "optimism": round(nested - own, 6)}
        stdout.print(f"{name:<22} {seconds:6.1f} s  nested {nested:.5f}  optimism {nested - own:+.6f}")
    ordered = gains(ways[best[0]](rows), rows)
    stdout.print(f"best: {best[0]}; gains {', '.join(f'{member}: {gain:.4f}' for member, gain in ordered)}")
    stdout.print(f"(M - 1) / (2 N) = {(options.members - 1) / (2 * options.rows):.6f}")
    figures |= {"wall_s": round(time.perf_counter() - wall, 1), "cpu_s": round(time.process_time() - cpu, 1)}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
