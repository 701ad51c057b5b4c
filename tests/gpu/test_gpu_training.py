"""How the benchmark of training through the kernels judges curves."""

import pytest

from tools import compare_training


def test_a_distance_is_of_runs_of_one_length() -> None:
  assert compare_training.distance([3.0, 1.0], [2.0, 3.0]) == 1.5
  with pytest.raises(ValueError, match="zip"):
    compare_training.distance([3.0, 1.0], [2.0])


@pytest.mark.parametrize(
  "gpu, passes, learned",
  [
    ([[4.0, 1.1], [4.0, 1.2]], True, True),
    ([[4.0, 2.5], [4.0, 2.6]], False, True),  # learns, but later than "xla"
    ([[4.0, 3.9], [4.0, 1.1]], True, False),  # one seed does not learn
  ],
)
def test_runs_are_compared_with_what_seeds_do(gpu, passes, learned) -> None:
  xla = [[4.0, 1.0], [4.0, 1.3]]
  found = compare_training.judge({"gpu": gpu, "xla": xla})
  assert (found["within_noise"], found["learned"]) == (passes, learned)
