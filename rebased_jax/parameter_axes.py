"""The names of each parameter's axes, by which they are split over a mesh.

A name says what an axis counts. Rules map names to axes of a mesh:

    model = name_parameter_axes(LM(config, rngs=nnx.Rngs(0)))
    rules = [("embed", "fsdp"), ("vocab", "tensor")]
    rules += [("mlp", "tensor"), ("heads", "tensor")]
    with nnx.logical_axis_rules(rules):
      specs = nnx.get_partition_spec(nnx.state(model, nnx.Param))

| name     | what the axis counts                                   |
|----------|--------------------------------------------------------|
| "vocab"  | tokens of the vocabulary                               |
| "embed"  | the model's width D                                    |
| "mlp"    | the MLP's hidden width                                 |
| "heads"  | heads and their features, or a mixer's channels        |
| None     | stacked pairs of layers, or an axis too small to split |
"""

import re
from typing import TypeVar

from flax import nnx

_Module = TypeVar("_Module", bound=nnx.Module)

# The first pattern found in a path names the last axes of the array.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r"token_embedding$", ("vocab", "embed")),
  (r"position_embedding$", (None, "embed")),
  (r"mlp/up/kernel$", ("embed", "mlp")),
  (r"mlp/up/bias$", ("mlp",)),
  (r"mlp/down/kernel$", ("mlp", "embed")),
  (r"gate/kernel$", ("embed", "heads")),  # of the short convolution
  (r"gate/bias$", ("heads",)),
  (r"project/[qkv]/kernel$", ("embed", "heads")),
  (r"project/o/kernel$", ("heads", "embed")),
  (r"_affine/(gamma|beta)$", ("heads",)),
  (r"(^|mixer/)(qkv|[kvr])/kernel$", ("embed", "heads")),
  (r"(^|mixer/)qkv/bias$", ("heads",)),
  (r"(^|mixer/)o/kernel$", ("heads", "embed")),  # of RWKV
  (r"(^|mixer/)(decay|first)$", ("heads",)),
  (r"(in|gate)_proj/kernel$", ("embed", "heads")),
  (r"in_proj/bias$", ("heads",)),
  (r"out_proj/kernel$", ("heads", "embed")),
  (r"(^|mixer/)conv/kernel$", (None, "heads")),  # taps, channels
  (r"(^|mixer/)conv/bias$", ("heads",)),
  (r"x_proj/kernel$", ("heads", None)),  # channels, R + 2N: of Mamba
  (r"dt_proj/kernel$", (None, "heads")),  # R, channels
  (r"(dt_proj/bias|(^|mixer/)D)$", ("heads",)),
  (r"A_log$", ("heads", None)),  # channels, N
  (r"", ()),  # norms, other biases and taps: small
)


def axis_names(path: str, ndim: int) -> tuple[str | None, ...]:
  """Return the names of a parameter's axes.

  Args:
    path: the parameter's path, with slashes.
    ndim: the number of its axes.
  """
  names = next(names for pattern, names in RULES if re.search(pattern, path))
  names = names[-ndim:] if ndim else ()
  return (None,) * (ndim - len(names)) + names


def name_parameter_axes(model: _Module) -> _Module:
  """Give every parameter the names of its axes as metadata; return the model.

  `nnx.get_partition_spec` and `nnx.get_named_sharding` read the names. They
  change neither values nor results.

  Args:
    model: an `LM`, a mixer, or a module that has some.
  """
  for path, node in nnx.iter_graph(model):
    if isinstance(node, nnx.Param):
      names = axis_names("/".join(map(str, path)), node.get_value().ndim)
      node.set_metadata(out_sharding=names)
  return model
