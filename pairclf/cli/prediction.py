"""The commands `predict`, `rank`, `try`, `forecast` and `verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pairclf.cli.options import BaseFolder, Group, LinkedFiles, Members, TrustRemoteCode, permit, split_overrides
from pairclf.console import stdout
from pairclf.hardware import PROFILES

GROUP = Group("Prediction")

Deadline = Annotated[
    str | None,
    typer.Option(help="when the command must end: 8h30m from now, or 2026-01-31T18:00:00+00:00; default: no deadline"),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume/--no-resume", help="continue an interrupted run of the same command, or score all rows again"
    ),
]


@GROUP.command(
    "pairclf predict runs/lmsys/gemma2-9b-qlora/fold0/bundle --data test.csv --sample sample_submission.csv "
    "--deadline 8h30m predict.swap=budget"
)
def predict(
    members: Members,
    data: Annotated[Path, typer.Option("--data", help="file of unlabelled rows to score")],
    sample: Annotated[
        Path | None, typer.Option("--sample", help="sample submission, which gives ids, order and columns")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="file for the submission; default: submission.csv, or none where --scores is given"),
    ] = None,
    scores: Annotated[Path | None, typer.Option("--scores", help="parquet file for the scores")] = None,
    deadline: Deadline = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="exit with code 3 if a row or a model could not be scored")
    ] = False,
    resume: Resume = True,
    base: BaseFolder = None,
    trust_remote_code: TrustRemoteCode = False,
    linked_files: LinkedFiles = False,
) -> None:
    """Score a test file with one or more bundles, and write the submission.

    A valid submission exists within seconds, and improves while the command runs. If the command is killed, start it
    again: it continues. See docs/prediction.md.
    """
    permit(trust_remote_code, linked_files, bundles_only=True)
    from pairclf.inference.deadline import process_age
    from pairclf.inference.predict import predict as workflow

    paths, overrides = split_overrides(members)
    workflow(
        paths,
        data,
        out if out or scores else Path("submission.csv"),
        sample=sample,
        scores=scores,
        base=base,
        overrides=overrides,
        deadline=deadline,
        strict=strict,
        resume=resume,
        spent=process_age(),
    )


@GROUP.command("pairclf rank runs/lmsys/gemma2-9b-reward/fold0/bundle --data answers.jsonl --out ranking.csv")
def rank(
    members: Members,
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            help="file of prompts: a list of answers a row (.jsonl, .parquet), or one answer a row (.csv, too)",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="file for the ranking: .csv, .parquet or .jsonl")] = Path(
        "ranking.csv"
    ),
    pairs: Annotated[
        int | None,
        typer.Option(min=1, help="most pairs of a prompt's answers that are compared; default: all; not for rewards"),
    ] = None,
    deadline: Deadline = None,
    strict: Annotated[bool, typer.Option("--strict", help="exit with code 3 if an answer could not be ranked")] = False,
    resume: Resume = True,
    base: BaseFolder = None,
    trust_remote_code: TrustRemoteCode = False,
    linked_files: LinkedFiles = False,
) -> None:
    """Rank the answers of each prompt: best of n.

    A reward model scores each answer once; other models compare all pairs in both orders. Columns of the ranking: id,
    answer (numbered from 0), reward or strength, rank. If the command is killed, start it again: it continues.
    """
    permit(trust_remote_code, linked_files, bundles_only=True)
    from pairclf.inference.deadline import process_age
    from pairclf.inference.rank import rank as workflow

    paths, overrides = split_overrides(members)
    workflow(
        paths,
        data,
        out,
        pairs=pairs,
        base=base,
        overrides=overrides,
        deadline=deadline,
        strict=strict,
        resume=resume,
        spent=process_age(),
    )


@GROUP.command("pairclf try runs/lmsys/gemma2-9b-qlora/fold0/bundle --data train.csv", name="try")
def try_(
    members: Members,
    data: Annotated[
        Path | None, typer.Option("--data", help="file of rows, such as train.csv: the page loads a row by its id")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="port of 127.0.0.1; 0: any that is free")] = 0,
    browser: Annotated[bool, typer.Option("--open", help="open the page in a browser")] = False,
    base: BaseFolder = None,
    trust_remote_code: TrustRemoteCode = False,
    linked_files: LinkedFiles = False,
) -> None:
    """Serve a local web page that scores the texts you type: probabilities in both orders, or a ranking.

    Only this machine reaches the page, at a random address of 127.0.0.1, and nothing that you type is kept. It needs
    `pip install 'pairclf[try]'`. See docs/try.md.
    """
    from pairclf.playground.server import require_extra, serve

    require_extra()
    permit(trust_remote_code, linked_files, bundles_only=True)
    from pairclf.api.judge import Judge
    from pairclf.inference.ensemble import open_ensemble
    from pairclf.playground.verdict import Playground

    paths, overrides = split_overrides(members)
    with Judge(open_ensemble(paths, base, overrides), overrides) as judge:
        serve(Playground(judge, data), port=port, browser=browser)


@GROUP.command("pairclf forecast runs/lmsys/gemma2-9b-qlora/fold0/bundle --data test.csv --device t4x2 --rows 25000")
def forecast(
    members: Members,
    data: Annotated[Path, typer.Option("--data", help="file of unlabelled rows like those of the hidden test")],
    device: Annotated[
        str, typer.Option(help=f"{', '.join(PROFILES)}; here: measure the speed of this machine on some rows")
    ] = "here",
    rows: Annotated[
        int | None, typer.Option(min=1, help="number of rows of the hidden test; default: the rows of the file")
    ] = None,
    deadline: Annotated[
        list[str] | None,
        typer.Option(
            help="deadline to simulate, e.g. 8h30m (repeat for more); default: 25%, 50% and 75% of the full time"
        ),
    ] = None,
    base: BaseFolder = None,
    trust_remote_code: TrustRemoteCode = False,
    linked_files: LinkedFiles = False,
) -> None:
    """Simulate a prediction: print the hours of each pass, and what can be scored before a deadline."""
    permit(trust_remote_code, linked_files, bundles_only=True)
    from pairclf.inference.forecast import forecast as workflow

    paths, overrides = split_overrides(members)
    tables = workflow(paths, data, device=device, rows=rows, deadlines=deadline or [], base=base, overrides=overrides)
    for table in tables:
        stdout.print(table, "")


@GROUP.command("pairclf verify runs/lmsys/gemma2-9b-qlora/fold0/bundle")
def verify(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="bundle folders")],
    base: BaseFolder = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the results")] = None,
    trust_remote_code: TrustRemoteCode = False,
    linked_files: LinkedFiles = False,
) -> None:
    """Check that bundles are unchanged: compare the hash of each file, and score the probe rows again."""
    permit(trust_remote_code, linked_files, bundles_only=True)
    from pairclf.inference.verify import verify as workflow

    for folder, result in workflow(bundles, base, out):
        difference = result["largest_difference"]
        stdout.print(f"verified {folder}: {result['rows']} probe rows, logits differ by {difference:.1g}")
