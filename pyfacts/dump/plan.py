"""dump.json, the plan, and the commit records of the shards: what they hold, how they are checked and compared.

Both are pretty JSON with sorted keys and an `xxh3` over the rest, so that an altered byte is noticed. A record's digest
leaves the directory out, whose unique name is the only thing in which two dumps of the same plan differ.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, NoReturn
from urllib.parse import quote

import xxhash

from ..wording import some
from . import layout
from .container import is_size, parse_json
from .errors import DumpError
from .layout import HookSpec
from .store import Store

PLAN_FILE = "dump.json"
# Recorded, but no reason to refuse a resume: a renamed model directory or another version of this package.
_NOT_COMPARED = {"created_with", "xxh3", "model.name", "tokens.tokenizer"}
_DIGEST = re.compile("[0-9a-f]{16}")


class _Absent:
    """What a key that is not there holds."""

    def __repr__(self) -> str:
        return "no such key"


_ABSENT = _Absent()


@dataclass(frozen=True)
class Plan:
    """What a dump is going to hold; every worker derives the same.

    Attributes:
        model: name, class, revision, config, attention implementation, dtype and the hash of the weights.
        tokens: where the tokens came from, how many, and their fingerprint.
        hooks: the hooks in the order in which they were asked for, then the latents of SAEs.
        sequences: boundaries of the shards, in sequences: shard i has sequences[i]:sequences[i+1].
        token_starts: the same in captured tokens.
        batch_size: sequences of a forward pass; the batch's composition can decide the last bits of an activation.
        select: what `select` keeps, or None for everything.
        saes: d_in, d_sae, config and the hash of the weights of the SAEs whose latents are dumped, by hook.
        created_with: versions of the libraries that wrote the dump.
    """

    model: dict[str, Any]
    tokens: dict[str, Any]
    hooks: tuple[HookSpec, ...]
    sequences: tuple[int, ...]
    token_starts: tuple[int, ...]
    batch_size: int
    shard_tokens: int
    codec: str
    signed_zero: bool
    select: dict[str, Any] | None
    saes: dict[str, dict[str, Any]] = field(default_factory=dict)
    created_with: dict[str, Any] = field(default_factory=dict)

    @property
    def n_shards(self) -> int:
        return len(self.sequences) - 1

    @property
    def n_tokens(self) -> int:
        return self.token_starts[-1]

    @property
    def lossy(self) -> bool:
        return self.select is not None

    @cached_property
    def digest(self) -> str:
        """xxh3-64 in hex of all but `created_with`; records name the plan that was there first by it."""
        return str(self.to_dict()["xxh3"])

    def to_dict(self) -> dict[str, Any]:
        value = {
            "format": "pyfacts-dump",
            "version": layout.FORMAT_VERSION,
            "model": self.model,
            "tokens": self.tokens,
            **({"saes": self.saes} if self.saes else {}),
            "hooks": [asdict(hook) for hook in self.hooks],
            "batch_size": self.batch_size,
            "shard_tokens": self.shard_tokens,
            "codec": self.codec,
            "signed_zero": self.signed_zero,
            "select": self.select,
            "shards": {"sequences": list(self.sequences), "tokens": list(self.token_starts)},
            "created_with": self.created_with,
        }
        return value | {"xxh3": _digest(value)}

    def to_json(self) -> bytes:
        return to_json(self.to_dict())

    @staticmethod
    def read(store: Store) -> "Plan":
        """Reads and checks dump.json; DumpError names what is wrong."""
        value, fail = _parse(store.read(PLAN_FILE), store.where(PLAN_FILE))
        if value.get("format") != "pyfacts-dump":
            fail(f"'format' is {value.get('format')!r}, expected 'pyfacts-dump'")
        if value.get("version") != layout.FORMAT_VERSION:
            fail(f"format version {value.get('version')!r:.40}; this pyfacts reads version {layout.FORMAT_VERSION}")
        _check_digest(value, fail)
        _check_keys(value, _PLAN_TYPES, fail)
        hooks = tuple(_parse_hook(entry, fail) for entry in value["hooks"])
        if len({hook.name for hook in hooks}) != len(hooks) or not hooks:
            fail("'hooks' must name at least one hook, and none twice")
        if value["codec"] not in layout.CODECS:
            fail(f"codec {value['codec']!r} is unknown; this pyfacts reads {', '.join(layout.CODECS)}")
        saes = _parse_saes(value["saes"], hooks, fail) if "saes" in value else {}
        bounds = {key: _parse_bounds(value["shards"].get(key), key, fail) for key in ("sequences", "tokens")}
        if len(bounds["sequences"]) != len(bounds["tokens"]):
            fail("'shards' has boundaries of different numbers of shards")
        plan = Plan(
            model=value["model"],
            tokens=value["tokens"],
            hooks=hooks,
            sequences=bounds["sequences"],
            token_starts=bounds["tokens"],
            batch_size=value["batch_size"],
            shard_tokens=value["shard_tokens"],
            codec=value["codec"],
            signed_zero=value["signed_zero"],
            select=value["select"],
            saes=saes,
            created_with=value["created_with"],
        )
        for name, known, there in _differences("", plan.to_dict(), value):
            fail(f"{name!r:.80} is {there!r:.80}, where this format has {known!r}")
        return plan

    def difference(self, other: "Plan") -> tuple[str, Any, Any] | None:
        """Returns the first field in which the plans differ, with both values.

        A hook's dtype and width count only where both know them: the first batch tells. The model's revision counts
        where its weights are not known, or its code came with it: another one may have another README, and a copy on
        the disk has none.
        """
        weights_known = all(
            plan.model.get("weights_xxh3") and "auto_map" not in (plan.model.get("config") or {})
            for plan in (self, other)
        )
        for name, mine, theirs in _differences("", self.to_dict(), other.to_dict()):
            unknown = name.endswith(("].dtype", "].width")) and not (mine and theirs)
            if not (unknown or (name == "model.revision" and weights_known)):
                return name, None if mine is _ABSENT else mine, None if theirs is _ABSENT else theirs
        return None


@dataclass(frozen=True)
class FileRecord:
    """A committed file: its name in the shard's directory, its bytes, and the xxh3-64 of its header."""

    file: str
    bytes: int
    header_xxh3: str


