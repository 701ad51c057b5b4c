"""Polynomial linear attention: sim = c0 + c1·s + c2·s² with s = scale·q·k.

Read `spec.py` first: it has the equations, the quadratic reference and a worked
example. `state.py` has the linear form, `operator.py` the derivative.
"""

from pallas_kernels.polynomial.api import (
  IMPLEMENTATIONS as IMPLEMENTATIONS,
  Implementation as Implementation,
  polynomial_attention as polynomial_attention,
  polynomial_attention_at as polynomial_attention_at,
  polynomial_attention_step as polynomial_attention_step,
  polynomial_attention_weights as polynomial_attention_weights,
  which_implementation as which_implementation,
)
from pallas_kernels.polynomial.coefficients import (
  BASED as BASED,
  REBASED as REBASED,
  Coefficients as Coefficients,
)
from pallas_kernels.polynomial.position_cost import (
  PositionCall as PositionCall,
  expected_form as expected_form,
  is_cheaper_alone as is_cheaper_alone,
)
from pallas_kernels.polynomial.state import (
  State as State,
  zero_state as zero_state,
)
