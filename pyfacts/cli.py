"""The command line: `pyfacts dump | info | verify | top | demo | bench`.

Exit codes: 0 done; 1 the dump is damaged, or the disk or model could not be read or written; 2 the arguments are wrong;
130 Ctrl-C and 128 + n signal n (143 for SIGTERM), after which the same command resumes a dump.
"""

from __future__ import annotations

import contextlib
import io
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from .dump.layout import ITEM_BYTES
from .wording import human_bytes

if TYPE_CHECKING:
    import numpy as np

    from . import Dump
    from .dump.reader import Context
    from .dump.worker import Progress as DumpProgress

FAILED, USAGE, INTERRUPTED = 1, 2, 130
LINE_EVERY_S = 60.0  # of progress, in a log
MAX_TABLE_WIDTH = 1000

app = typer.Typer(
    name="pyfacts",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
out = Console(soft_wrap=True, width=None if sys.stdout and sys.stdout.isatty() else 160)
err = Console(stderr=True, soft_wrap=True)

DumpArgument = Annotated[
    str, typer.Argument(metavar="OUT", help="Directory of the dump, or an address such as s3://bucket/dump.")
]


def main() -> NoReturn:
    """Runs the command line and exits; every expected error is one line on stderr."""
    from .dump.errors import DumpError, DumpInterrupted

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a token may be anything, and the terminal ASCII
    try:
        app()  # exits by itself, with 2 for arguments that it cannot parse
    except DumpInterrupted as error:
        code = _stopped(str(error).partition(";")[0], 128 + error.signum)
    except DumpError as error:
        code = _fail(error, FAILED)
    except ImportError as error:
        if _interrupted(error):
            sys.exit(_stopped("interrupted", INTERRUPTED))
        code = _fail(error, USAGE)
        if isinstance(error, ModuleNotFoundError):
            err.print(escape("install pyfacts with an extra: '.[text]' for models and texts, '.[demo]' for the demo"))
    except (ValueError, TypeError) as error:
        code = _fail(error, USAGE)
    except OSError as error:
        code = _fail(error, FAILED)
    sys.exit(code)


def _fail(error: Exception, code: int) -> int:
    err.print(f"[red]error:[/red] {escape(str(error) or type(error).__name__)}", highlight=False)
    return code


def _stopped(what: str, code: int) -> int:
    err.print(escape(f"{what}; to resume: {shlex.join(['pyfacts', *sys.argv[1:]])}"), highlight=False)
    return code


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind it: transformers makes an ImportError of one that comes while it is imported."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _show_version(shown: bool) -> None:
    if shown:
        from importlib.metadata import version

        out.print(f"pyfacts {version('pyfacts')}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Capture what a transformer's MLPs know: dump its neurons, exact and packed, and read them back."""


@app.command(name="dump")
def dump_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face name or directory of the model.")],
    tokens: Annotated[
        str,
        typer.Argument(
            metavar="TEXT_OR_TOKENS",
            help="Text (.txt, one document a MiB; .jsonl or .parquet, one a row), token ids (.npy, .jsonl, .parquet) "
            "or a saved Hugging Face data set.",
        ),
    ],
    out_directory: DumpArgument,
    hooks: Annotated[
        list[str] | None,
        typer.Option(
            "--hooks",
            help="Hook to dump, repeatable; a module path, or a pattern such as 'blocks.*.hook_resid_post', will do. "
            "Every MLP's neurons by default.",
        ),
    ] = None,
    sae: Annotated[
        list[str] | None,
        typer.Option("--sae", metavar="HOOK=PATH", help="SAE whose latents at a hook to dump, repeatable."),
    ] = None,
    topk: Annotated[int | None, typer.Option(help="Keep the k largest |activations| of each token.")] = None,
    min_abs: Annotated[float | None, typer.Option(help="Keep activations above this absolute value.")] = None,
    codec: Annotated[str, typer.Option(help="'zstd'; 'split': smaller; or 'none': faster to write, larger.")] = "zstd",
    batch_size: Annotated[int, typer.Option(help="Sequences of a forward pass.")] = 8,
    context_size: Annotated[
        int | None, typer.Option(help="Tokens of a sequence; a longer text becomes several.")
    ] = None,
    skip_bos: Annotated[
        bool, typer.Option("--skip-bos", help="Leave out the tokenizer's beginning-of-sequence tokens.")
    ] = False,
    shard_tokens: Annotated[int, typer.Option(help="Tokens of a shard; a crash costs at most one shard.")] = 65536,
    allow_dense: Annotated[bool, typer.Option("--allow-dense", help="Dump even if most neurons are non-zero.")] = False,
) -> None:
    """Run a model over texts or tokens and write its neurons to OUT. Run it again to resume.

    [bold]Example:[/bold] pyfacts dump facebook/opt-125m corpus.jsonl out --context-size 512
    """
    import pyfacts

    if topk is not None and min_abs is not None:
        raise ValueError("--topk and --min-abs exclude each other: give one")
    select = pyfacts.topk(topk) if topk is not None else pyfacts.min_abs(min_abs) if min_abs is not None else None
    if not err.is_terminal:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    with _interruptible(), _shown_progress() as progress:
        d = pyfacts.dump(
            model,
            tokens,
            out_directory,
            names_filter=hooks,
            select=select,
            saes=_load_saes(sae or []),
            codec=codec,
            batch_size=batch_size,
            context_size=context_size,
            token_mask=_no_bos(model) if skip_bos else None,
            shard_tokens=shard_tokens,
            allow_dense=allow_dense,
            progress=progress,
        )
    out.print(
        escape(
            f"{out_directory}: {d.n_tokens:,} tokens of {_count(len(d.hook_names), 'hook')}, {human_bytes(d.n_bytes)}"
        ),
        highlight=False,
    )


@app.command()
def info(out_directory: DumpArgument) -> None:
    """Show what a dump holds; of one made with --topk or --min-abs also the share of squared norm that was dropped.

    [bold]Example:[/bold] pyfacts info out
    """
    d = _open(out_directory)
    state = "complete" if d.complete else f"incomplete: {d.n_tokens_committed:,} tokens committed; dump again to resume"
    out.print(escape(f"{out_directory}: {d.n_tokens:,} tokens in {_count(d.n_shards, 'shard')}, {state}"))
    out.print(escape(f"model {d.plan['model'].get('name') or d.plan['model'].get('class')}, codec {d.codec}"))
    if d.plan["select"]:
        kept = dict(d.plan["select"])
        kind = kept.pop("kind", "")  # a select of one's own may lack it
        out.print(escape(f"select {kind}({', '.join(f'{name}={value}' for name, value in kept.items())})"))
    table = Table("hook", "kind", "dtype", box=None, header_style="bold", pad_edge=False)
    for name in ("width", "density", "L0", "never active", "dropped", "bytes", "of dense"):
        table.add_column(name, justify="right")
    for name in d.hook_names:
        hook = d[name]
        dense_bytes = d.n_tokens_committed * hook.width * ITEM_BYTES[hook.dtype]
        share = f"{hook.n_bytes / dense_bytes:.1%}" if dense_bytes else "-"
        sparse = ("-", "-", "-", "-")
        if hook.kind == "neurons":
            silent = int((hook.feature_stats().nnz == 0).sum())
            dropped = f"{hook.dropped_share:.2%}" if d.plan["select"] else "-"
            sparse = (f"{hook.density:.2%}", f"{hook.density * hook.width:.1f}", f"{silent:,}", dropped)
        table.add_row(name, hook.kind, hook.dtype, f"{hook.width:,}", *sparse, human_bytes(hook.n_bytes), share)
    table.width = out.measure(table, options=out.options.update(max_width=MAX_TABLE_WIDTH)).maximum
    out.print(table)  # a narrow terminal breaks its lines, and names stay whole


@app.command()
def verify(out_directory: DumpArgument) -> None:
    """Read every byte of a dump and check it: headers, checksums, the form of every segment, statistics.

    Exit code 0 if all that is committed is sound, also of a dump that is not finished (it says so); 1 if not.

    [bold]Example:[/bold] pyfacts verify out && echo sound
    """
    report = _open(out_directory).verify()
    state = "complete" if report.complete else "incomplete, what is committed is sound"
    out.print(
        escape(
            f"{out_directory}: {report.n_tokens:,} tokens in {_count(report.n_shards, 'shard')} and "
            f"{report.n_files} files, {human_bytes(report.n_bytes)}, {state}"
        )
    )


@app.command()
def top(
    out_directory: DumpArgument,
    hook: Annotated[str, typer.Argument(metavar="HOOK", help="Hook name, as `pyfacts info` lists them.")],
    neuron: Annotated[int, typer.Argument(metavar="NEURON", help="Number of the neuron.")],
    k: Annotated[int, typer.Option("-k", help="How many tokens.")] = 20,
    window: Annotated[int, typer.Option(help="Tokens shown around each.")] = 16,
) -> None:
    """Show the tokens at which a neuron fires most, in their contexts, the firing token marked.

    [bold]Example:[/bold] pyfacts top out blocks.3.mlp.hook_post 1234 -k 10
    """
    d = _open(out_directory)
    stats = d[hook].feature_stats()
    contexts = d.contexts(hook, neuron, k=k, window=window)
    density = stats.density[neuron]
    out.print(escape(f"{hook} neuron {neuron}: active at {stats.nnz[neuron]:,} tokens ({density:.3%})"))
    tokenizer = _tokenizer(d)
    if tokenizer is None:
        err.print(escape(f"no tokenizer in {_model_name(d) or 'the dump'}: token ids are shown"), highlight=False)
    if not d.complete:
        err.print(f"incomplete: of the {d.n_tokens_committed:,} tokens that are committed", highlight=False)
    for context in contexts:
        place = f"{context.value:9.4g}  {context.document}:{context.position:<6}"
        out.print(f"{place} {marked_context(context, tokenizer)}", highlight=False)


@app.command()
def demo(
    text: Annotated[
        bool, typer.Option("--text", help="Real text instead: five neurons and what they fire on.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the corpus and of the weights.")] = 0,
    out_directory: Annotated[Path, typer.Option("--out", help="Where to write.")] = Path("pyfacts-demo"),
) -> None:
    """Train a small model, dump it, and find its facts (or, with --text, its neurons) in the dump. About a minute.

    [bold]Example:[/bold] pyfacts demo --seed 1
    """
    if text:
        from .demo import text as chosen
    else:
        from .demo import facts as chosen  # type: ignore[no-redef]
    chosen.run(out_directory, seed=seed)


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: seconds instead of half a minute.")] = False,
) -> None:
    """Measure encode, decode and capture on this machine, each beside its PyTorch peer.

    [bold]Example:[/bold] pyfacts bench --quick
    """
    from . import bench as measure

    out.print(measure.table(measure.run(quick=quick)), highlight=False)


