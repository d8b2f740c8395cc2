"""The command line as a user meets it: a process, its output, its exit code."""

import contextlib
import io
import json
import os
import pydoc_data.topics
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.text import Text
from saes import TinySae
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

import pyfacts
from pyfacts import cli

TEXT = "\n".join(pydoc_data.topics.topics.values())[:60_000]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a sparse ReLU model `opt`, a dense GELU model `gpt2`, a text, and a finished dump `out`."""
    root = tmp_path_factory.mktemp("cli")
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["</s>"], show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")

    torch.manual_seed(0)
    opt = OPTForCausalLM(
        OPTConfig(
            vocab_size=500,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=300,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
    )
    for layer in opt.model.decoder.layers:
        layer.fc1.bias.data -= 1.5 * layer.fc1.weight.data.norm(dim=1)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=500, n_embd=32, n_layer=1, n_head=2, n_positions=64))
    for name, model in (("opt", opt), ("gpt2", gpt2)):
        model.save_pretrained(root / name)
        fast.save_pretrained(root / name)
    shutil.copytree(root / "opt", root / "damaged-opt")
    os.truncate(root / "damaged-opt" / "model.safetensors", 1000)
    lines = [TEXT[start : start + 600] for start in range(0, len(TEXT), 600)]
    (root / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    (root / "empty.txt").write_text("")
    done = pyfacts_command(root)("dump", "opt", "text.jsonl", "out", "--context-size", "32", "--shard-tokens", "4096")
    assert done.returncode == 0, done.stderr
    return root


def pyfacts_command(cwd: Path) -> Run:
    """Calls the command line's main() in this process: what a process would do, without importing torch each time."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.chdir(cwd),
            mock.patch.object(sys, "argv", ["pyfacts", *arguments]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as exit_,
        ):
            cli.main()
        code = exit_.value.code or 0
        assert isinstance(code, int)
        return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def run(work: Path) -> Run:
    return pyfacts_command(work)


def test_dump_says_what_it_wrote_and_draws_no_bar_in_a_pipe(run: Run, work: Path) -> None:
    done = run("dump", "opt", "text.jsonl", "again", "--context-size", "32", "--codec", "none")
    assert done.returncode == 0
    assert "packed, before any codec" in done.stderr and "━" not in done.stderr + done.stdout
    d = pyfacts.open_dump(work / "again")
    assert f"{d.n_tokens:,} tokens of 2 hooks" in done.stdout and d.codec == "none"


def test_a_log_shows_where_it_is(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "LINE_EVERY_S", 0.0)
    done = run("dump", "opt", "text.jsonl", "logged", "--context-size", "32", "--shard-tokens", "4096")
    assert re.search(r"[\d,]+ of [\d,]+ tokens, \d+ shards committed, [\d,]+ tokens/s", done.stderr)


def test_the_same_command_resumes(run: Run, work: Path) -> None:
    """A finished dump is not computed again; another plan in the same directory is refused."""
    before = {path: path.stat().st_mtime_ns for path in (work / "out").rglob("*")}
    done = run("dump", "opt", "text.jsonl", "out", "--context-size", "32", "--shard-tokens", "4096")
    assert done.returncode == 0 and "all of it was committed before" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in (work / "out").rglob("*")} == before
    other = run("dump", "opt", "text.jsonl", "out", "--context-size", "16", "--shard-tokens", "4096")
    assert other.returncode == 1 and "holds another dump" in other.stderr
    other = run("dump", "opt", "text.jsonl", "out", "--context-size", "32", "--hooks", "blocks.1.mlp.hook_post")
    assert "of its hooks blocks.0.mlp.hook_post are missing here, and none are new" in other.stderr


