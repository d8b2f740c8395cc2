"""The `EncodedActivations` record and the functions that make one."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from . import _library, cuda, ops
from .chosen import FEATURES, chosen_tokens
from .scalars import as_float, in_range
from .wording import human_bytes

if TYPE_CHECKING:
    import scipy.sparse

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(eq=False, repr=False)
class EncodedActivations:
    """A matrix of activations [n_tokens, n_features], packed; every stored value exact.

    Made by `pyfacts.encode`, `pyfacts.linear_relu_encode`, `pyfacts.capture` and dumps. On a GPU, slicing, `cat`
    and `neuron` run on the CPU: the planes travel there and the result back. With C = ceil(n_features / 256)
    columns and R = ceil(n_tokens / 128) tiles (FORMAT.md draws the bytes):

    Attributes:
        counts: uint8 [C, n_tokens], how many values each token stores in each column (255 means 255 or 256).
        index: uint8 [index_bytes], where they are: positions or bitmaps.
        values: float32, bfloat16 or float16 [nnz].
        tile_ptr: int64 [C, R, 2], the starts in `index` and `values` of every 128 tokens of a column.
        n_features: number of features (d_mlp, d_sae).
        signed_zero: whether -0.0 is stored too.
        sq_norm: float64 [n_tokens], the squared norm of each row before `min_abs` or a `select` dropped values; None
            if nothing but zeros was dropped.

    Raises:
        RuntimeError: whatever reads planes that are not a valid encoding (the constructor does not look at them).

    Example:
        >>> import torch, pyfacts
        >>> enc = pyfacts.encode(torch.tensor([[0.0, 1.5], [2.0, 0.0]]))
        >>> enc.nnz, enc.density
        (2, 0.5)
        >>> enc.neuron(1)
        (tensor([0]), tensor([1.5000]))
    """

    counts: Tensor
    index: Tensor
    values: Tensor
    tile_ptr: Tensor
    n_features: int
    signed_zero: bool = False
    sq_norm: Tensor | None = None

    # ---- what it is ------------------------------------------------------------------------------------------------

    @property
    def planes(self) -> ops.Planes:
        """counts, index, values, tile_ptr."""
        return self.counts, self.index, self.values, self.tile_ptr

    @property
    def shape(self) -> torch.Size:
        """[n_tokens, n_features]."""
        return torch.Size((self.counts.shape[1], self.n_features))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values and of the dense matrix."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Where the planes are."""
        return self.values.device

    @property
    def nnz(self) -> int:
        """Number of stored values."""
        return self.values.shape[0]

    @property
    def density(self) -> float:
        """Share of the matrix that is stored, 0 for an empty matrix."""
        return self.nnz / max(1, self.shape.numel())

    @property
    def nbytes(self) -> int:
        """Bytes of the four planes."""
        return sum(plane.nbytes for plane in self.planes)

    @property
    def dropped_share(self) -> float:
        """Share of the squared norm that `min_abs` or a `select` dropped; 0.0 when only zeros were.

        NaN where an activation is NaN or infinite.
        """
        if self.sq_norm is None:
            return 0.0
        total = self.sq_norm.sum().item()
        kept = torch.linalg.vector_norm(self.values, dtype=torch.float64).square().item()
        return max(1.0 - kept / total, 0.0) if total else 0.0  # in this order a NaN stays

    def __len__(self) -> int:
        return self.counts.shape[1]

    def __repr__(self) -> str:
        dense_bytes = self.shape.numel() * self.dtype.itemsize
        ratio = f", {self.nbytes / dense_bytes:.1%} of dense" if dense_bytes else ""
        dropped = f", dropped_share={self.dropped_share:.2%}" if self.sq_norm is not None else ""
        return (
            f"EncodedActivations(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}', "
            f"density={self.density:.2%}{dropped}, {human_bytes(self.nbytes)}{ratio})"
        )

    # ---- reading it --------------------------------------------------------------------------------------------------

    def to_dense(self, out: Tensor | None = None) -> Tensor:
        """Returns the matrix [n_tokens, n_features]; -0.0 comes back as +0.0 unless `signed_zero`.

        Args:
            out: a tensor of that shape, dtype and device, rows unbroken and apart, to write to and return. Reading many
                encodings into one buffer takes about half the time of fresh ones: the memory's pages need not be made
                anew. No gradient flows through it.

        Raises:
            RuntimeError: the planes are not a valid encoding.
            ValueError: `out` does not fit.
        """
        if out is not None and (out.shape, out.dtype, out.device) != (self.shape, self.dtype, self.device):
            raise ValueError(
                f"out must be {tuple(self.shape)} {self.dtype} on {self.device}, got {tuple(out.shape)} {out.dtype} on "
                f"{out.device}"
            )
        if out is not None:
            _check_writable(out)
        return ops.decode(self.planes, self.n_features, self.signed_zero, out)

    def to_csr(self) -> Tensor:
        """Returns a `torch.sparse_csr` tensor [n_tokens, n_features] with int64 indices."""
        crow, col, values = ops.to_csr(self.planes, self.n_features)
        return torch.sparse_csr_tensor(crow, col, values, self.shape, check_invariants=False)

    def to_scipy(self) -> "scipy.sparse.csr_array":
        """Returns a `scipy.sparse.csr_array` on the CPU; bfloat16 and float16, which SciPy lacks, become float32."""
        import scipy.sparse

        crow, col, values = (plane.cpu() for plane in ops.to_csr(self.planes, self.n_features))
        return scipy.sparse.csr_array((values.float().numpy(), col.numpy(), crow.numpy()), shape=tuple(self.shape))

    def neuron(self, j: int) -> tuple[Tensor, Tensor]:
        """Returns the tokens (int64 [n], ascending) at which feature j is stored, and its values [n] there.

        Raises:
            OutOfRangeError: (a ValueError and an IndexError) j is not in [-n_features, n_features).
        """
        return ops.neuron(self.planes, self.n_features, in_range("feature", j, self.n_features))

    feature = neuron

    def __getitem__(self, tokens: "int | slice | Sequence[int] | np.ndarray | Tensor") -> "EncodedActivations":
        """Returns the encoding of some tokens, a copy.

        Args:
            tokens: an index, which gives one row; a slice; or a list, array or tensor of indices, in any order and as
                often as you like, or of bools [n_tokens].

        Raises:
            OutOfRangeError: (a ValueError and an IndexError) an index is not in [-n_tokens, n_tokens).
            TypeError, ValueError: tokens are something else, or bools of another number.
        """
        chosen = chosen_tokens(tokens, len(self), FEATURES)
        if isinstance(chosen, range):
            counts, index, values, tile_ptr = ops.slice_tokens(self.planes, self.n_features, chosen.start, chosen.stop)
            sq_norm = None if self.sq_norm is None else self.sq_norm[chosen.start : chosen.stop].clone()
        else:
            rows = torch.from_numpy(chosen).to(self.device)
            counts, index, values, tile_ptr = ops.take_tokens(self.planes, self.n_features, rows)
            sq_norm = None if self.sq_norm is None else self.sq_norm[rows]
        return replace(self, counts=counts, index=index, values=values, tile_ptr=tile_ptr, sq_norm=sq_norm)

    def to(self, device: torch.device | str) -> "EncodedActivations":
        """Returns the encoding on another device (itself if it is there already)."""
        if isinstance(device, torch.dtype):
            raise TypeError(f"values stay as they are: to_dense().to({device}) is dense, encode() packs that again")
        if torch.device(device) == self.device:
            return self
        counts, index, values, tile_ptr = (plane.to(device) for plane in self.planes)
        sq_norm = None if self.sq_norm is None else self.sq_norm.to(device)
        return replace(self, counts=counts, index=index, values=values, tile_ptr=tile_ptr, sq_norm=sq_norm)

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        """One object, as SciPy's matrices are: as a sequence NumPy would take it apart without end."""
        alone = np.empty((), dtype=object)
        alone.fill(self)
        return alone

    def cpu(self) -> "EncodedActivations":
        """Returns the encoding on the CPU."""
        return self.to("cpu")


