"""Template of the Kaggle kernel, read by pairclf/packaging/notebook.py.

Percent format: each cell opens with `# %% id`; `[submission]` or `[server]` before the id: for such kernels alone. A
word in double braces is filled in when a package is built; in code it stands between quotes, which go with it.
Nothing is computed here: the kernel finds its inputs, installs pairclf, and calls the same commands that validated
the bundles at home.
"""

# %% [markdown] about
# # {{title}}
# Made by pairclf {{version}} for the competition `{{competition}}`. It needs no internet.
#
# Each bundle below is a trained classifier; what is submitted is the blend of them. The figures are those of rows that
# the bundle was not trained on.
#
# | bundle | base model | held out | metrics | seal |
# |---|---|---|---|---|
# {{bundle_table}}
#
# Before a row is scored, every file is compared with the hash it had at home, and every bundle scores the probe
# rows that it was validated with: the model that runs here is the model that was measured.
#
# ## Check
# The first cell looks before anything is done: Python, torch, GPUs, and each input, by name and hash, wherever it is
# mounted. And it writes a submission that says of every row what the training rows were like on average, which stays
# if nothing better comes.

# %% check
import csv
import glob
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

STARTED = time.time()
COMPETITION = "{{competition}}"
PYTHONS = "{{pythons}}"  # that the wheels install on
REQUIREMENTS = "{{requirements}}"  # by Python: what the image lacks; all else is the image's
PARTS = "{{parts}}"  # marker files and their SHA-256
WHEELHOUSE = "{{wheelhouse}}"  # folder of the wheels
BUNDLES = "{{bundles}}"  # folders of the bundles
MEMBERS = "{{members}}"  # what predicts: these, or an ensemble's file
STANDALONE = "{{standalone}}"  # bundles that need no base model
BASE = "{{base}}"  # owner/model/framework/instance/version, or owner/slug of a dataset; empty: in the bundles
PRIOR = "{{prior}}"  # by column of the submission
GPUS = "{{gpus}}"
DEADLINE = "{{deadline}}"  # seconds from now on
MOUNT_SECONDS = 600  # in which an input that is empty at first must fill

INPUT = Path(os.environ.get("PAIRCLF_KAGGLE_INPUT", "/kaggle/input"))
SPEED = float(os.environ.get("PAIRCLF_CLOCK_SPEED", "1"))  # of the clock; rehearsals have a faster one
RERUN = bool(os.environ.get("KAGGLE_IS_COMPETITION_RERUN"))
PAUSE = max(0.1, 1 / SPEED)  # seconds between two looks
lacking = []  # what the rerun goes on without


def give_way(what):
    """Stop a run that anybody watches. The hidden rerun, which would be lost, goes on with what it has, and says so."""
    if not RERUN:
        raise RuntimeError(what)
    lacking.append(what)
    print("!" * 100, f"WARNING: {what}", "If nothing can be scored, the priors stay.", "!" * 100, sep="\n")


def find(name):
    """Files or folders of that name, however deep."""
    return sorted(map(Path, glob.glob(f"{glob.escape(str(INPUT))}/**/{name}", recursive=True)))


def wait_for(what, look):
    """What `look` returns, once that is not None; None where it never comes."""
    found, waited = look(), False
    while found is None and time.time() < STARTED + MOUNT_SECONDS / SPEED:
        if not waited:
            print(f"waiting for {what}")
        time.sleep(PAUSE)
        found, waited = look(), True
    if waited and found is not None:  # it came while we looked: let it become complete
        time.sleep(PAUSE)
        found = look()
    return found


def sha256(path):
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_intact(path, expected):
    """Whether a file is as it was at home; one that is just being mounted gets a second look."""
    if sha256(path) == expected:
        return True
    time.sleep(PAUSE)
    return sha256(path) == expected


def find_competition():
    """The folder of the competition's files."""
    return next((path.parent for path in find("{{landmark}}") if COMPETITION in path.parts), None)


def find_payload(kind):
    """`{file: (where it is, its hash)}` of all parts, once every file is there."""
    files = {}
    for name, expected in PARTS[kind].items():
        marker = next((path for path in find(name) if sha256(path) == expected), None)
        if marker is None:
            return None
        for file, digest in json.loads(marker.read_text())["files"].items():
            files[file] = marker.parent / file, digest
    return files if all(path.is_file() for path, _ in files.values()) else None


def assemble(kind):
    """A folder with a payload's files, in however many parts they came: each as it was at home, and a link to it."""
    files = wait_for(f"the {kind}", lambda: find_payload(kind))
    if files is None:
        there = [str(path.relative_to(INPUT)) for path in find("pairclf-*.json")]
        give_way(f"no input holds the {kind} {list(PARTS[kind])}, or not all files; markers found: {there}. Attach it")
        return None
    top = Path(tempfile.mkdtemp(prefix=f"pairclf-{kind}-"))
    for name, (path, expected) in files.items():
        if not is_intact(path, expected):
            raise RuntimeError(f"{name} was changed: {path} is not the file that was packaged. Upload it again")
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).symlink_to(path.resolve())
    return top


def find_base():
    """The folder of the base model, whatever lies above it, once all files that its index names are there."""
    wanted = BASE.lower().replace("_", "").split("/")[1:]
    for config in sorted(find("config.json"), key=lambda path: len(path.parts)):
        parts = str(config.parent).lower().replace("_", "").split("/")
        here = parts[-len(wanted) :] == wanted if len(wanted) > 1 else wanted[0] in parts
        index = config.with_name("model.safetensors.index.json")
        needed = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
        if here and all(config.with_name(name).is_file() for name in needed):
            return config.parent
    return None


