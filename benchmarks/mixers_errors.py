"""How far two trees of arrays are apart."""

from typing import Any

import jax
import numpy as np


def relative(found: Any, wanted: Any) -> dict[str, float]:
  """‖a − b‖ / ‖b‖ of each array, by its path.

  A parameter's gradient, under "dparams", is held against a thousandth of the
  largest one's at least: that of a key's bias is roundings alone.
  """
  found, wanted = _flat(found), _flat(wanted)
  size = {name: np.linalg.norm(x) for name, x in wanted.items()}
  least = 1e-3 * max(x for name, x in size.items() if "dparams" in name)
  return {
    name: float(
      np.linalg.norm(np.asarray(found[name], np.float32) - x)
      / max(size[name], least if "dparams" in name else 0)
    )
    for name, x in wanted.items()
  }


def _flat(tree: Any) -> dict[str, Any]:
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {name(path): leaf for path, leaf in leaves}