torch.serialization.add_safe_globals(
    [EncodedActivations]
)  # torch.load: tensors and numbers, checked when they are used


def encode(x: Tensor, min_abs: float = 0.0, signed_zero: bool = False) -> EncodedActivations:
    """Packs a matrix of activations: every value that is not zero, and every NaN, bit for bit.

    Args:
        x: float32, bfloat16 or float16 [n_tokens, n_features], of any strides, on the CPU or, if pyfacts was built with
            its CUDA kernels, on an NVIDIA GPU. There it takes buffers as large as x while it packs, and waits for the
            GPU once, for the sizes.
        min_abs: store a value only if |x| > min_abs or it is NaN (or, with signed_zero, -0.0). Above 0 this is lossy:
            `dropped_share` of the result says how much of the squared norm went.
        signed_zero: store -0.0 too, so that decoding gives x back in every bit; otherwise -0.0 comes back as +0.0.

    Returns:
        The encoding, on x's device; x is not kept, and no gradient flows.

    Raises:
        TypeError: x is not a tensor, or of another dtype.
        ValueError: x is not 2-D or not strided, is on a device without kernels, or min_abs is negative or NaN.

    Example:
        >>> import torch, pyfacts
        >>> h = torch.relu(torch.randn(1000, 4096, generator=torch.Generator().manual_seed(0)) - 2)
        >>> enc = pyfacts.encode(h)
        >>> f"{enc.density:.2%} of {h.nbytes:,} bytes, in {enc.nbytes:,}"
        '2.27% of 16,384,000 bytes, in 483,018'
        >>> torch.equal(enc.to_dense(), h)
        True
    """
    check_matrix("x", x)
    min_abs = _check_min_abs(min_abs)
    x = x.detach()
    counts, index, values, tile_ptr = ops.encode(x, min_abs, signed_zero)
    sq_norm = ops.row_sq_norm(x) if min_abs > 0 else None
    return EncodedActivations(counts, index, values, tile_ptr, x.shape[1], signed_zero, sq_norm)