CONTROLS: dict[int, int | str] = {
    **{code: 0x2400 + code for code in range(32)},
    ord("\n"): "⏎",
    **dict.fromkeys(range(0x7F, 0xA0), "\N{REPLACEMENT CHARACTER}"),
}
"""What would move a terminal's cursor or change its colours, for str.translate."""


def marked_context(context: Context, tokenizer: Any) -> str:
    """The tokens around a firing one as one line of rich markup, the firing one «so»."""
    if tokenizer is None:
        at = context.token_index - context.start
        ids = [f" {i}" for i in context.token_ids]
        before, firing, after = "".join(ids[:at]), ids[at], "".join(ids[at + 1 :])
    else:
        before, firing, after = (part.translate(CONTROLS) for part in context.text(tokenizer))
    word = firing.lstrip() or firing
    before += firing.removesuffix(word)
    return f"{escape(before)}[bold reverse]{escape(f'«{word}»')}[/bold reverse]{escape(after)}"


def _open(directory: str) -> Dump:
    import pyfacts

    return pyfacts.open_dump(directory, framework="numpy")


def _no_bos(model: str) -> Callable[[np.ndarray], np.ndarray]:
    """Which of a sequence's tokens do not begin one."""
    from .dump.documents import tokenizer_of

    bos = tokenizer_of(model).bos_token_id
    if bos is None:
        raise ValueError(f"--skip-bos: the tokenizer of {model} has no beginning-of-sequence token")
    return lambda ids: ids != bos


