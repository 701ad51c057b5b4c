"""The page of results: the paper's figures and tables beside ours.

It is made from the records of cells alone, so that anyone can make it again
after running more of them.
"""

from collections.abc import Mapping
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rebased_jax import atomic, parameter_count, presets
from train import compiled_steps
from train.experiments import (
  attention_figures,
  attention_iou,
  claims,
  drawings,
  language,
  language_results,
  paper,
  record as records,
  results,
)
from train.experiments.paper import Experiment

_Records = Mapping[str, Any]

_HEAD = """# The paper, reproduced

Each section has a figure or a table of the paper
([arXiv 2402.10644](https://arxiv.org/abs/2402.10644)): what the paper states
there, what we expected before our runs, the command, and the paper's numbers
beside ours. `rebased experiment page` makes this page from the records of
cells, and a test compares the two. Where a number is missing, nothing was run.

- A *cell* is one architecture on one data set at a grid of learning rates and
  seeds. Its record is in `benchmarks/results/experiments/cells`.
- An accuracy is of the 3,000 held-out rows at the best epoch, as in the paper.
  It is the mean over seeds at the learning rate with the highest mean, ± the
  standard deviation over seeds (n − 1).
- *Epochs* are those of the cell's longest run. A run stops above 0.99, as the
  paper's do, so that differences above 0.99 mean little. A run *cut short*
  ended earlier although it was not above 0.99.
- The paper has four learning rates and five seeds everywhere. Where a cell of
  ours has fewer, the table says so: the rates tried, the best in bold, and the
  number of seeds.
- p is the p-value of Welch's test over seeds. With two or three seeds it says
  little. *Same order* means that ours are in the paper's order with p above
  0.05.
- Numbers with ≈ are read off the paper's plots.

This runs a cell again, and compares its first epochs:

    cd benchmarks/results/experiments
    rebased experiment verify cells/rebased-L128-d64.json
"""

_TABLE_2 = """## Table 2: language modelling

The paper: on the Pile perplexity is 16.62 for attention, 16.69 for Based and
16.45 for ReBased; on tokens that can be recalled (AR) 3.57, 3.72 and 3.67.

Expected: 2026-12-01: ReBased and Based are within 2 % of each other, and both
below attention alone. The short convolution takes attention below both. ReBased
is below Based on AR tokens.

The Pile is not part of this repository, and the paper's three runs take some
170 GPU hours. The presets `pile-127m-attention`, `pile-157m-based` and
`pile-157m-rebased` are its models and schedule. Ours are smaller runs on other
text: Python sources and documents of installed packages, a vocabulary of
16,384, rows of 2048 tokens, 201 M training tokens, which is two epochs or more.
A hundredth of the files is held out; other files of the same packages, some
nearly identical, are in the training text. Learning rate, schedule, weight
decay and clipping are the paper's. Attention is the model of Table 9; the
others have 12 heads and 16 features, as the paper's text says. A token is AR if
its bigram occurred earlier in the row. Numbers of ours do not compare with the
paper's; their order may.
"""

_FIGURE_2 = """## Figure 2: similarity functions

The paper: the exponential function of softmax, Based's polynomial, and the
parabola of ReBased, whose minimum is 0. Based's is 0.5 at its minimum, so that
no token can be ignored. These are formulas, not measurements.

![Figure 2](figures/figure-2.png)
"""

_FIGURE_6 = """## Figure 6: architectures

    tokens: embedding + positions, dropout
      |
      |  x + BaseConv(LN(x)),  then  x + LN(x)     first layer of a pair
      |  x + mixer(LN(x)),     then  x + LN(x)     second layer of a pair
      |
    LN, then logits by the transposed embedding

    ReBased: q, k are normalised, times γ, plus β; similarity (q·k)² / F
    Based:   similarity 1 + s + s²/2, where s = q·k / √F
    both:    sums over the past, divided by the sum of the similarities

MQAR models have one pair. Language models have an MLP instead of the second
norm. [](mixers.md) has the equations.
"""


class _Section(NamedTuple):
  """A section of the page."""

  text: str
  verdict: str


