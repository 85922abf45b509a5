"""The `u2a` command. Nothing heavy is imported before a command runs, so --help is immediate.

Expected failures print their message on stderr and exit with their own code, without a traceback.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from u2a.errors import ConfigError, U2AError

if TYPE_CHECKING:
    from u2a.config import Config

app = typer.Typer(
    name="u2a",
    help="Unlearn what hurts preference alignment: find the examples, weight them, remove them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file.")]
Out = Annotated[Path | None, typer.Option(help="Run directory [default: runs/NAME].")]
Sets = Annotated[list[str], typer.Option("--set", metavar="A.B=C", help="Override one key.")]


@contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except U2AError as e:
        print(f"u2a: {e}", file=sys.stderr)
        raise typer.Exit(e.exit_code) from None
    except KeyboardInterrupt:
        print("u2a: interrupted; the same command continues", file=sys.stderr)
        raise typer.Exit(130) from None


def _load(config: Path, sets: list[str]) -> Config:
    pairs = [s.partition("=") for s in sets]
    bad = [f"--set {key}: wanted A.B=C, as in unlearn.lr=1e-5" for key, eq, _ in pairs if not eq]
    if bad:
        raise ConfigError(bad, "command line")
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise ConfigError(
            "the stages of a run take one process, got several (torchrun, accelerate launch); in "
            "Python the products, scan and solve take DDP and FSDP2 models, see u2a.parallel",
            "WORLD_SIZE",
        )
    from u2a.config import load_config

    return load_config(config, {key: value for key, _, value in pairs})


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Everything follows from it.")] = 0,
) -> None:
    """Train a tiny model on planted data, unlearn, compare with baselines, write a report."""
    with _failures():
        from u2a.demo import app as demo_app

        demo_app.demo(out, seed)


@app.command()
def run(config: ConfigFile, out: Out = None, set_: Sets = []) -> None:  # noqa: B006
    """All stages. The same command again continues, or says that the run is complete."""
    with _failures():
        cfg = _load(config, set_)
        from u2a import run as stages

        stages.run(cfg, out or Path("runs") / config.stem)


@app.command()
def prep(
    config: ConfigFile,
    out: Annotated[
        Path | None, typer.Option(help="Run directory, or the file of alternates.")
    ] = None,
    alternates: Annotated[
        str | None, typer.Option(metavar="KIND", help="altpo, refusal, random, chosen or sapo.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Alternates per answer.")] = 1,
    max_new_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    temperature: Annotated[float | None, typer.Option()] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts generated at once.")] = 8,
    set_: Sets = [],  # noqa: B006
) -> None:
    """Only the data: tokenised, split, disjoint. Or alternate answers, as JSONL."""
    with _failures():
        if alternates is None:
            from u2a import run as stages

            stages.run(_load(config, set_), out or Path("runs") / config.stem, until="prep")
            return
        # the file to be written cannot be wanted yet, nor a loss that needs it
        cfg = _load(config, [*set_, "unlearn.loss=ga", "data.alternates=null"])
        from u2a import alternates as made

        how = made.defaults(
            alternates, samples=samples, batch=batch, seed=cfg.run.seed,
            max_new_tokens=max_new_tokens, temperature=temperature,
        )  # fmt: skip
        target = out or config.parent / f"{alternates}.jsonl"
        path = made.prepare_alternates(cfg, alternates, target, how)
        key = "forget" if alternates == "sapo" else "alternates"
        print(f"{path}\nfor the configuration: data: {{{key}: {{path: {path}}}}}")


@app.command()
def scan(config: ConfigFile, out: Out = None, set_: Sets = []) -> None:  # noqa: B006
    """Only the scores: how much unlearning each candidate would help."""
    with _failures():
        cfg = _load(config, set_)
        from u2a import run as stages

        stages.scan_only(cfg, out or Path("runs") / config.stem)


@app.command(name="eval")
def eval_(
    config: ConfigFile,
    out: Out = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Adapter folder [default: that of the run directory].")
    ] = None,
    suite: Annotated[
        str | None, typer.Option(metavar="A,B", help="Of pa, forget, retain, mia, tofu, muse.")
    ] = None,
    retain_model: Annotated[
        str | None, typer.Option(help="A model trained without the forget set, or its logs.")
    ] = None,
    reward: Annotated[str | None, typer.Option(metavar="M:F", help="TRL reward function.")] = None,
    judge: Annotated[str | None, typer.Option(metavar="M:F", help="Judge of harm.")] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="M:F", help="Judge of two answers.")
    ] = None,
    classifier: Annotated[str | None, typer.Option(metavar="M:F", help="Of sound text.")] = None,
    text: Annotated[bool, typer.Option("--text", help="Write generated texts too.")] = False,
    set_: Sets = [],  # noqa: B006
) -> None:
    """Measure an unlearned model beside its base: alignment, forgetting, utility, membership."""
    with _failures():
        cfg = _load(config, set_)
        from u2a.metrics import calls, evaluation

        judges = calls.judges(
            reward=reward, judge=judge, compare=compare, classifier=classifier
        )  # fmt: skip
        folder = evaluation.evaluate(
            cfg, out or Path("runs") / config.stem, adapter=adapter, suites=suite,
            retain_model=retain_model, judges=judges, show=text,
        )  # fmt: skip
        print(f"{folder}", file=sys.stderr)


@app.command()
def validate(
    out: Annotated[Path, typer.Option(help="Where models and tables go.")] = Path("runs/validate"),
    size: Annotated[str, typer.Option(help="small, medium or large.")] = "small",
    seeds: Annotated[int, typer.Option(min=1, help="How many, from 0.")] = 3,
    quick: Annotated[bool, typer.Option(help="One loss, one seed, few candidates.")] = False,
) -> None:
    """Are predicted gains true, and do they select better than anything else? Tables, pictures."""
    with _failures():
        from u2a import benchmark

        benchmark.validate(out, size=size, seeds=seeds, quick=quick)


@app.command()
def env(as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False) -> None:
    """Versions, machine and who serves each op: paste it into a bug report."""
    with _failures():
        from u2a import env as facts

        found = facts.report()
        print(json.dumps(found, indent=1) if as_json else facts.table(found))


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="YAML file.")] = None,
    model: Annotated[str | None, typer.Option(help="A model's folder or hub id.")] = None,
    set_: Sets = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Check this machine, a model's products against float64 double backward, and the data.

    Exit code 0 when all is well, 4 for the environment, 2 for a model or configuration that cannot
    be used, 3 for the data, 6 for numbers that are wrong.
    """
    with _failures():
        if config is not None and model is not None:
            raise ConfigError("CONFIG and --model: wanted one of them", "command line")
        cfg = None if config is None else _load(config, set_)
        from u2a import doctor as ward

        found = ward.examine(cfg, model)
        print(json.dumps(ward.as_json(found), indent=1) if as_json else ward.table(found))
        if code := ward.exit_code(found):
            raise typer.Exit(code)


def _terminated(*_: object) -> None:
    print("u2a: terminated; the same command continues", file=sys.stderr)
    raise SystemExit(75)


def main() -> None:
    # peft imports bitsandbytes where it is installed, which then warns of kernels it does without
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, _terminated)
    app(prog_name="u2a")