def _load_saes(arguments: list[str]) -> dict[str, Any]:
    """The SAEs of `--sae HOOK=PATH`, by hook."""
    saes: dict[str, Any] = {}
    for argument in arguments:
        hook, _, path = argument.partition("=")
        if not hook or not path:
            raise ValueError(f"--sae takes HOOK=PATH, such as blocks.3.hook_resid_pre=my-sae, got {argument!r}")
        if hook in saes:
            raise ValueError(f"--sae gives {hook} two SAEs: dump them into two directories")
        from .sae import load_sae

        saes[hook] = load_sae(path)
    return saes


def _model_name(d: Dump) -> str | None:
    """The name or directory of the tokenizer, or of the model."""
    return d.plan["tokens"].get("tokenizer") or d.plan["model"].get("name")


def _tokenizer(d: Dump) -> Any:
    """The tokenizer of the dumped model, None where it cannot be loaded: then ids are shown."""
    name = _model_name(d)
    if not name:
        return None
    from .dump.documents import tokenizer_of

    try:
        return tokenizer_of(name)
    except (ImportError, OSError, ValueError):
        return None


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends a dump with the command that resumes it."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(_stopped("interrupted", INTERRUPTED)) from None


@contextlib.contextmanager
def _shown_progress() -> Iterator[Any]:
    """A bar with tokens/s and the time left on a terminal, a line a minute elsewhere; the projected size once."""
    columns = (
        TextColumn("dump"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]} tokens/s"),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal, transient=True) as bar:
        task = bar.add_task("dump", total=None, rate="-")
        projected = False
        said = time.monotonic()

        def show(progress: DumpProgress) -> None:
            nonlocal projected, said
            if progress.tokens_resumed == progress.tokens_total:
                err.print("all of it was committed before", highlight=False)
            if not projected and progress.tokens_done > progress.tokens_resumed:
                projected = True
                packed, dense = human_bytes(progress.packed_bytes), human_bytes(progress.dense_bytes)
                if progress.tokens_resumed:
                    err.print(f"resuming: {progress.tokens_resumed:,} tokens are committed", highlight=False)
                err.print(
                    f"{progress.tokens_total:,} tokens: about {packed} packed, before any codec ({dense} dense)",
                    highlight=False,
                )
            elapsed = bar.tasks[0].elapsed or 0
            rate = f"{(progress.tokens_done - progress.tokens_resumed) / elapsed:,.0f}" if elapsed else "-"
            bar.update(task, completed=progress.tokens_done, total=progress.tokens_total, rate=rate)
            if not err.is_terminal and time.monotonic() - said >= LINE_EVERY_S:
                said = time.monotonic()
                done = f"{progress.tokens_done:,} of {progress.tokens_total:,} tokens"
                err.print(f"{done}, {progress.shards_done} shards committed, {rate} tokens/s", highlight=False)

        yield show


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"