def text(folder: Path) -> str:
  """Return the page in Markdown.

  Args:
    folder: holds `cells/` and `parameters.json`.

  Raises:
    RecordError: a record cannot be read, or is of another cell.
  """
  experiments = paper.make_experiments()
  found = {
    name: results.read_cells(experiment, folder / "cells")
    for name, experiment in experiments.items()
  }

  def experiment(title: str, name: str) -> _Section:
    return _experiment(title, experiments[name], found[name])

  every = {name: x for cells in found.values() for name, x in cells.items()}
  sections = {
    "Figure 1": experiment("Figure 1: accuracy on MQAR", "figure-1"),
    "Table 1, Figure 3": experiment(
      "Table 1 and Figure 3: the kernel, changed", "table-1"
    ),
    "Figure 4": _figure_4(found["table-1"]),
    "Figure 7": experiment(
      "Figure 7: alone and after a short convolution", "figure-7"
    ),
    "Table 3": _table_3(experiments["table-3"], found["table-3"]),
    "Figures 5, 8 and 9": _attention(found["table-3"]),
    "Figure 10": _figure_10(every),
    "Table 2": _table_2(language.read_cells(folder / "cells")),
    "Tables 4 and 9": _parameters(folder / "parameters.json"),
  }
  lines = [_HEAD, "| figure or table | verdict |", "|---|---|"]
  lines += [f"| {name} | {x.verdict} |" for name, x in sections.items()]
  lines += ["", *(section.text for section in sections.values())]
  lines += [_FIGURE_2, _FIGURE_6, _losses(experiments, found)]
  return "\n".join(lines)


def write(folder: Path, docs: Path) -> list[Path]:
  """Write the page and its pictures.

  Args:
    folder: the folder of the records, as in `text`.
    docs: gets `results.md`, and pictures in `figures/`.

  Returns:
    The files.
  """
  counts = parameter_counts()
  atomic.write_json(folder / "parameters.json", counts)
  page = docs / "results.md"
  atomic.write_text(page, text(folder))
  return [page, *drawings.write(folder, docs / "figures")]


def parameter_counts() -> dict[str, int]:
  """Return the parameters of the models of Tables 4 and 9, by name."""
  return {
    name: parameter_count(compiled_steps.abstract_lm(config))
    for name, config in presets.make_models().items()
  }


def _parameters(path: Path) -> _Section:
  """Return the section of Tables 4 and 9."""
  counts = json.loads(path.read_text())
  lines = [
    "## Tables 4 and 9: parameters",
    "",
    "**Reproduced.** Each of the 31 counts is the paper's, to the parameter. "
    "`tests/model/test_presets.py` compares them. Table 4 mixes lengths: its "
    "models have position tables of different sizes, and ours have the same.",
    "",
    "| MQAR model | " + " | ".join(f"width {x}" for x in presets.WIDTHS) + " |",
    results.rule(1 + len(presets.WIDTHS)),
  ]
  for system in presets.TABLE_4:
    row = [f"{counts[f'table-4-{system}-{x}']:,}" for x in presets.WIDTHS]
    lines.append(f"| {system} | {' | '.join(row)} |")
  large = {
    name.removeprefix("table-9-"): count
    for name, count in counts.items()
    if name.startswith("table-9-")
  }
  lines += ["", "| language model | parameters |", "|---|---|"]
  lines += [f"| {name} | {count:,} |" for name, count in large.items()]
  return _Section("\n".join([*lines, ""]), "reproduced")


def _experiment(
  title: str,
  experiment: Experiment,
  cells: _Records,
) -> _Section:
  """Return the section of an experiment with cells."""
  name = experiment.name
  findings = [claims.check(claim, cells) for claim in experiment.claims]
  checked = [finding for finding in findings if finding.verdict != "not run"]
  verdict = claims.verdict(findings)
  lines = [
    f"## {title}",
    "",
    f"The paper: {experiment.statement}",
    "",
    f"Expected: {experiment.hypothesis}",
    "",
    f"**{verdict.capitalize()}.** {len(cells)} of {len(experiment.cells)} "
    f"cells were run, and {len(checked)} of {len(findings)} claims checked.",
    "",
    f"    rebased experiment {name} --out benchmarks/results/experiments",
    "",
  ]
  lines += [
    "Ours / the paper's:",
    "",
    *results.grid(experiment, cells),
    "",
  ]
  if cells:
    lines += [f"![{title}](figures/{name}.png)", ""]
    lines += [*results.rows(experiment, cells, only_run=True), ""]
  if checked:
    lines += [
      "| claim of the paper | ours | p | verdict |",
      "|---|---|---|---|",
    ]
    lines += [*map(_finding_row, checked), ""]
  if 0 < len(checked) < len(findings):
    verdict += f": {len(checked)} of {len(findings)} claims checked"
  return _Section("\n".join(lines), verdict)


def _finding_row(finding: claims.Finding) -> str:
  ours = ""
  if finding.above is not None and finding.below is not None:
    ours = f"{finding.above:.4g} > {finding.below:.4g}"
    if finding.verdict == "not reproduced":
      ours = f"{finding.above:.4g} ≤ {finding.below:.4g}"
  p = "" if finding.p is None else f"{finding.p:.2g}"
  return f"| {finding.claim.text} | {ours} | {p} | {finding.verdict} |"


