"""Linear layers with the paper's initial values."""

from flax import nnx
from jax import Array
import jax.numpy as jnp

from pallas_kernels import numerics
from rebased_jax.config_checks import DType, Precision, compute_dtype


class Linear(nnx.Linear):
  """Compute x W + b in a compute dtype, which x, W and b are cast to.

  It differs from `nnx.Linear` in one point: the gradient of the bias is summed
  over all tokens in float32, whatever the compute dtype is.
  """

  def __call__(self, x_D: Array) -> Array:
    """Return x W + b, (…, features_out), for x (…, features_in)."""
    y_D = self.product(x_D)
    if self.bias is None:
      return y_D
    return numerics.add_bias(y_D, self.bias[...])

  def product(self, x_D: Array) -> Array:
    """Return x W, without the bias."""
    return jnp.matmul(
      x_D.astype(self.dtype),
      self.kernel[...].astype(self.dtype),
      precision=self.precision,
    )


def linear(
  features_in: int,
  features_out: int,
  *,
  dtype: DType,
  rngs: nnx.Rngs,
  use_bias: bool = False,
  stddev: float = 0.02,
  precision: Precision | None = None,
  param_dtype: DType = "float32",
  kernel_init: nnx.Initializer | None = None,
) -> Linear:
  """Make a linear layer as the paper's code initialises it.

  Args:
    features_in: width of the input.
    features_out: width of the output.
    dtype: the compute dtype.
    rngs: draws the initial kernel.
    use_bias: whether there is a bias; it starts at 0.
    stddev: standard deviation of the initial kernel, a normal distribution.
    precision: of the products of a float32 layer, as `asked_precision` takes
      it. None: jax's setting.
    param_dtype: dtype of the kernel and the bias.
    kernel_init: draws the initial kernel, instead of that distribution. None:
      the distribution.
  """
  return Linear(
    features_in,
    features_out,
    use_bias=use_bias,
    kernel_init=kernel_init or nnx.initializers.normal(stddev),
    dtype=compute_dtype(dtype),
    param_dtype=compute_dtype(param_dtype, "param_dtype"),
    precision=numerics.asked_precision(precision, dtype),
    rngs=rngs,
  )


def output_stddev(layers: int) -> float:
  """Return the initial standard deviation of a block's output projection.

  It falls with the number of layers, 0.02 / √(2 · layers), as in GPT-2, so that
  the residual stream does not start larger in deep models.
  """
  return 0.02 * (2 * layers) ** -0.5