@dataclass(frozen=True)
class ShardRecord:
    """A commit record: one range of tokens with every hook, whole and durable.

    Attributes:
        shard: its number.
        directory: where its files are, a name in the dump.
        plan_xxh3: the digest of the plan that it belongs to.
        blocks: tokens of each block, the same for every hook.
        tokens_file: the file of tokens, documents and positions.
        hook_files: the file of each hook.
        nnz: stored values of each hook that is encoded.
    """

    shard: int
    directory: str
    plan_xxh3: str
    token_start: int
    blocks: tuple[int, ...]
    tokens_file: FileRecord
    hook_files: dict[str, FileRecord]
    nnz: dict[str, int]

    @property
    def n_tokens(self) -> int:
        return sum(self.blocks)

    @property
    def n_bytes(self) -> int:
        return self.tokens_file.bytes + sum(file.bytes for file in self.hook_files.values())

    def to_json(self) -> bytes:
        value: dict[str, Any] = {
            "format": "pyfacts-shard",
            "version": layout.FORMAT_VERSION,
            "shard": self.shard,
            "directory": self.directory,
            "plan_xxh3": self.plan_xxh3,
            "token_start": self.token_start,
            "blocks": list(self.blocks),
            "tokens_file": asdict(self.tokens_file),
            "hook_files": {name: asdict(record) for name, record in self.hook_files.items()},
            "nnz": self.nnz,
        }
        return to_json(value | {"xxh3": _digest(value)})

    @staticmethod
    def read_all(store: Store, plan: Plan) -> "dict[int, ShardRecord]":
        """Reads the commit records that are there, by shard; DumpError names what is wrong."""
        present = store.names()
        names = {name: shard for shard in range(plan.n_shards) if (name := record_name(shard)) in present}
        records = {}
        for name, data in store.read_all(list(names)):
            try:
                records[names[name]] = ShardRecord._read(data, store.where(name), plan, names[name])
            except DumpError as error:
                remedy = "delete this record, and dump again to compute its shard anew"
                raise DumpError(f"{error.what}; {remedy}", path=error.path, offset=error.offset) from None
        return records

    @staticmethod
    def _read(data: bytes, path: str, plan: Plan, shard: int) -> "ShardRecord":
        value, fail = _parse(data, path)
        if value.get("format") != "pyfacts-shard" or value.get("version") != layout.FORMAT_VERSION:
            fail(f"is no shard record of version {layout.FORMAT_VERSION}")
        _check_keys(value, _RECORD_TYPES, fail)
        directory = _plain_name(value["directory"], fail)
        tokens_file = _parse_file(value["tokens_file"], fail)
        hook_files = {name: _parse_file(entry, fail) for name, entry in value["hook_files"].items()}
        _check_digest(value, fail)
        if value["plan_xxh3"] != plan.digest:
            fail(f"belongs to another plan than {PLAN_FILE}; it was not written by this dump")
        if value["shard"] != shard:
            fail(f"says that it is shard {value['shard']}")
        blocks, n_tokens = value["blocks"], plan.token_starts[shard + 1] - plan.token_starts[shard]
        if not all(is_size(n) and 0 < n <= layout.MAX_BLOCK_TOKENS for n in blocks) or sum(blocks) != n_tokens:
            fail(f"the blocks {blocks!r:.80} do not add up to the {n_tokens} tokens that the plan gives this shard")
        if value["token_start"] != plan.token_starts[shard]:
            fail(f"begins at token {value['token_start']}, the plan says {plan.token_starts[shard]}")
        if hook_files.keys() != {hook.name for hook in plan.hooks}:
            fail("does not list exactly the plan's hooks")
        nnz = value["nnz"]
        if nnz.keys() != {hook.name for hook in plan.hooks if hook.kind == "neurons"}:
            fail("'nnz' does not list exactly the encoded hooks")
        if not all(is_size(n) for n in nnz.values()):
            fail("'nnz' must map hooks to sizes")
        return ShardRecord(
            shard, directory, value["plan_xxh3"], value["token_start"], tuple(blocks), tokens_file, hook_files, nnz
        )


