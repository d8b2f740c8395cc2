"""The `SAE` record: weights, an activation, and what is needed to encode and decode with them."""

from dataclasses import InitVar, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..encoding import DTYPES, EncodedActivations
from ..linear import linear_batch_topk_encode, linear_relu_encode, linear_topk_encode, sparse_linear
from ..scalars import as_int
from .input_norm import INPUT_NORMS, row_norm
from .metrics import SAEMetrics, measure

ACTIVATIONS = ("relu", "jumprelu", "topk", "batch_topk")


@dataclass(eq=False, repr=False)
class SAE:
    """A sparse autoencoder: latents = activation(x @ W_enc + b_enc), reconstruction = latents @ W_dec + b_dec.

    Made by `pyfacts.load_sae`, which folds a checkpoint's scales and pre-encoder bias into these tensors, or directly
    from tensors of float32, bfloat16 or float16, all of one dtype and on one device. It has its own copies of them:
    what is trained further is another SAE.

    Attributes:
        W_enc: [d_in, d_sae].
        b_enc: [d_sae].
        W_dec: [d_sae, d_in].
        b_dec: [d_in].
        activation: with z = x @ W_enc + b_enc: "relu"; "jumprelu", relu(z) where z > threshold; "topk", the k largest
            of relu(z) of each token; "batch_topk", the k * n_tokens largest of a whole call, so that a token's latents
            depend on the tokens beside it.
        threshold: [d_sae], for "jumprelu" only.
        k: 1 to d_sae, for "topk" and "batch_topk" only.
        architecture: what the checkpoint calls it; the activation, if made from tensors.
        input_norm: how each token is normalised before it is encoded, which `decode` undoes: None; "layer_norm", to
            mean 0 and standard deviation 1; "constant_norm_rescale", to norm sqrt(d_in).
        hook_name: where in the model it belongs, as the checkpoint says, or None.
        source_format: "sae_lens", "gemma_scope", "sparsify", "dictionary_learning", or "tensors".

    Args:
        copy: False takes over tensors that nobody else will change, without doubling their memory, where `W_enc.T` and
            W_dec are contiguous, as the kernels read them.

    Raises:
        TypeError: a weight is not a tensor, a dtype is not supported, or dtypes differ.
        ValueError: shapes or devices do not fit, the activation is unknown, or its threshold or k is missing, out of
            range, NaN, or given where none belongs.

    Example:
        >>> import torch, pyfacts
        >>> sae = pyfacts.SAE(torch.eye(3), torch.zeros(3), torch.eye(3), torch.zeros(3), activation="topk", k=1)
        >>> enc = sae.encode(torch.tensor([[1.0, 3.0, 2.0]]))
        >>> sae.decode(enc)
        tensor([[0., 3., 0.]])
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    activation: str = "relu"
    threshold: Tensor | None = None
    k: int | None = None
    architecture: str = ""
    input_norm: str | None = None
    hook_name: str | None = None
    source_format: str = "tensors"
    copy: InitVar[bool] = True

    def __post_init__(self, copy: bool) -> None:
        self.architecture = self.architecture or self.activation
        self._check_tensors()
        self._check_activation()
        if self.input_norm not in (None, *INPUT_NORMS):
            raise ValueError(f"input_norm must be None, {_listed(INPUT_NORMS)}, got {self.input_norm!r}")
        for name, tensor in self.tensors().items():
            rows = tensor.detach().T if name == "W_enc" else tensor.detach()
            rows = rows.clone(memory_format=torch.contiguous_format) if copy else rows.contiguous()
            setattr(self, name, rows.T if name == "W_enc" else rows)

    # ---- what it is --------------------------------------------------------------------------------------------------

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, the latents and the reconstructions."""
        return self.W_enc.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_enc.device

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors by name: W_enc, b_enc, W_dec, b_dec, and threshold if there is one; not copies."""
        named = {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        return named if self.threshold is None else {**named, "threshold": self.threshold}

    def config(self) -> dict[str, str | int | None]:
        """Returns everything but the tensors, as values that JSON knows; with `tensors()` it defines the SAE.

        Example:
            >>> import torch, pyfacts
            >>> pyfacts.SAE(torch.eye(2), torch.zeros(2), torch.eye(2), torch.zeros(2)).config()["activation"]
            'relu'
        """
        names = ("architecture", "activation", "k", "d_in", "d_sae", "input_norm", "hook_name", "source_format")
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        k = "" if self.k is None else f", k={self.k}"
        return (
            f"SAE(d_in={self.d_in}, d_sae={self.d_sae}, activation={self.activation!r}{k}, "
            f"architecture={self.architecture!r}, dtype={self.dtype}, device='{self.device}', "
            f"hook_name={self.hook_name!r}, source_format={self.source_format!r})"
        )

    def to(self, *target: torch.device | str | torch.dtype, **named: Any) -> "SAE":
        """Returns the SAE on another device, in another dtype, or both (itself if it is so already).

        Args:
            target, named: as of `Tensor.to`: a device, a dtype, or `device=` and `dtype=`.

        Example:
            >>> import torch, pyfacts
            >>> sae = pyfacts.SAE(torch.eye(2), torch.zeros(2), torch.eye(2), torch.zeros(2))
            >>> sae.to("cpu", torch.bfloat16).dtype
            torch.bfloat16
        """
        moved: dict[str, Any] = {
            name: tensor.to(*target, **named)  # type: ignore[call-overload]
            for name, tensor in self.tensors().items()
        }
        return self if moved["W_enc"] is self.W_enc else replace(self, copy=False, **moved)

    # ---- using it ----------------------------------------------------------------------------------------------------

    def encode(self, x: Tensor) -> EncodedActivations:
        """Returns the latents of every token, packed.

        Args:
            x: [..., d_in] of any floating dtype, on the SAE's device; it is cast to the SAE's dtype, also under
                autocast, and its leading dimensions are flattened.

        Returns:
            The encoding [n_tokens, d_sae]; no gradient flows.

        Raises:
            TypeError: x is not a tensor of a floating dtype.
            ValueError: its last dimension is not d_in, or it is on another device.

        Example:
            >>> import torch, pyfacts
            >>> sae = pyfacts.SAE(torch.eye(2), torch.zeros(2), torch.eye(2), torch.zeros(2))
            >>> sae.encode(torch.tensor([[[-1.0, 2.0]], [[3.0, 4.0]]])).to_dense()
            tensor([[0., 2.],
                    [3., 4.]])
        """
        x = self._rows(x)
        if self.input_norm is not None:
            x = row_norm(x, self.input_norm).apply(x)
        weight = self.W_enc.T
        with torch.autocast(x.device.type, enabled=False):
            if self.activation == "topk":
                return linear_topk_encode(x, weight, self.b_enc, self._k)
            if self.activation == "batch_topk":
                return linear_batch_topk_encode(x, weight, self.b_enc, self._k)
            return linear_relu_encode(x, weight, self.b_enc, self.activation, threshold=self.threshold)

    def decode(self, enc: EncodedActivations, x: Tensor | None = None) -> Tensor:
        """Returns the reconstruction of the activations.

        Args:
            enc: [n_tokens, d_sae] of the SAE's dtype.
            x: the activations that were encoded, needed by an SAE with an `input_norm`, and by no other: the mean and
                scale of each token are not in its latents.

        Returns:
            [n_tokens, d_in] of the SAE's dtype.

        Raises:
            TypeError: enc is not an encoding of the SAE's dtype.
            ValueError: shapes or devices do not fit, or x is missing.

        Example:
            >>> import torch, pyfacts
            >>> sae = pyfacts.SAE(torch.eye(2), torch.zeros(2), torch.eye(2), torch.ones(2))
            >>> sae.decode(pyfacts.encode(torch.tensor([[0.0, 2.0]])))
            tensor([[1., 3.]])
        """
        if self.input_norm is None:
            return sparse_linear(enc, self.W_dec, self.b_dec)
        if x is None:
            raise ValueError(
                f"this SAE normalises each token (input_norm {self.input_norm!r}), and its latents alone do not tell "
                "by how much: call decode(enc, x) with the x that was encoded"
            )
        x = self._rows(x)
        if len(x) != len(enc):
            raise ValueError(f"x must hold the {len(enc)} tokens of enc, got {len(x)}")
        return row_norm(x, self.input_norm).undo(sparse_linear(enc, self.W_dec, self.b_dec))

    def metrics(self, x: Tensor, batch_size: int = 4096) -> SAEMetrics:
        """Measures how sparse the latents of x are, and how much of x they explain.

        Args:
            x: [..., d_in], as for `encode`; at least one token.
            batch_size: how many tokens are encoded and decoded at a time; bounds the memory. A "batch_topk" SAE selects
                over that many tokens.

        Returns:
            The measures, summed in float64.

        Raises:
            TypeError, ValueError: as `encode`; there are no tokens, or batch_size is not positive.

        Example:
            >>> import torch, pyfacts
            >>> sae = pyfacts.SAE(torch.eye(2), torch.zeros(2), torch.eye(2), torch.zeros(2))
            >>> measured = sae.metrics(torch.tensor([[1.0, -3.0], [3.0, -5.0]]))
            >>> measured.l0, measured.fvu, measured.dead
            (1.0, 8.5, tensor([1]))
        """
        return measure(self, self._tokens(x), batch_size)

    # ---- arguments ---------------------------------------------------------------------------------------------------

    @property
    def _k(self) -> int:
        assert self.k is not None  # _check_activation
        return self.k

    def _tokens(self, x: Tensor) -> Tensor:
        """x as [n_tokens, d_in], in its own dtype."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a torch.Tensor of a floating dtype, got {got}")
        if x.dim() == 0 or x.shape[-1] != self.d_in:
            raise ValueError(
                f"x must be [..., d_in] with d_in {self.d_in}, got {tuple(x.shape)}; activations that come as "
                "[..., n_heads, d_head] are flattened with .flatten(-2)"
            )
        return x.detach().reshape(-1, self.d_in)

    def _rows(self, x: Tensor) -> Tensor:
        return self._tokens(x).to(self.dtype)

    def _check_tensors(self) -> None:
        if not isinstance(self.W_enc, Tensor):
            raise TypeError(f"W_enc must be a torch.Tensor, got {type(self.W_enc).__name__}")
        if self.W_enc.dim() != 2:
            raise ValueError(f"W_enc must be [d_in, d_sae], got {list(self.W_enc.shape)}")
        if self.dtype not in DTYPES:
            raise TypeError(f"W_enc must be float32, bfloat16 or float16, got {self.dtype}; convert it with .to(...)")
        d_in, d_sae = self.W_enc.shape
        shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
        shapes["threshold"] = (d_sae,)
        for name, tensor in self.tensors().items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
            if tuple(tensor.shape) != shapes[name]:
                raise ValueError(
                    f"{name} must be {list(shapes[name])} for W_enc [d_in, d_sae] = {[d_in, d_sae]}, got "
                    f"{list(tensor.shape)}"
                )
            if tensor.dtype != self.dtype:
                raise TypeError(f"{name} must have the dtype of W_enc, {self.dtype}, got {tensor.dtype}")
            if tensor.device != self.device:
                raise ValueError(f"{name} must be on the device of W_enc, {self.device}, got {tensor.device}")

    def _check_activation(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be {_listed(ACTIVATIONS)}, got {self.activation!r}")
        if (self.threshold is not None) != (self.activation == "jumprelu"):
            raise ValueError("a threshold goes with activation 'jumprelu', and with no other: " + self._given())
        if (self.k is not None) != (self.activation in ("topk", "batch_topk")):
            raise ValueError("k goes with activation 'topk' and 'batch_topk', and with no other: " + self._given())
        if self.k is not None:
            self.k = as_int("k", self.k)
            if not 1 <= self.k <= self.d_sae:
                raise ValueError(f"k must be 1 to d_sae ({self.d_sae}), got {self.k}")
        if self.threshold is not None and self.threshold.isnan().any():
            j = int(self.threshold.isnan().nonzero()[0])
            raise ValueError(f"threshold must not be NaN, and that of latent {j} is")

    def _given(self) -> str:
        threshold = "no threshold" if self.threshold is None else "a threshold"
        return f"got activation {self.activation!r}, {threshold}, k={self.k}"


torch.serialization.add_safe_globals([SAE])  # torch.load: tensors, numbers and names


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names[:-1])) + f" or {names[-1]!r}"
