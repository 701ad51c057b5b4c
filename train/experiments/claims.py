"""Check what the paper states about its MQAR experiments with our cells.

A claim compares the accuracy of a cell with that of another cell, or with a
number. It holds or it does not hold, or its cells have not been run.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np
from scipy import stats

from train.experiments import record as records

_P = 0.05  # above it the seeds do not tell two means apart


@dataclasses.dataclass(frozen=True)
class Claim:
  """A claim of the paper: one accuracy is above another one."""

  text: str
  #: The cell whose accuracy is the higher one, or a number.
  above: str | float
  #: The cell whose accuracy is the lower one, or a number.
  below: str | float


@dataclasses.dataclass(frozen=True)
class Finding:
  """A claim, and what was found."""

  claim: Claim
  #: Our accuracy of `claim.above`. None: not run.
  above: float | None
  #: Our accuracy of `claim.below`. None: not run.
  below: float | None
  #: p-value of equal means, by Welch's test over seeds. None: a side is a
  #: number or has one seed.
  p: float | None

  @property
  def verdict(self) -> str:
    """Whether the claim holds.

    "reproduced", "not reproduced" or "not run"; "same order" if ours are in the
    paper's order, but seeds differ so much that p is above 0.05.
    """
    if self.above is None or self.below is None:
      return "not run"
    if self.above <= self.below:
      return "not reproduced"
    clear = self.p is None or self.p <= _P
    return "reproduced" if clear else "same order"


def check(claim: Claim, found: Mapping[str, Any]) -> Finding:
  """Compare a claim with the records.

  Args:
    claim: the claim.
    found: records by the name of the cell.
  """
  above = _accuracies(claim.above, found)
  below = _accuracies(claim.below, found)
  p = None
  if above is not None and below is not None:
    seeds = min(len(above), len(below))
    spread = np.std(above) + np.std(below)
    if seeds > 1 and spread > 0:
      test = stats.ttest_ind(above, below, equal_var=False)
      p = float(test.pvalue)
  return Finding(claim, _mean(above), _mean(below), p)


def verdict(findings: Sequence[Finding]) -> str:
  """Return one verdict: that of all claims, "partly", or "not run".

  "reproduced so far" means that each claim that was checked holds.

  Args:
    findings: the findings about all claims of an experiment.
  """
  verdicts = {finding.verdict for finding in findings}
  checked = verdicts - {"not run"}
  if not checked:
    return "not run"
  if len(checked) > 1:
    return "partly"
  (result,) = checked
  return result if checked == verdicts else f"{result} so far"


def _accuracies(
  side: str | float, found: Mapping[str, Any]
) -> list[float] | None:
  """Return each seed's accuracy at the best rate, or the number itself."""
  if not isinstance(side, str):
    return [side]
  if side not in found:
    return None
  rate = records.best_rate(found[side])["learning_rate"]
  return records.accuracy_by_rate(found[side])[rate]


def _mean(values: list[float] | None) -> float | None:
  return None if values is None else float(np.mean(values))
