"""The report of a sweep, in Markdown: what was run, what came out, and how far the learning rates were searched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from knltrain.config import as_typed
from knltrain.sweep.plan import Point
from knltrain.sweep.results import Best, Results


def report(results: Results) -> str:
    """The text of report.md, of all runs that have ended so far."""
    plan, out = results.sweep, results.out
    config = plan.base()
    known = [(point, results.outcome(point)) for point in results.points()]
    counts = {status: sum(outcome.status == status for _, outcome in known)
              for status in ("done", "diverged", "failed", "stopped")}  # fmt: skip
    lines = [
        f"# {plan.recipe}: accuracy against the batch",
        "",
        f"`{config.model}` on `{config.data}`, {as_typed(config.epochs)} epochs by each method at each batch, "
        f"{len(plan.seeds)} seed(s). Of {plan.num_tasks} runs, "
        + ", ".join(f"{count} {status}" for status, count in counts.items() if count or status == "done")
        + ".",
        "",
        "```bash",
        plan.command(out),
        "```",
        "",
        *_where(results, (point for point, outcome in known if outcome.ended)),
        "",
    ]
    best, reference = results.chosen(), results.reference()
    if best:
        lines += [
            "![top-1 against the batch](accuracy.png)", "",
            "A line a method at the best learning rate of each batch: means over seeds, whiskers from the worst seed "
            "to the best, hollow points of a single seed, and the reference dashed. Crosses are runs that diverged; "
            "a line has a gap where no learning rate has a result.", "",
            *_accuracy(best, reference), "",
        ]  # fmt: skip
    lines += ["## The search", "", *_search(results), ""]
    if best:
        lines += [
            "![losses](losses.png)", "",
            "Losses of the first seed at the best learning rate: in training (lines) and in validation (dots).", "",
        ]  # fmt: skip
    ended = [(point, outcome) for point, outcome in known if outcome.status in ("diverged", "failed")]
    if ended:
        lines += ["## Runs without a result", "", *(f"- `{point.name}` {outcome.status}: {outcome.reason}"
                                                    for point, outcome in ended), ""]  # fmt: skip
    return "\n".join(lines)


def _where(results: Results, ended: Iterable[Point]) -> list[str]:
    """Machine and versions as the runs have them, which may not be those of this process; lines, if they differ."""
    counts = Counter(filter(None, (_trained_on(results.record(point)) for point in ended)))
    if len(counts) == 1:
        return [f"{next(iter(counts))}."]
    return [f"- {count} run(s): {where}" for where, count in counts.items()]


def _trained_on(record: Mapping[str, Any]) -> str:
    try:
        versions = record["versions"]
        return (f"{record['cpu']}, {record['cores']} core(s); torch {versions['torch']}, "
                f"knltrain {versions['knltrain']} ({record['revision'] or 'no checkout'})")  # fmt: skip
    except (KeyError, TypeError):
        return ""


def _accuracy(best: Sequence[Best], reference: Best | None) -> list[str]:
    lines = [
        "| batch | optimizer | learning rate | of the rule's | top-1, % | seeds | diverged | against the reference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in best:
        spread = f" ± {one.deviation:.2f}" if one.deviation is not None else ""
        # The same method and batch is the reference itself.
        is_reference = reference and (one.optimizer, one.batch) == (reference.optimizer, reference.batch)
        against = "reference" if is_reference else f"{one.mean - reference.mean:+.2f}" if reference else ""
        lines.append(f"| {one.batch:,} | {one.optimizer} | {one.lr:g} | {as_typed(one.factor)} | "
                     f"{one.mean:.2f}{spread} | {len(one.top1)} | {len(one.diverged)} | {against} |")  # fmt: skip
    return lines


def _search(results: Results) -> list[str]:
    plan = results.sweep
    sizes = sorted({len(plan.factors(*cell)) for cell in plan.cells})
    number = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else str(sizes[0])
    factors = sorted({factor for cell in plan.cells for factor in plan.factors(*cell)})
    lines = [
        f"The search was as large for every method: at each batch {number} learning rate(s) with "
        f"{len(plan.search_seeds)} seed(s) each, as factors of the rate that its rule gives. "
        "The best has the fewest runs that diverged, and then the highest mean top-1. "
        + (f"It alone was trained with {len(plan.later_seeds)} more seed(s). " if plan.later_seeds else "")
        + "The means above include the seeds by which it was chosen.",
        "",
        "| optimizer | batch | the rule's rate | " + " | ".join(f"x {as_typed(factor)}" for factor in factors) + " |",
        "|---|---|---|" + "---|" * len(factors),
    ]
    notes = []
    for optimizer in plan.optimizers:
        for batch in plan.batches:
            best = results.best(optimizer, batch)
            rate = plan.point(optimizer, batch, 1.0, plan.seeds[0]).lr
            tried = plan.factors(optimizer, batch)
            cells = [_cell(results, optimizer, batch, one, best) if one in tried else "" for one in factors]
            lines.append(f"| {optimizer} | {batch:,} | {rate:g} | " + " | ".join(cells) + " |")
            if best and best.at_edge:
                notes.append(f"- {optimizer} at {batch:,}: {best.lr:g} is at the edge of what was tried; a rate beyond "
                             "it may be better.")  # fmt: skip
            if best and not best.complete:
                notes.append(f"- {optimizer} at {batch:,}: not every learning rate has been tried yet.")
    return [*lines, "", *notes] if notes else lines


def _cell(results: Results, optimizer: str, batch: int, factor: float, best: Best | None) -> str:
    """Mean top-1 over the search seeds, the best one bold; how many diverged."""
    plan = results.sweep
    outcomes = [results.outcome(plan.point(optimizer, batch, factor, seed)) for seed in plan.search_seeds]
    statuses = [outcome.status for outcome in outcomes]
    words = []
    if best and best.searched.get(factor, (0, None))[1] is not None:
        mean = f"{best.searched[factor][1]:.2f}"
        words.append(f"**{mean}**" if factor == best.factor else mean)
    words += [f"{statuses.count(status)} {status}" for status in ("diverged", "failed") if status in statuses]
    return ", ".join(words) or "-"