def shard_name(shard: int) -> str:
    """The number of a shard as its files are named: at least five digits."""
    return f"{shard:05d}"


def record_name(shard: int) -> str:
    return f"{shard_name(shard)}.json"


def hook_file_name(hook: str) -> str:
    """A hook's file name: the hook's name, percent-encoded but for letters, digits and `._-~`."""
    name = quote(hook, safe="._-")
    if f"{name}.safetensors" == layout.TOKENS_FILE:
        name = "%74okens"
    return f"{name}.safetensors"


def check_same(existing: Plan, wanted: Plan, store: Store) -> None:
    """Raises DumpError, naming the first field that differs, if the store holds another dump."""
    if difference := wanted.difference(existing):
        name, mine, theirs = difference
        what = f"{name} is {theirs!r:.200} there and {mine!r:.200} here"
        if name == "hooks":
            there, here = ([hook["name"] for hook in hooks] for hooks in (theirs, mine))
            missing = some(name for name in there if name not in here) or "none"
            new = some(name for name in here if name not in there) or "none"
            what = f"of its hooks {missing} are missing here, and {new} are new"
        elif name == "batch_size":
            what += "; the last bits of what a model computes depend on it"
        empty = store.names().isdisjoint(map(record_name, range(existing.n_shards)))
        raise DumpError(
            f"the directory holds another dump: {what}; dump into another directory, or with the same model, tokens "
            "and arguments to resume"
            + (". It has no committed shard yet: if nobody is writing it, delete it and start anew" if empty else ""),
            path=store.where(PLAN_FILE),
        )


