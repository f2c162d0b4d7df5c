"""What the runs of a comparison measured beside accuracy, and what of it differs over paired seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dinovmf_plugin.comparison.results import Group
from dinovmf_plugin.comparison.statistics import paired_differences, paired_p, with_spread
from dinovmf_plugin.report.tables import Table

__all__ = ["components_in_use", "differences_table", "learning_table", "learnt"]


def learnt(run: Mapping[str, Any]) -> dict[str, float | None]:
    """The last record of a run's monitor: information in nats and as shares, loss over log K."""
    names = ("target_information", "target_information_share", "student_information_share")
    last: dict[str, Any] = next(iter(run["monitor"]["step"][-1:]), {})
    return {name: last.get(name) for name in (*names, "loss_over_log_k")}


def components_in_use(run: Mapping[str, Any]) -> float | None:
    """Perplexity of the arg-max over the training images; None for methods without prototypes."""
    return float(run["prototypes"]["usage"]["usage_perplexity"]) if run["prototypes"] else None


def _held_out(run: Mapping[str, Any]) -> float | None:
    return run["prototypes"]["held_out_log_likelihood"] if run["prototypes"] else None


Measure = Callable[[Mapping[str, Any]], Any]


def _measures(metric: str) -> dict[str, tuple[Measure, int, str]]:
    """What is compared: of a run, digits in tables, unit."""
    return {
        "kNN": (lambda run: run["metrics"].get(metric), 2, "points"),
        "I": (lambda run: learnt(run)["target_information"], 3, "nats"),
        "components in use": (components_in_use, 1, "perplexity"),
        "log p(y), held out": (_held_out, 1, "nats"),
    }


def _share(name: str) -> Measure:
    def percent(run: Mapping[str, Any]) -> float | None:
        value = learnt(run)[name]
        return None if value is None else 100 * value

    return percent


def learning_table(groups: Sequence[Group], metric: str) -> Table | None:
    """Mean and spread over the seeds of accuracy and of what targets, student and mixture say.

    Args:
        groups: of runs that train.
        metric: the accuracy, such as ``knn_k10``.

    Returns:
        None if no run has a monitor's records or prototypes.
    """
    wanted: dict[str, tuple[Measure, int]] = {
        "kNN (%)": (lambda run: run["metrics"].get(metric), 1),
        "I, nats": (lambda run: learnt(run)["target_information"], 2),
        "student's share (%)": (_share("student_information_share"), 1),
        "loss / log K (%)": (_share("loss_over_log_k"), 1),
        "components in use": (components_in_use, 0),
        "log p(y), held out": (_held_out, 1),
    }
    told = [measure for name, (measure, _) in wanted.items() if name != "kNN (%)"]
    if not any(_by_seed(group, measure) for group in groups for measure in told):
        return None
    rows = [
        [group.name, str(len(group.whole))]
        + [
            with_spread(list(_by_seed(group, measure).values()), digits)
            for measure, digits in wanted.values()
        ]
        for group in groups
    ]
    return Table(["", "seeds", *wanted], rows)


def _by_seed(group: Group, measure: Measure) -> dict[int, float]:
    found = {run["seed"]: measure(run) for run in group.whole}
    return {seed: value for seed, value in found.items() if value is not None}


def _difference(differences: Sequence[float], digits: int) -> str:
    if not differences:
        return "–"
    sign = "+" if sum(differences) >= 0 else ""
    p = paired_p(differences)
    return f"{sign}{with_spread(differences, digits)}" + (f" (p {p:.1g})" if p is not None else "")


def differences_table(groups: Sequence[Group], baseline: Group, metric: str) -> Table | None:
    """Every group less the baseline: mean and spread of the paired differences, with the t-test's p.

    Args:
        groups: what is compared; the baseline among them is left out.
        baseline: what all are compared to.
        metric: the accuracy, such as ``knn_k10``.

    Returns:
        None if no group has a seed in common with the baseline.
    """
    measures = _measures(metric)
    rows = []
    for group in groups:
        if group is baseline:
            continue
        found = {
            name: paired_differences(_by_seed(group, measure), _by_seed(baseline, measure))
            for name, (measure, _, _) in measures.items()
        }
        if any(found.values()):
            seeds = max(map(len, found.values()))
            cells = [_difference(found[name], digits) for name, (_, digits, _) in measures.items()]
            rows.append([group.name, *cells, str(seeds)])
    named = [f"{name}, {unit}" for name, (_, _, unit) in measures.items()]
    header = [f"less {baseline.name}", *named, "paired seeds"]
    return Table(header, rows) if rows else None