def test_without_the_beginnings_of_sequences(run: Run, work: Path) -> None:
    np.save(work / "ids.npy", [[0, 5, 6], [0, 7, 0]])
    refused = run("dump", "opt", "ids.npy", "no-bos", "--skip-bos")
    assert refused.returncode == 2 and "the tokenizer of opt has no beginning-of-sequence token" in refused.stderr
    shutil.copytree(work / "opt", work / "with-bos")
    PreTrainedTokenizerFast.from_pretrained(work / "opt", bos_token="</s>").save_pretrained(work / "with-bos")
    done = run("dump", "with-bos", "ids.npy", "no-bos", "--skip-bos")
    assert done.returncode == 0, done.stderr
    d = pyfacts.open_dump(work / "no-bos")
    assert d.token_ids[:].tolist() == [5, 6, 7] and d.positions[:].tolist() == [[0, 1], [0, 2], [1, 1]]


def test_hooks_and_selections(run: Run, work: Path) -> None:
    hook = "blocks.0.mlp.hook_post"
    done = run("dump", "gpt2", "text.jsonl", "topk", "--hooks", hook, "--topk", "8", "--context-size", "32")
    assert done.returncode == 0, done.stderr
    d = pyfacts.open_dump(work / "topk")
    assert d.hook_names == [hook] and d[hook].density == 8 / 128
    shown = run("info", "topk").stdout
    assert "select topk(k=8)" in shown and f"{d[hook].dropped_share:.2%}" in shown
    assert d[hook].dropped_share == pytest.approx(d[hook][:].dropped_share) and d[hook].dropped_share > 0


def test_info_shows_every_hook(run: Run) -> None:
    done = run("info", "out")
    assert done.returncode == 0
    for part in ("complete", "blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post", "neurons", "300", "zstd"):
        assert part in done.stdout


def test_info_on_a_narrow_terminal_says_whole_names(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "out", Console(soft_wrap=True, width=40))
    assert "blocks.1.mlp.hook_post  neurons" in run("info", "out").stdout


def test_top_where_the_terminal_is_ascii(run: Run, work: Path) -> None:
    arguments = [sys.executable, "-m", "pyfacts", "top", "out", "blocks.0.mlp.hook_post", "7", "-k", "2"]
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(arguments, cwd=work, capture_output=True, check=False, env=env)
    assert done.returncode == 0 and done.stdout.count(b"?") >= 2, done.stderr


def test_verify_tells_sound_from_damaged(run: Run, work: Path) -> None:
    assert run("verify", "out").returncode == 0
    done = run("dump", "opt", "text.jsonl", "damaged", "--context-size", "32")
    shard = next((work / "damaged").rglob("blocks.1*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    done = run("verify", "damaged")
    assert done.returncode == 1 and shard.name in done.stderr and "Traceback" not in done.stderr


def test_hooks_by_a_pattern(run: Run, work: Path) -> None:
    hooks = ("--hooks", "blocks.*.hook_resid_p*", "--hooks", "blocks.0.hook_mlp_in")
    done = run("dump", "opt", "text.jsonl", "rows", "--context-size", "32", *hooks)
    assert done.returncode == 0, done.stderr
    names = [f"blocks.{i}.hook_resid_{place}" for i in range(2) for place in ("pre", "post")]
    assert pyfacts.open_dump(work / "rows").hook_names == [*names, "blocks.0.hook_mlp_in"]


def test_top_says_what_is_missing(run: Run, work: Path) -> None:
    """The tokenizer, and tokens that are not committed yet."""
    shutil.copytree(work / "out", work / "half")
    max((work / "half").glob("0*.json")).unlink()
    (work / "opt").rename(work / "moved")
    try:
        done = run("top", "half", "blocks.1.mlp.hook_post", "5", "-k", "1")
    finally:
        (work / "moved").rename(work / "opt")
    assert done.returncode == 0
    assert "no tokenizer in opt: token ids are shown" in done.stderr
    assert re.search("incomplete: of the [0-9,]+ tokens that are committed", done.stderr)


@pytest.mark.parametrize(
    "arguments", [["info", "out"], ["verify", "out"], ["top", "out", "blocks.1.mlp.hook_post", "5"]], ids=str
)
def test_dumps_are_read_without_torch(run: Run, work: Path, arguments: list[str]) -> None:
    program = "import sys; sys.modules['torch'] = None; from pyfacts import cli; sys.argv[0] = 'pyfacts'; cli.main()"
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=work, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, run(*arguments).stdout), done.stderr


def test_top_marks_the_firing_token(run: Run, work: Path) -> None:
    hook = "blocks.1.mlp.hook_post"
    done = run("top", "out", hook, "5", "-k", "3", "--window", "6")
    assert done.returncode == 0
    d = pyfacts.open_dump(work / "out")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "opt")
    lines = done.stdout.splitlines()
    assert hook in lines[0] and len(lines) == 4
    for line, (token, value) in zip(lines[1:], d[hook].top_tokens(5, k=3), strict=True):
        firing = tokenizer.decode([int(d.token_ids[token])])
        assert f"{value:.4g}" in line and f"«{firing.lstrip() or firing}»".replace("\n", "⏎") in line