def to_json(value: dict[str, Any]) -> bytes:
    """Pretty JSON with sorted keys; equal values give equal bytes."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _digest(value: dict[str, Any]) -> str:
    """xxh3-64 in hex over the parts that decide what is stored."""
    skipped = {"directory", "created_with", "xxh3"}
    return xxhash.xxh3_64_hexdigest(to_json({key: item for key, item in value.items() if key not in skipped}))


def _check_digest(value: dict[str, Any], fail: Callable[[str], NoReturn]) -> None:
    try:
        actual = _digest(value)
    except (ValueError, RecursionError) as error:
        fail(f"cannot be checked: {error}")
    if value.get("xxh3") != actual:
        fail(f"the checksum is {value.get('xxh3')!r}, its content gives {actual!r}: the file was altered")


_PLAN_TYPES: dict[str, tuple[type, ...]] = {
    "model": (dict,),
    "tokens": (dict,),
    "hooks": (list,),
    "shards": (dict,),
    "batch_size": (int,),
    "shard_tokens": (int,),
    "codec": (str,),
    "signed_zero": (bool,),
    "select": (dict, type(None)),
    "created_with": (dict,),
}
_RECORD_TYPES: dict[str, tuple[type, ...]] = {
    "shard": (int,),
    "directory": (str,),
    "plan_xxh3": (str,),
    "token_start": (int,),
    "blocks": (list,),
    "tokens_file": (dict,),
    "hook_files": (dict,),
    "nnz": (dict,),
}


def _check_keys(value: dict[str, Any], types: dict[str, tuple[type, ...]], fail: Callable[[str], NoReturn]) -> None:
    for key, allowed in types.items():
        if key not in value:
            fail(f"{key!r} is missing")
        if type(value[key]) not in allowed:
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in allowed)
            fail(f"{key!r} must be a JSON value of type {names}, got {value[key]!r:.80}")


def _parse(data: bytes, path: str) -> tuple[dict[str, Any], Callable[[str], NoReturn]]:
    """A JSON object of the dump, and what raises its errors."""

    def fail(what: str) -> NoReturn:
        raise DumpError(what, path=path)

    return parse_json(data, path), fail


def _parse_hook(entry: Any, fail: Callable[[str], NoReturn]) -> HookSpec:
    keys = ("name", "module_path", "side", "kind", "dtype")
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in keys):
        fail(f"a hook must have the strings {', '.join(keys)}, got {entry!r:.200}")
    for key, known in (("kind", layout.KINDS), ("dtype", layout.ITEM_BYTES)):
        if entry[key] not in known:
            fail(f"hook {entry['name']!r} has {key} {entry[key]!r:.80}; this pyfacts reads {', '.join(known)}")
    width: Any = entry.get("width")
    if not is_size(width) or not 1 <= width <= layout.MAX_WIDTH:
        fail(f"hook {entry['name']!r} has width {width!r:.80}, not 1 to {layout.MAX_WIDTH}")
    return HookSpec(entry["name"], entry["module_path"], entry["side"], width, entry["kind"], entry["dtype"])


def _parse_saes(value: Any, hooks: tuple[HookSpec, ...], fail: Callable[[str], NoReturn]) -> dict[str, dict[str, Any]]:
    encoded = {hook.name: hook for hook in hooks if hook.kind == "neurons"}
    if not isinstance(value, dict) or not value or not value.keys() <= encoded.keys():
        fail(f"'saes' must map encoded hooks to SAEs, got {value!r:.200}")
    for name, sae in value.items():
        if not isinstance(sae, dict) or sae.keys() != {"d_in", "d_sae", "config", "weights_xxh3"}:
            fail(f"the SAE of {name!r} must have d_in, d_sae, config and weights_xxh3, got {sae!r:.200}")
        digest, width = sae["weights_xxh3"], encoded[name].width
        if not is_size(sae["d_in"]) or sae["d_in"] < 1 or not is_size(sae["d_sae"]) or sae["d_sae"] != width:
            fail(f"the SAE of {name!r} has d_in {sae['d_in']!r} and d_sae {sae['d_sae']!r}, its hook has width {width}")
        if not isinstance(sae["config"], dict):
            fail(f"the SAE of {name!r} must have a config, got {sae['config']!r:.80}")
        if digest is not None and not (isinstance(digest, str) and re.fullmatch("[0-9a-f]{32}", digest)):
            fail(f"the SAE of {name!r} must have the xxh3-128 of its weights or null, got {digest!r:.80}")
    return value


def _parse_bounds(value: Any, key: str, fail: Callable[[str], NoReturn]) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) < 2 or not all(is_size(n) for n in value):
        fail(f"'shards.{key}' must be a list of at least two sizes")
    if value[0] != 0 or any(a >= b for a, b in pairwise(value)):
        fail(f"'shards.{key}' must ascend from 0")
    return tuple(value)


def _parse_file(entry: Any, fail: Callable[[str], NoReturn]) -> FileRecord:
    if not isinstance(entry, dict) or entry.keys() != {"file", "bytes", "header_xxh3"}:
        fail(f"a file must have file, bytes and header_xxh3, got {entry!r:.200}")
    digest = entry["header_xxh3"]
    if not is_size(entry["bytes"]) or not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        fail(f"a file must have its size and its header's digest, got {entry!r:.200}")
    return FileRecord(_plain_name(entry["file"], fail), entry["bytes"], digest)


def _plain_name(name: Any, fail: Callable[[str], NoReturn]) -> str:
    """A name that stays in its directory, and can be shown."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\"):
        fail(f"{name!r:.200} is no plain name: paths may not lead out of the dump")
    if not name.isprintable():
        fail(f"{name!r:.200} holds characters that cannot be shown")
    return name


def _differences(name: str, mine: Any, theirs: Any) -> Iterator[tuple[str, Any, Any]]:
    """Where two JSON values differ, deepest names first to last."""
    if name in _NOT_COMPARED or mine == theirs and type(mine) is type(theirs):
        return
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in [*mine, *(key for key in theirs if key not in mine)]:
            yield from _differences(f"{name}.{key}".lstrip("."), mine.get(key, _ABSENT), theirs.get(key, _ABSENT))
    elif isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            yield from _differences(f"{name}[{i}]", a, b)
    else:
        yield name, mine, theirs
