"""How hard the phantom is for what looks at brightness alone: AUROC on held-out slices.

    phantom_hardness.py CACHE      a cache of `trainer prepare --phantom N [--thin]`, or runs/demo/cache

A threshold on the slice's mean, and an L2-regularised logistic regression on all 3 x 256 x 256 pixels, fitted on the training part in its
dual form (its weights are a combination of the slices), its regularisation chosen on the validation part. Needs 10 GB for a demo's cache.
"""

import csv
import pathlib
import sys

import numpy as np
from scipy.optimize import minimize
from scipy.stats import rankdata


def auroc(scores, labels):
    """Mann and Whitney's, ties counted half."""
    ranks, n_positive = rankdata(scores), labels.sum()
    n_negative = len(labels) - n_positive
    return (ranks[labels].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)


def fit(gram, labels, penalty):
    """Coefficients of the training slices and the intercept."""
    signs = np.where(labels, 1.0, -1.0)

    def loss(parameters):
        values = gram @ parameters[:-1]
        margins = signs * (values + parameters[-1])
        slope = -signs / (1 + np.exp(np.clip(margins, -50, 50))) / len(signs)
        cost = np.logaddexp(0, -margins).mean() + 0.5 * penalty * parameters[:-1] @ values
        return cost, np.append(gram @ slope + penalty * values, slope.sum())

    return minimize(loss, np.zeros(len(signs) + 1), jac=True, method="L-BFGS-B", options={"maxiter": 300}).x


def main():
    cache = pathlib.Path(sys.argv[1])
    with open(cache / "index.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    tensors = np.memmap(cache / "tensors.u8", np.uint8, "r").reshape(len(rows), -1)
    labels = np.array([row["pe_present"] == "1" for row in rows])
    part = {name: np.array([i for i, row in enumerate(rows) if row["part"] == name]) for name in ("train", "val", "test")}
    means = np.array([tensors[i].mean() for i in part["test"]])
    by_mean = auroc(means, labels[part["test"]])
    print(f"mean intensity        AUROC {max(by_mean, 1 - by_mean):.3f}")

    pixels = {name: tensors[part[name]].astype(np.float32) / 255 for name in part}
    mean = pixels["train"].mean(0)
    for values in pixels.values():
        values -= mean
    gram = {name: values @ pixels["train"].T / len(mean) for name, values in pixels.items()}
    best = (0.0, None, None)
    for penalty in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
        coefficients = fit(gram["train"].astype(np.float64), labels[part["train"]], penalty)
        score = {name: gram[name] @ coefficients[:-1] for name in ("val", "test")}
        val = auroc(score["val"], labels[part["val"]])
        best = max(best, (val, penalty, auroc(score["test"], labels[part["test"]])), key=lambda found: found[0])
    print(f"logistic regression   AUROC {best[2]:.3f}  (penalty {best[1]}, validation {best[0]:.3f})")


main()