def test_control_characters_of_a_text_do_not_reach_the_terminal() -> None:
    context = mock.Mock(text=lambda tokenizer: ("a\x1b[31m", "b\x00", "\x9bc\n\x7f"))
    shown = Text.from_markup(cli.marked_context(context, "a tokenizer")).plain
    assert shown == "a␛[31m«b␀»�c⏎�"


def test_latents_of_saes(run: Run, work: Path) -> None:
    """`--sae HOOK=PATH` loads each SAE by its path; the latents are a hook like any other."""
    loaded = {"a": TinySae(32, d_sae=500), "dir/b=2": TinySae(300)}
    for sae in loaded.values():
        sae.b_enc.zero_()
    hooks = ["blocks.0.hook_resid_pre", "blocks.1.mlp.hook_post"]
    saes = [part for hook, path in zip(hooks, loaded, strict=True) for part in ("--sae", f"{hook}={path}")]
    with mock.patch.dict(sys.modules, {"pyfacts.sae": mock.Mock(load_sae=loaded.__getitem__)}):
        done = run("dump", "opt", "text.jsonl", "latents", "--context-size", "32", *saes)
        assert done.returncode == 0, done.stderr
        swapped = run("dump", "opt", "text.jsonl", "latents", "--context-size", "32", *saes[:3], f"{hooks[1]}=a")
    assert swapped.returncode == 2 and "reads d_in = 32" in swapped.stderr and "width is 300" in swapped.stderr
    d = pyfacts.open_dump(work / "latents")
    assert d.hook_names == [f"{hook}.hook_sae_acts_post" for hook in hooks]
    shown = run("info", "latents").stdout
    assert all(name in shown for name in d.hook_names) and "500" in shown and "600" in shown
    j = int(d[d.hook_names[0]].feature_stats().nnz.argmax())
    (token, value), *_ = d[d.hook_names[0]].top_tokens(j, 1)
    assert f"{value:.4g}" in run("top", "latents", d.hook_names[0], str(j), "-k", "1").stdout