def _figure_4(found: _Records) -> _Section:
  """Return the section of Figure 4, from the cells of Table 1."""
  several = {
    name: record
    for name, record in found.items()
    if len(records.accuracy_by_rate(record)) > 1
  }
  verdict = "shown below" if several else "not run"
  lines = [
    "## Figure 4: the best of n tried learning rates",
    "",
    "The paper: with few tried learning rates ReBased's expected accuracy is "
    "above that of the other kernels. The number is the V-statistic of Dodge "
    "et al. 2019, of draws with replacement.",
    "",
  ]
  if not several:
    lines += ["**Not run.** No cell of Table 1 has more than one rate.", ""]
    return _Section("\n".join(lines), verdict)
  most = max(len(records.accuracy_by_rate(x)) for x in several.values())
  counts = range(1, most + 1)
  lines += [
    "| cell | seeds | " + " | ".join(f"n = {n}" for n in counts) + " |",
    results.rule(2 + most),
  ]
  for name, record in several.items():
    rates = records.accuracy_by_rate(record)
    expected = results.expected_best([np.mean(x) for x in rates.values()])
    cells = [f"{value:.3f}" for value in expected]
    cells += [""] * (most - len(cells))
    seeds = records.best_rate(record)["seeds"]
    lines.append(f"| {name} | {seeds} | {' | '.join(cells)} |")
  lines += ["", "![Figure 4](figures/figure-4.png)", ""]
  return _Section("\n".join(lines), verdict)


def _table_3(experiment: Experiment, cells: _Records) -> _Section:
  """Return the section of Table 3: IoU of attention and the right tokens."""
  verdict = "shown below" if cells else "not run"
  lines = [
    "## Table 3: attention on the right tokens",
    "",
    f"The paper: {experiment.statement}",
    "",
    f"Expected: {experiment.hypothesis}",
    "",
    "IoU compares the weights of the query rows, over the columns of the "
    "pairs, with the right columns, over 10,000 examples. *Soft* takes the "
    "weights themselves, *largest* the largest one of each row. Both are of "
    "the mean over heads, and of the best head in brackets: the paper does not "
    "say how it treats heads.",
    "",
    f"**{verdict.capitalize()}.** {len(cells)} of {len(experiment.cells)} "
    "cells were run.",
    "",
    f"    rebased experiment {experiment.name} --out "
    "benchmarks/results/experiments",
    "",
  ]
  if cells:
    lines += [
      "| cell | paper's IoU | soft | largest | paper's accuracy | accuracy | "
      "seeds | rates | epochs | seconds, device |",
      results.rule(10),
    ]
  for name, record in cells.items():
    theirs = paper.TABLE_3[results.place(name).system.removeprefix("iou-")]
    soft, soft_best, largest, largest_best = (
      _at_best(record, each) for each in attention_iou.NAMES
    )
    lines.append(
      f"| {name} | {theirs[0]} | {soft} ({soft_best}) | {largest} "
      f"({largest_best}) | {theirs[1]} | {results.ours(record)} |"
    )
  return _Section("\n".join([*lines, ""]), verdict)


def _attention(cells: _Records) -> _Section:
  """Return the section of Figures 5, 8 and 9: the matrices of Table 3."""
  noise = attention_figures.wrong_weights(cells)
  verdict = "shown below" if noise else "not run"
  lines = [
    "## Figures 5, 8 and 9: attention matrices",
    "",
    "The paper: attention after the fixed layer looks at one token. ReBased "
    "has fewer noisy tokens than Based. It gives no measure of that.",
    "",
    "Ours are of the models of Table 3, at the best learning rate, the first "
    "seed and its best epoch: the weights as the mean over heads, on examples "
    "of no data set. A row is a query, in the order of the keys, and red marks "
    "the right token. Our measure of noise is the share of a query's weight "
    "on wrong tokens of the pairs, and how many of them have more than 0.01.",
    "",
  ]
  if not noise:
    lines += ["**Not run.** No record has attention matrices.", ""]
    return _Section("\n".join(lines), verdict)
  lines += [
    "| cell | weight on the right token | on wrong tokens | wrong tokens "
    "above 0.01 |",
    results.rule(4),
  ]
  for name, found in noise.items():
    wrong_QS = found.wrong_QS
    lines.append(
      f"| {name} | {found.right_Q.mean():.3f} | "
      f"{wrong_QS.sum(axis=1).mean():.3f} | "
      f"{(wrong_QS > 0.01).sum(axis=1).mean():.1f} of {wrong_QS.shape[1]} |"
    )
  for number in (5, 8, 9):
    lines += ["", f"![Figure {number}](figures/figure-{number}.png)"]
  return _Section("\n".join([*lines, ""]), verdict)


