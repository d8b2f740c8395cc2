"""A gated SAE as a JumpReLU SAE.

With y = (x - b_dec) @ W_enc, a gated SAE gives relu(z), z = exp(r_mag) * y + b_mag, where y + b_gate > 0, and 0
elsewhere. exp(r_mag) is positive, so that gate is open exactly where z > b_mag - exp(r_mag) * b_gate: a threshold on z.
The two are equal in real arithmetic; in floating point a latent may differ whose gate is within rounding of 0.
"""

from torch import Tensor

from .checkpoint import Tensors
from .fold import project, scale_rows


def gated_to_jumprelu(
    tensors: Tensors, weight: Tensor, b_dec: Tensor | None, b_gate: str = "b_gate", b_mag: str = "b_mag"
) -> tuple[Tensor, Tensor]:
    """Scales weight [d_sae, d_in] in place and returns the encoder's bias and thresholds, float64 [d_sae].

    b_dec is what is subtracted from the input; b_gate and b_mag are what the file calls these biases.
    """
    d_sae = len(weight)
    scale = tensors.vector("r_mag", d_sae).exp()
    if not scale.isfinite().all() or not scale.all():
        raise tensors.error("r_mag", "must have an exponential that is positive and finite")
    magnitude_bias = tensors.vector(b_mag, d_sae)
    threshold = magnitude_bias - scale * tensors.vector(b_gate, d_sae)
    shift = 0 if b_dec is None else scale * project(weight, b_dec)
    scale_rows(weight, scale)
    return magnitude_bias - shift, threshold