def test_latents_of_a_checkpoint(run: Run, work: Path) -> None:
    """A real file of Gemma Scope's kind: what is dumped is what the SAE gives for the captured residual stream."""
    draw = np.random.default_rng(0).standard_normal
    weights = {"W_enc": 30 * draw((32, 700)), "b_enc": draw(700), "W_dec": draw((700, 32)), "b_dec": draw(32)}
    np.savez(
        work / "params.npz",
        **{name: array.astype(np.float32) for name, array in weights.items()},
        threshold=np.full(700, 4, np.float32),
    )
    hook = "blocks.0.hook_resid_pre"
    arguments = ("--context-size", "32", "--sae", f"{hook}=params.npz", "--hooks", hook)
    done = run("dump", "opt", "text.jsonl", "scope", *arguments)
    assert done.returncode == 0, done.stderr
    d = pyfacts.open_dump(work / "scope")
    expected = pyfacts.load_sae(work / "params.npz").encode(d[hook][:100])
    dumped = d[f"{hook}.hook_sae_acts_post"][:100]
    assert 0 < dumped.density < 0.2 and torch.allclose(dumped.to_dense(), expected.to_dense(), atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["dump", "opt"], 2, "Missing argument"),
        (["dump", "./nowhere", "text.jsonl", "x"], 2, "./nowhere does not exist"),
        (["dump", "opt", "nowhere.txt", "x"], 2, "nowhere.txt"),
        (["dump", "opt", "empty.txt", "x"], 2, "empty"),
        (["dump", "opt", "text.jsonl", "x", "--hooks", "blocks.0.mlp.hook_pst"], 2, "blocks.0.mlp.hook_post"),
        (["dump", "opt", "text.jsonl", "x", "--topk", "8", "--min-abs", "1"], 2, "exclude each other"),
        (["dump", "opt", "text.jsonl", "x", "--codec", "gzip"], 2, "gzip"),
        (["dump", "gpt2", "text.jsonl", "x"], 2, "--topk"),
        (["dump", "opt", "text.jsonl", "x", "--context-size", "65"], 2, "--context-size 64"),
        (["dump", "opt", "text.jsonl", "x", "--sae", "blocks.0.hook_resid_pre"], 2, "HOOK=PATH"),
        (["dump", "damaged-opt", "text.jsonl", "x"], 2, "damaged-opt cannot be loaded: SafetensorError"),
        (["dump", "opt", "text.jsonl", "x", "--hooks", "blocks.*.hook_rsid_post"], 2, "matches no hook"),
        (["info", "nowhere"], 1, "is no dump"),
        (["verify", "opt"], 1, "is no dump"),
        (["top", "out", "blocks.0.mlp.hook_pst", "5"], 2, "blocks.0.mlp.hook_post"),
        (["top", "out", "blocks.0.mlp.hook_post", "300"], 2, "300"),
    ],
)
def test_errors_are_one_line_that_helps(run: Run, work: Path, arguments: list[str], code: int, message: str) -> None:
    """The exit code tells wrong arguments (2) from damage (1), and nothing is left of what was refused."""
    done = run(*arguments)
    assert done.returncode == code, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (work / "x").exists()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_dump_says_how_to_resume_and_does(work: Path, signum: int, code: int) -> None:
    """The signal comes as soon as the first shard is committed; the same command then finishes the dump."""
    out = work / f"interrupted-{signum}"
    arguments = ["dump", "opt", "text.jsonl", out.name, "--context-size", "16", "--batch-size", "4"]
    arguments += ["--shard-tokens", "1024"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pyfacts", *arguments],
        cwd=work,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (out / "00000.json").exists():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
    process.send_signal(signum)
    _, errors = process.communicate()
    assert process.returncode == code, errors
    assert f"to resume: pyfacts dump opt text.jsonl {out.name}" in errors and "Traceback" not in errors
    d = pyfacts.open_dump(out)
    assert 0 < d.n_tokens_committed < d.n_tokens
    assert pyfacts_command(work)(*arguments).returncode == 0
    assert pyfacts.open_dump(out).verify().complete


def test_ctrl_c_while_a_model_is_imported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers then says that it could not import it."""

    def interrupted() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ModuleNotFoundError("Could not import module 'OPTForCausalLM'") from error

    monkeypatch.setattr(cli, "app", interrupted)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr().err
    assert stopped.value.code == 130 and "interrupted; to resume: pyfacts" in said and "install" not in said


@pytest.mark.parametrize("command", ["dump", "info", "verify", "top", "demo", "bench"])
def test_help_shows_an_example(run: Run, command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0 and f"Example: pyfacts {command}" in done.stdout


def test_import_is_light() -> None:
    """`import pyfacts` and the command line's module import none of the heavy libraries."""
    code = "import sys, pyfacts, pyfacts.cli; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["transformers", "datasets", "ray", "matplotlib", "pandas", "scipy", "pyarrow"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(sys, "argv", ["pyfacts", "dump", "nowhere/model", "nothing.txt", "out"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "'.[text]'" in capsys.readouterr().err