def cat(encodings: Sequence[EncodedActivations]) -> EncodedActivations:
    """Stacks encodings by token, in order.

    Args:
        encodings: at least one, of one dtype, n_features, device and `signed_zero`.

    Returns:
        An encoding of all their tokens (the very one that was given, if it was alone).

    Raises:
        ValueError: there are none, or they differ.
        TypeError: something else is among them.

    Example:
        >>> import torch, pyfacts
        >>> enc = pyfacts.encode(torch.eye(3))
        >>> pyfacts.cat([enc, enc[:1]]).shape
        torch.Size([4, 3])
    """
    encodings = list(encodings)
    if not encodings:
        raise ValueError("cat needs at least one encoding, got none")
    for i, other in enumerate(encodings):
        if not isinstance(other, EncodedActivations):
            raise TypeError(f"cat stacks EncodedActivations, got {type(other).__name__} as number {i}")
    first = encodings[0]
    for i, other in enumerate(encodings[1:], start=1):
        for name in ("n_features", "dtype", "device", "signed_zero"):
            if getattr(other, name) != getattr(first, name):
                raise ValueError(
                    f"cat needs encodings of one {name}: number 0 has {getattr(first, name)}, "
                    f"number {i} has {getattr(other, name)}"
                )
    if len(encodings) == 1:
        return first
    counts, index, values, tile_ptr = ops.cat([encoding.planes for encoding in encodings], first.n_features)
    sq_norm = None
    if any(encoding.sq_norm is not None for encoding in encodings):
        sq_norm = torch.cat([row_sq_norms(encoding) for encoding in encodings])
    return replace(first, counts=counts, index=index, values=values, tile_ptr=tile_ptr, sq_norm=sq_norm)


def row_sq_norms(encoding: EncodedActivations) -> Tensor:
    """Squared norm of each row of the input, from the stored values where nothing was dropped."""
    if encoding.sq_norm is not None:
        return encoding.sq_norm
    crow, _, values = ops.to_csr(encoding.planes, encoding.n_features)
    return torch.segment_reduce(values.double().square(), "sum", offsets=crow, initial=0)


def density_of(encodings: Iterable[EncodedActivations]) -> float:
    """Share of some matrices that is stored, all taken together; 0 if they have no elements."""
    encodings = list(encodings)
    return sum(enc.nnz for enc in encodings) / max(1, sum(enc.shape.numel() for enc in encodings))


def check_matrix(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {x.dtype}; convert it with .to(...)")
    if x.is_nested:
        raise ValueError(f"{name} must be a plain tensor, got a nested one; use .values() or .to_padded_tensor(0.0)")
    if x.dim() != 2:
        wanted = "[n_tokens, n_features]" if name == "x" else "a matrix"
        hint = "; flatten it with .flatten(0, -2)" if name == "x" else ""
        raise ValueError(f"{name} must be {wanted}, got shape {tuple(x.shape)}{hint}")
    if x.layout != torch.strided:
        raise ValueError(f"{name} must be a dense (strided) tensor, got {x.layout}; use .to_dense()")
    if x.device.type == "cuda" and not cuda.available():
        raise ValueError(
            f"{name} is on {x.device}, and this pyfacts was built without its CUDA kernels: run {_library.BUILD_CUDA}, "
            "or use .cpu()"
        )
    if x.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{name} is on {x.device}, and pyfacts has kernels for CPUs and CUDA only; use .cpu()")


def _check_writable(out: Tensor) -> None:
    n_tokens, n_features = out.shape
    if (n_features > 1 and out.stride(1) != 1) or (n_tokens > 1 and out.stride(0) < n_features):
        raise ValueError(
            f"out must have unbroken rows (stride 1 along the features) that do not overlap, got strides {out.stride()}"
        )
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "out must not require grad, for autograd does not see what is written to it: give out.detach()"
        )


def _check_min_abs(min_abs: float) -> float:
    if isinstance(min_abs, Tensor | np.ndarray) and min_abs.ndim:
        got = type(min_abs).__name__
        raise TypeError(f"min_abs must be a number, got {got}; pyfacts.min_abs(theta) selects by one a feature")
    min_abs = as_float("min_abs", min_abs.item() if isinstance(min_abs, Tensor) else min_abs)
    if not min_abs >= 0:  # NaN too
        raise ValueError(f"min_abs must be at least 0, got {min_abs}")
    return min_abs