def _at_best(record: dict[str, Any], name: str) -> str:
  """Return an IoU at each run's best epoch, as mean ± deviation over seeds."""
  rate = records.best_rate(record)["learning_rate"]
  values = [
    run["iou"][name][run["best_epoch"]]
    for run in record["runs"]
    if run["learning_rate"] == rate
  ]
  if len(values) == 1:
    return f"{values[0]:.3f}"
  return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def _figure_10(found: _Records) -> _Section:
  """Return the section of Figure 10, from every cell that has γ and β."""
  shown = {name: x for name, x in found.items() if drawings.has_affine(x)}
  verdict = "shown below" if shown else "not run"
  lines = [
    "## Figure 10: γ and β during training",
    "",
    "The paper: the mean of γ falls to about 0.13 at every length, and β goes "
    "to 0. Weight decay alone, at the learning rate 3e-3 over 64 epochs, takes "
    "a parameter to 0.148 of its first value.",
    "",
    "Ours are taken after each epoch, at the best learning rate and the first "
    "seed: mean ± standard deviation over the 192 numbers. The paper shows "
    "every step.",
    "",
  ]
  if not shown:
    lines += ["**Not run.** No record of a model with γ and β has them.", ""]
    return _Section("\n".join(lines), verdict)
  lines += [
    "| cell | rate | epochs | γ of q | γ of k | β of q | β of k |",
    "|---|---|---|---|---|---|---|",
  ]
  for name, record in shown.items():
    run = records.shown_run(record)
    last = [
      drawings.moments(run, side, letter)
      for letter in ("gamma", "beta")
      for side in ("query", "key")
    ]
    cells = [
      "" if x is None else f"{x[0][-1]:.3f} ± {x[1][-1]:.3f}" for x in last
    ]
    lines.append(
      f"| {name} | {run['learning_rate']:g} | {run['epochs']} | "
      f"{' | '.join(cells)} |"
    )
  lines += ["", "![Figure 10](figures/figure-10.png)", ""]
  return _Section("\n".join(lines), verdict)


def _table_2(found: _Records) -> _Section:
  """Return the section of Table 2: perplexity on text."""
  planned = language.make_cells()
  done = len(planned.keys() & found.keys())
  verdict = "not reproduced"
  lines = [
    _TABLE_2,
    f"**Not reproduced.** Of the smaller runs {done} of {len(planned)} were "
    "done.",
    "",
    "    rebased experiment table-2 --minutes 8 --out "
    "benchmarks/results/experiments",
    "",
  ]
  if found:
    verdict = "not reproduced; a smaller run below"
    lines += ["Ours / the paper's:", "", *language_results.table(found), ""]
    lines += ["![Table 2](figures/table-2.png)", ""]
  return _Section("\n".join(lines), verdict)


def _losses(
  experiments: Mapping[str, Experiment], found: Mapping[str, _Records]
) -> str:
  """Return the section "Where we lose"."""
  lines = [
    "## Where we lose",
    "",
    "Cells of ours that are more than 0.01 below the paper's, and runs that "
    "stayed below 0.9 in a cell whose best rate is above 0.98:",
    "",
  ]
  items = []
  seen = set()
  for name, experiment in experiments.items():
    for cell, record in found[name].items():
      if cell in seen:
        continue
      seen.add(cell)
      best = records.best_rate(record)
      published = experiment.published.get(cell)
      if published is not None and best["mean"] < published.mean - 0.01:
        items.append(
          f"- {cell}: ours {best['mean']:.3f}, the paper's {published}."
        )
      low = [run for run in record["runs"] if run["best_accuracy"] < 0.9]
      if low and best["mean"] > 0.98:
        runs = ", ".join(_low_run(record, run) for run in low)
        items.append(f"- {cell}: {runs}.")
  lines += items or ["- none so far."]
  planned = {cell for x in experiments.values() for cell in x.cells}
  missing = len(planned - seen)
  lines += [
    "",
    f"{missing} planned cells were not run. `rebased experiment list` names "
    "them.",
    "",
  ]
  return "\n".join(lines)


def _low_run(record: dict[str, Any], run: dict[str, Any]) -> str:
  """Return what a run with a low accuracy reached, and how long it was."""
  cut = "cut after " if records.is_cut(record, run) else ""
  return (
    f"{run['best_accuracy']:.3f} at rate {run['learning_rate']:g} "
    f"(seed {run['seed']}, {cut}{run['epochs']} epochs)"
  )