def write_priors(sample):
    """A valid submission at once."""
    with open(sample, newline="") as source, open("submission.csv", "w", newline="") as target:
        rows = csv.DictReader(source)
        writer = csv.DictWriter(target, rows.fieldnames, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: PRIOR.get(name, cell) for name, cell in row.items()} for row in rows)


def check_machine():
    """The Python that the wheels are for, torch, and the GPUs that were asked for."""
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if here not in PYTHONS:
        raise RuntimeError(f"the wheels are for Python {PYTHONS}, and this image has {here}: package again for it")
    for name in ("torch", "transformers", "peft", "accelerate"):
        print(name, importlib.metadata.version(name))
    try:
        gpus = subprocess.check_output(["nvidia-smi", "--list-gpus"], text=True).strip().splitlines()
    except (OSError, subprocess.CalledProcessError):
        gpus = []
    print("Python", here, *gpus, sep="\n")
    if len(gpus) < GPUS:
        print(f"WARNING: {GPUS} GPUs were asked for, and there are {len(gpus)}: scores will be slow to come")
    return here


python = check_machine()
competition = wait_for(f"the files of {COMPETITION}", find_competition)
if competition is None:
    raise RuntimeError(f"no input holds {COMPETITION}: add the competition to the notebook's input")
sample = competition / "sample_submission.csv"
if sample.is_file():
    write_priors(sample)
wheels, bundles = assemble("wheels"), assemble("bundle")
base = wait_for(f"the base model {BASE}", find_base) if BASE else None
if BASE and base is None:
    give_way(f"no input holds the base model {BASE}: attach it")
    if STANDALONE:  # the rerun has these, and takes their plain mean
        BUNDLES = MEMBERS = STANDALONE
        lacking.pop()
print(competition, base or "no base model is attached", lacking or "all is as it was packaged", sep="\n")

# %% [markdown] about-install
# ## Install
# Only what the image lacks. A requirement that the image does not meet is named here, should a later cell stumble over
# it.


# %% install
def run(module, *arguments):
    """`python -m module ...`, its output as a log; returns the exit code."""
    environment = {**os.environ, "FORCE_COLOR": "", "HF_HUB_OFFLINE": "1"}
    return subprocess.call([sys.executable, "-m", module, *map(str, arguments)], env=environment)


if not lacking:
    folder = wheels / WHEELHOUSE
    if run("pip", "install", "--no-index", "--no-deps", "--find-links", folder, *REQUIREMENTS[python]):
        give_way("the wheels can't be installed; pip says why above")

if not lacking:
    from packaging.requirements import Requirement

    for needed in map(Requirement, importlib.metadata.requires("pairclf")):
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            found = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            found = "none"
        if found == "none" or not needed.specifier.contains(found, prereleases=True):
            print(f"note: pairclf asks for {needed}; the image has {found}")

# %% [markdown] about-verify
# ## Verify
# Each bundle scores the rows that it was validated with, and must give the logits that it gave at home.

# %% verify
attached = ["--base", base] if base else []
if not lacking:
    folders = [bundles / name for name in BUNDLES]
    if run("pairclf", "verify", *folders, *attached, "--out", "verify.json"):
        what = "a bundle is not what was validated, or can't be loaded; `pairclf verify` says why above"
        if not RERUN:
            raise RuntimeError(what)
        print(f"WARNING: {what}")  # a model that can't be loaded is left out of the blend

# %% [markdown] [submission] about-predict
# ## Predict
# Against the clock: rows that bring most come first, and submission.csv is valid at every moment. A run that is killed,
# by the memory's limit for one, goes on from its journal.

# %% [submission] predict
until = STARTED + DEADLINE / SPEED
RESTARTS = 5
if not lacking:
    test = sorted(competition.glob("test.*"))[0]
    members = [bundles / name for name in MEMBERS]
    end = datetime.fromtimestamp(until, UTC).isoformat()
    options = ["--data", test, "--sample", sample, "--out", "submission.csv", "--scores", "scores.parquet"]
    for _ in range(1 + RESTARTS):
        code = run("pairclf", "predict", *members, *attached, *options, "--deadline", end, "--strict")
        if not (code < 0 or code == 137) or time.time() > until:
            break
        print(f"predict was killed (exit code {code})")
    if code:
        give_way(f"not every row was scored by every model (exit code {code}); `pairclf predict` says which above")

# %% [markdown] [submission] about-look
# ## A look at the submission

# %% [submission] look
import polars as pl

submission = pl.read_csv("submission.csv")
print(f"{submission.height:,} rows", submission.head(), sep="\n")
if Path("scores.parquet").is_file():
    scores = pl.read_parquet("scores.parquet")
    print("class means:", scores.select(pl.col(pl.Float64).mean()), sep="\n")
    print("rows by orders and models that scored them; no order: the prior stands")
    print(scores.group_by("orders", pl.col("models").list.len()).len().sort("orders", "models"))
else:
    print("no row was scored: the priors stand")

# %% [markdown] [server] about-serve
# ## Serve
# The competition asks batch by batch, through its own package. When time runs short, rows have the priors.

# %% [server] serve
if lacking:
    raise RuntimeError(f"nothing can be served: {lacking}")
importlib.invalidate_caches()
sys.path.insert(0, str(competition))
from kaggle_evaluation.default_inference_server import DefaultInferenceServer

from pairclf.jobs.serve import Server

server = Server([bundles / name for name in MEMBERS], base=base, seconds=STARTED + DEADLINE / SPEED - time.time())
inference = DefaultInferenceServer(server.predict)
if RERUN:
    inference.serve()
else:
    inference.run_local_gateway((str(competition),))
