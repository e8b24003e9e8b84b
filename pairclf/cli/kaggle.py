"""The commands `package`, `rehearse`, `push`, `submit` and `ledger`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pairclf.cli.options import BaseFolder, Folds, Group, LinkedFiles, TrustRemoteCode, permit, split_overrides
from pairclf.console import console, stdout

GROUP = Group("Kaggle")

PackageFolder = Annotated[Path, typer.Argument(metavar="PACKAGE", help="folder that `pairclf package` wrote")]
Go = Annotated[bool, typer.Option("--go", help="send the requests; default: only print them")]
LedgerFile = Annotated[Path, typer.Option("--ledger", help="file that lists all submissions")]
LEDGER = Path("runs/ledger.jsonl")


@GROUP.command("pairclf package configs/kaggle/lmsys.yaml package.owner=me")
def package(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG|BUNDLE|KEY=VALUE",
            help="config (the bundles of its run are packaged), or bundle folders; and settings to override, e.g. "
            "package.competition=SLUG",
        ),
    ],
    fold: Folds = None,
    out: Annotated[
        Path | None,
        typer.Option(help="folder to write; default: kaggle/build/NAME, by the config's file name or package.name"),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    linked_files: LinkedFiles = False,
) -> None:
    """Build the folder to push to Kaggle: kernel, bundles, wheels and metadata. See docs/kaggle.md."""
    permit(trust_remote_code, linked_files)
    from pairclf.packaging.kaggle_extra import require_extra

    require_extra()
    from pairclf.packaging.build import package as workflow
    from pairclf.packaging.package_inputs import read_package_inputs

    request = read_package_inputs(*split_overrides(arguments), fold or [])
    stdout.print(workflow(request.config, request.bundles, out or Path("kaggle", "build", request.name)))


@GROUP.command("pairclf rehearse kaggle/build/lmsys --rows 25000 --inject oom,kill")
def rehearse(
    folder: PackageFolder,
    test: Annotated[Path | None, typer.Option(help="test file; default: data.test of the config")] = None,
    sample: Annotated[Path | None, typer.Option(help="its sample submission; default: as the config says")] = None,
    base: BaseFolder = None,
    out: Annotated[
        Path | None, typer.Option(help="folder for report and submission; default: PACKAGE/rehearsal")
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(min=1, help="rows of the hidden test, made by repeating the file's; default: the file as it is"),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(
            help="here: this Python and its packages; 3.12 or 3.13: that Python with the packages of Kaggle's image; "
            "default: here, if the package supports this Python, else its first Python"
        ),
    ] = None,
    speed: Annotated[
        float,
        typer.Option(min=1, help="speed of the clock: at 60, 8 hours last 8 minutes; push accepts only a run at 1"),
    ] = 1.0,
    inject: Annotated[
        str | None,
        typer.Option(
            help="comma-separated faults, each in a run of its own: oom, kill, slow, null-rows, extra-columns, "
            "missing-model, corrupt-bundle, wrong-python"
        ),
    ] = None,
    commit: Annotated[
        bool,
        typer.Option("--commit", help="run as Kaggle does when a notebook is saved; push does not accept this run"),
    ] = False,
) -> None:
    """Run the package offline, with the mounts, limits and clock of Kaggle's hidden rerun, and check the result."""
    from pairclf.packaging.kaggle_extra import require_extra

    require_extra()
    from pairclf.rehearsal.rehearse import Options
    from pairclf.rehearsal.rehearse import rehearse as workflow

    faults = tuple(name.strip() for name in (inject or "").split(",") if name.strip())
    options = Options(
        test=test, sample=sample, base=base, out=out, rows=rows, image=image, speed=speed, inject=faults, commit=commit
    )
    stdout.print(workflow(folder, options).render())


@GROUP.command("pairclf push kaggle/build/lmsys --go")
def push(
    folder: PackageFolder,
    go: Go = False,
    no_run: Annotated[
        bool,
        typer.Option("--no-run", help="save the kernel without running it, to look at it on Kaggle; kaggle >= 2.2.5"),
    ] = False,
) -> None:
    """Upload bundles and wheels, push the kernel, and wait until Kaggle has run it.

    The package must have passed `pairclf rehearse` on this machine. If the command fails, start it again: uploads that
    are complete are not repeated.
    """
    from pairclf.packaging.kaggle_extra import require_extra

    require_extra()
    from pairclf.publish.push import push as workflow

    workflow(folder, go=go, run=not no_run)


@GROUP.command('pairclf submit kaggle/build/lmsys -m "five folds, both orders" --go')
def submit(
    folder: PackageFolder,
    message: Annotated[str, typer.Option("--message", "-m", help="description of the submission on Kaggle")],
    go: Go = False,
    again: Annotated[bool, typer.Option("--again", help="submit a version that was submitted before")] = False,
    ledger: LedgerFile = LEDGER,
) -> None:
    """Submit the pushed kernel, wait for its score, and write the score into the ledger."""
    from pairclf.packaging.kaggle_extra import require_extra

    require_extra()
    from pairclf.publish.submit import submit as workflow

    workflow(folder, message, go=go, again=again, ledger=ledger)


@GROUP.command("pairclf ledger --refresh --plot ledger.html", name="ledger")
def show_ledger(
    ledger: LedgerFile = LEDGER,
    refresh: Annotated[bool, typer.Option("--refresh", help="ask Kaggle for missing scores")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="HTML file for a plot of leaderboard scores over out-of-fold scores")
    ] = None,
) -> None:
    """List all submissions with out-of-fold and leaderboard scores, and the correlation of the two."""
    from pairclf.publish import ledger as table

    if refresh:
        table.refresh(ledger)
    stdout.print(table.render(ledger))
    if plot is not None:
        points = table.write_page(ledger, plot)
        console.print(f"wrote {plot}" if points else f"nothing to plot in {plot}: {table.NOTHING_TO_PLOT}")
