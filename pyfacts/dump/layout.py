"""What a shard's files hold: names, dtypes and shapes of their tensors. The writer and the reader both ask here.

FORMAT.md is the normative text.
"""

from collections.abc import Iterator
from dataclasses import dataclass

FORMAT_VERSION = 1
MIN_BLOCK_TOKENS = 4096  # a block has this many or more, but for a shard's last
CLOSED_BLOCK_TOKENS = 16384  # enough for any block
FULL_COLUMN_VALUES = 2048  # values that are worth a column's pointers, checksum and frames
MAX_BLOCK_TOKENS = 2**31 - 1
MAX_WIDTH = 2**31 - 1
MAX_SHARD_TOKENS = 2**28  # whose blocks a header of the safetensors library still has room for
COLUMN_WIDTH = 256
CODECS = ("none", "zstd", "split")
KINDS = ("neurons", "rows")
TOKENS_FILE = "tokens.safetensors"

# Our dtype names, those of safetensors, and bytes.
SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

PLANES = ("occupancy", "counts", "index", "values")  # the order of column_ptr, column_length and column_xxh3
STATISTICS = (("feature/nnz", "I64"), ("feature/sum", "F64"), ("feature/sum_sq", "F64"), ("feature/max", "F32"))


@dataclass(frozen=True)
class HookSpec:
    """A dumped hook.

    Attributes:
        name: TransformerLens' name of it.
        module_path: the module that it was captured at, and `side`, "input" or "output".
        width: features; 0 until the first batch has shown it, where the model does not tell.
        kind: "neurons" (encoded) or "rows" (plain).
        dtype: "float32", "bfloat16" or "float16"; "" until the first batch has shown it.
    """

    name: str
    module_path: str
    side: str
    width: int
    kind: str
    dtype: str

    @property
    def n_columns(self) -> int:
        return -(-self.width // COLUMN_WIDTH)

    def column_width(self, column: int) -> int:
        return min(COLUMN_WIDTH, self.width - column * COLUMN_WIDTH)

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a file; `shape` holds None where the size depends on the data."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


def occupancy_bytes(n_tokens: int) -> int:
    """Bytes of one column's occupancy bitmap."""
    return -(-n_tokens // 8)


def neuron_block(hook: HookSpec, block: int, n_tokens: int | None, codec: str, lossy: bool) -> Iterator[TensorSpec]:
    """The tensors of a block of encoded activations, in the order of the file."""
    c = hook.n_columns
    packed = codec != "none"
    occupancy = None if packed or n_tokens is None else c * occupancy_bytes(n_tokens)
    yield TensorSpec(f"{block}/column_ptr", "I64", (c + 1, 4))
    yield TensorSpec(f"{block}/column_length", "I64", (c, 4))
    yield TensorSpec(f"{block}/column_xxh3", "U64", (c,))
    if lossy:
        yield TensorSpec(f"{block}/sq_norm", "F64", (n_tokens,))
        yield TensorSpec(f"{block}/sq_norm_xxh3", "U64", (1,))
    # Values first: they are what needs to lie aligned.
    yield TensorSpec(f"{block}/values", "U8" if packed else SAFETENSORS_DTYPES[hook.dtype], (None,))
    yield TensorSpec(f"{block}/occupancy", "U8", (occupancy,))
    yield TensorSpec(f"{block}/counts", "U8", (None,))
    yield TensorSpec(f"{block}/index", "U8", (None,))
    yield TensorSpec(f"{block}/padding", "U8", (None,))


def row_block(hook: HookSpec, block: int, n_tokens: int | None, codec: str) -> Iterator[TensorSpec]:
    """The tensors of a block of plain rows, in the order of the file."""
    packed = codec != "none"
    yield TensorSpec(f"{block}/rows_xxh3", "U64", (1,))
    if packed:
        yield TensorSpec(f"{block}/rows", "U8", (None,))
    else:
        yield TensorSpec(f"{block}/rows", SAFETENSORS_DTYPES[hook.dtype], (n_tokens, hook.width))
    yield TensorSpec(f"{block}/padding", "U8", (None,))


def statistics(hook: HookSpec, codec: str) -> Iterator[TensorSpec]:
    """The per-feature statistics at the end of a file of encoded activations; `split` alone compresses them."""
    for name, dtype in STATISTICS:
        yield TensorSpec(name, "U8", (None,)) if codec == "split" else TensorSpec(name, dtype, (hook.width,))
    yield TensorSpec("feature/padding", "U8", (None,))
    yield TensorSpec("feature/xxh3", "U64", (1,))


def hook_file(hook: HookSpec, blocks: list[int | None], codec: str, lossy: bool) -> Iterator[TensorSpec]:
    """Every tensor of a hook's file, given the tokens of its blocks (None: not known yet)."""
    for block, n_tokens in enumerate(blocks):
        if hook.kind == "neurons":
            yield from neuron_block(hook, block, n_tokens, codec, lossy)
        else:
            yield from row_block(hook, block, n_tokens, codec)
    if hook.kind == "neurons":
        yield from statistics(hook, codec)


def tokens_file(n_tokens: int, id_dtype: str) -> list[TensorSpec]:
    """Every tensor of a shard's tokens file; xxh3 covers the three tensors before it, one digest each."""
    return [
        TensorSpec("document", "I64", (n_tokens,)),
        TensorSpec("position", "I64", (n_tokens,)),
        TensorSpec("token_ids", id_dtype, (n_tokens,)),
        TensorSpec("padding", "U8", (None,)),
        TensorSpec("xxh3", "U64", (3,)),
    ]


def max_blocks(n_tokens: int) -> int:
    """Blocks that n_tokens can take at most."""
    return n_tokens // MIN_BLOCK_TOKENS + 1


def metadata(hook: HookSpec, blocks: list[int], codec: str, signed_zero: bool, token_start: int) -> dict[str, str]:
    """`__metadata__` of a hook's file: what is needed to read it on its own."""
    return {
        "format": "pyfacts-hook",
        "version": str(FORMAT_VERSION),
        "hook": hook.name,
        "kind": hook.kind,
        "dtype": hook.dtype,
        "n_features": str(hook.width),
        "n_tokens": str(sum(blocks)),
        "token_start": str(token_start),
        "block_tokens": ",".join(map(str, blocks)),
        "codec": codec,
        "signed_zero": str(signed_zero).lower(),
    }


def tokens_metadata(n_tokens: int, token_start: int) -> dict[str, str]:
    """`__metadata__` of a tokens file."""
    return {
        "format": "pyfacts-tokens",
        "version": str(FORMAT_VERSION),
        "n_tokens": str(n_tokens),
        "token_start": str(token_start),
    }
