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
# | bundle | base model | held out | metrics | weight | seal |
# |---|---|---|---|---|---|
# {{bundle_table}}
#
# Before a row is scored, every file is compared with the hash it had at home, and every bundle scores the probe
# rows that it was validated with: the model that runs here is the model that was measured.{{note_of_trust}}
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
import re
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
SETTINGS = "{{settings}}"  # of the test's and the submission's columns
IDS = "{{ids}}"  # the test's column of ids, and the submission's
TRUST = "{{trust}}"  # flags that `pairclf package` was given, and that the commands below are given
GPUS = "{{gpus}}"
DEADLINE = "{{deadline}}"  # seconds from now on
LIMIT = "{{limit}}"  # likewise, when Kaggle ends the run
ROWS = "{{rows}}"  # expected in the hidden test, about
LANDMARK = "{{landmark}}"  # what the competition's folder is known by
SERVES = LANDMARK == "kaggle_evaluation"  # Kaggle hands out the rows, and writes the submission
TESTS = ("test.parquet", "test.csv", "test.jsonl")  # the first that is there
MOUNT_SECONDS = 600  # in which an input that is empty at first must fill
STILL_SECONDS = 20  # after which a file that has not grown is no longer being written

INPUT = Path(os.environ.get("PAIRCLF_KAGGLE_INPUT", "/kaggle/input"))
SPEED = float(os.environ.get("PAIRCLF_CLOCK_SPEED", "1"))  # of the clock; rehearsals have a faster one
RERUN = bool(os.environ.get("KAGGLE_IS_COMPETITION_RERUN"))
PAUSE = max(0.02, 1 / SPEED)  # seconds between two looks
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


def past(seconds):
    """Whether so many seconds, as the run's clock counts them, have passed since the start."""
    return time.time() > STARTED + seconds / SPEED


def glance(look):
    """What `look` returns; None where a file is listed and can't be read yet."""
    try:
        return look()
    except OSError:
        return None


def wait_for(what, look):
    """What `look` returns, once it has done so twice: what is being mounted still changes. None: it never came."""
    found, said = glance(look), False
    while True:
        before = found
        time.sleep(PAUSE)
        found = glance(look)
        if (found is not None and found == before) or past(MOUNT_SECONDS):
            return found
        if not said:
            print(f"waiting for {what}")
        said = True


def sha256(path):
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_intact(path, expected):
    """Whether a file is as it was at home."""
    return sha256(path) == expected


def pick(places, expected):
    """The first of a file's copies that is as it was at home; None where none is, and none is still being written."""
    sizes = None
    while True:
        found = next((path for path in places if is_intact(path, expected)), None)
        before, sizes = sizes, [(path.stat().st_size, path.stat().st_mtime_ns) for path in places]
        if found or (before and past(MOUNT_SECONDS)) or (before == sizes and all(size for size, _ in sizes)):
            return found
        time.sleep(STILL_SECONDS / SPEED)


def columns(path):
    """Of a CSV file, which may be empty."""
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as stream:
        return next(csv.reader(stream), [])


def find_competition():
    """The competition's folder, once its landmark is whole, and that one's size.

    Examples in a folder below have samples too; so what does not lie at the top must have been there for a while.
    """
    slug = COMPETITION.lower()
    known = [path for path in find(LANDMARK) if slug in map(str.lower, path.relative_to(INPUT).parts)]
    mark = min(known, key=lambda path: len(path.parts), default=None)
    if mark is None or (mark.parent.name.lower() != slug and not past(STILL_SECONDS)):
        return None
    if mark.is_file() and not PRIOR.keys() & set(columns(mark)):
        return None
    return mark.parent, mark.stat().st_size


def find_test():
    """The test file, and its size."""
    found = next((competition / name for name in TESTS if (competition / name).is_file()), None)
    return (found, found.stat().st_size) if found and found.stat().st_size else None


def find_payload(kind):
    """`{file: (its copies, its hash)}` of all parts, once every file is somewhere."""
    files = {}
    for name, expected in PARTS[kind].items():
        markers = [path for path in find(name) if path.is_file() and sha256(path) == expected]
        listed = json.loads(markers[0].read_text())["files"] if markers else {}
        for file, digest in listed.items():
            files[file] = [path.parent / file for path in markers if (path.parent / file).is_file()], digest
        if not markers:
            return None
    return files if all(places for places, _ in files.values()) else None


def assemble(kind):
    """A folder with a payload's files, in however many parts they came: each as it was at home, and a link to it."""
    files = wait_for(f"the {kind}", lambda: find_payload(kind))
    if files is None:
        there = [str(path.relative_to(INPUT)) for path in find("pairclf-*.json")]
        give_way(f"no input holds the {kind} {list(PARTS[kind])}, or not all files; markers found: {there}. Attach it")
        return None
    top = Path(tempfile.mkdtemp(prefix=f"pairclf-{kind}-"))
    for name, (places, expected) in files.items():
        path = pick(places, expected)
        if path is None:
            raise RuntimeError(f"{name} was changed: {places[0]} is not the file that was packaged. Upload it again")
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).symlink_to(path.resolve())
    return top


def weights(folder):
    """`{file: size}` of a model's weights; nothing, unless all are there that an index names."""
    there = {path.name: path.stat().st_size for kind in ("*.safetensors", "*.bin") for path in folder.glob(kind)}
    indices = sorted(folder.glob("*.index.json"))
    for index in indices:
        try:
            needed = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError):  # it is being written, or another kind's
            continue
        if all(there.get(name) for name in needed):
            return {name: there[name] for name in needed}
    whole = {name: size for name, size in there.items() if size and "-of-" not in name}  # a shard has an index
    return {} if indices else whole


def find_base():
    """The base model's folder, whatever lies above it, once it has weights, and these."""
    wanted = BASE.lower().replace("_", "").split("/")[1:]
    for config in sorted(find("config.json"), key=lambda path: len(path.parts)):
        parts = str(config.parent).lower().replace("_", "").split("/")
        here = parts[-len(wanted) :] == wanted if len(wanted) > 1 else wanted[0] in parts
        if here and config.stat().st_size and (there := weights(config.parent)):
            return config.parent, there
    return None


def write_priors(sample):
    """A valid submission at once."""
    with open(sample, newline="", encoding="utf-8-sig") as source, open("submission.csv", "w", newline="") as target:
        rows = csv.DictReader(source, strict=True)  # a quote that is not doubled would take rows along
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
competition, _ = wait_for(f"the files of {COMPETITION}", find_competition) or (None, 0)
if competition is None:
    there = [str(path.relative_to(INPUT)) for path in find(LANDMARK)]
    what = f"no input holds {COMPETITION} with a {LANDMARK} that is whole; found: {there}"
    raise RuntimeError(f"{what}. Add the competition to the notebook's input")
sample = competition / "sample_submission.csv"
if sample.is_file() and not SERVES:
    write_priors(sample)
test, _ = (None if SERVES else wait_for("the test rows", find_test)) or (None, 0)
if test is None and not SERVES:
    give_way(f"{competition} has no test rows; it should have one of {', '.join(TESTS)}")
wheels, bundles = assemble("wheels"), assemble("bundle")
base, _ = (wait_for(f"the base model {BASE}", find_base) if BASE else None) or (None, {})
if BASE and base is None:
    give_way(f"no input holds the base model {BASE} with all of its weights: attach it")
    if STANDALONE:  # the rerun has these, and takes their plain mean
        BUNDLES = MEMBERS = STANDALONE
        lacking.pop()
print(competition, base or "no base model is attached", lacking or "all is as it was packaged", sep="\n")

# %% [markdown] about-install
# ## Install
# Only what the image lacks. A requirement that the image does not meet is named here, should a later cell stumble over
# it.


# %% install
MINUTE = 60  # that a rehearsal's clock makes no shorter: to start and to end, a process takes what it takes


def run(module, *arguments, seconds=DEADLINE):
    """`python -m module ...`, its output as a log.

    Returns the exit code: -9 if it was killed, as it is when it still runs so many seconds after the start.
    """
    kept = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "CLICOLOR_FORCE")}
    environment = {**kept, "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}
    left = max(1, STARTED + (seconds - MINUTE) / SPEED + MINUTE - time.time())
    try:
        return subprocess.call([sys.executable, "-m", module, *map(str, arguments)], env=environment, timeout=left)
    except subprocess.TimeoutExpired:
        print(f"{module} {arguments[0]} hung, and was killed")
        return -9


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
SERVE_SECONDS = 600  # until which the rerun must be about to serve: Kaggle gives 15 minutes
attached = [*(["--base", base] if base else []), *TRUST, "--linked-files"]  # `assemble` linked them, each as it was
if not lacking:
    folders = [bundles / name for name in BUNDLES]
    longest = SERVE_SECONDS if RERUN and SERVES else DEADLINE / 4
    if run("pairclf", "verify", *folders, *attached, "--out", "verify.json", seconds=longest):
        what = "a bundle is not what was validated, can't be loaded, or took too long; `pairclf verify` says why above"
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
last = (DEADLINE + max(DEADLINE, LIMIT)) / 2  # seconds; whoever has not ended by then hangs
if not lacking:
    members = [*(bundles / name for name in MEMBERS), *SETTINGS]
    end = datetime.fromtimestamp(until, UTC).isoformat()
    options = ["--data", test, "--sample", sample, "--out", "submission.csv", "--scores", "scores.parquet"]
    for _ in range(1 + RESTARTS):
        code = run("pairclf", "predict", *members, *attached, *options, "--deadline", end, "--strict", seconds=last)
        if not (code < 0 or code == 137) or time.time() > until:
            break
        print(f"predict was killed (exit code {code})")
    if code:
        give_way(f"not every row was scored by every model (exit code {code}); `pairclf predict` says which above")

# %% [markdown] [submission] about-look
# ## A look at the submission


# %% [submission] look
def look():
    """Print the submission's head, and where its rows come from."""
    import polars as pl

    submission = pl.read_csv("submission.csv", infer_schema=False)  # an id may be a number here and a name there
    print(f"{submission.height:,} rows", submission.head(), sep="\n")
    if not Path("scores.parquet").is_file():
        print("no row was scored: the priors stand")
        return
    scores = pl.read_parquet("scores.parquet")
    print("class means:", scores.select(pl.col(pl.Float64).mean()), sep="\n")
    print("rows by orders and models that scored them; no order: the prior stands")
    print(scores.group_by("orders", pl.col("models").list.len()).len().sort("orders", "models"))


try:
    look()
except BaseException as error:  # polars' panics are no Exceptions
    if not RERUN:
        raise
    print(f"WARNING: no look at the submission, which stands: {type(error).__name__}: {error}")

# %% [markdown] [server] about-serve
# ## Serve
# The competition asks batch by batch, through its own package. When time runs short, rows have the priors.

# %% [server] serve
served = dict.fromkeys(("rows", "both", "one", "priors", "failed", "batches", "seconds"), 0)  # without the models
server = None


def give_priors(test, others):
    """The answer to a batch that no model sees: its sample submission, or its ids, with the priors."""
    wanted = [one for one in others if PRIOR.keys() & set(getattr(one, "columns", ()))]
    rows = wanted[0] if wanted else test[IDS[:1]]
    if not wanted:
        rows.columns = IDS[1:]
    names = wanted[0].columns if wanted else columns(sample) if sample.is_file() else PRIOR
    texts = {name: PRIOR[name] for name in names if name in PRIOR}
    values = {name: float(text) if re.fullmatch(r"\d\.\d+", text) else text for name, text in texts.items()}
    for name in ("rows", "priors"):
        served[name] += len(rows)
    served["batches"] += 1
    if not hasattr(rows, "with_columns"):
        return rows.assign(**values)
    import polars as pl

    return rows.with_columns(**{name: pl.lit(value) for name, value in values.items()})


def predict(test, *others):
    """The answer to a batch. In the rerun one always comes: an error would end it without a score."""
    if server is None:
        return give_priors(test, others)
    try:
        return server.predict(test, *others)
    except Exception as error:
        if not RERUN:
            raise
        print(f"WARNING: a batch has the priors: {type(error).__name__}: {error}")
        return give_priors(test, others)


if lacking and not RERUN:
    raise RuntimeError(f"nothing can be served: {lacking}")
importlib.invalidate_caches()
sys.path.insert(0, str(competition))
from kaggle_evaluation.default_inference_server import DefaultInferenceServer

if not lacking:
    try:
        from pairclf.inference.serve import Server
        from pairclf.trust import Trust

        members, left = [bundles / name for name in MEMBERS], STARTED + DEADLINE / SPEED - time.time()
        trust = Trust(remote_code=bool(TRUST), linked_files=True)
        limits = {"seconds": left, "rows": ROWS, "batch_seconds": 300 / SPEED}
        server = Server(members, base=base, overrides=SETTINGS, strict=not RERUN, trust=trust, **limits)
    except Exception as error:
        if not RERUN:
            raise
        give_way(f"the models can't be served: {type(error).__name__}: {error}")
inference = DefaultInferenceServer(predict)
try:
    if RERUN:
        inference.serve()
    else:
        inference.run_local_gateway((str(competition),))
finally:
    report = server.report() if server else {}
    report = {name: report.get(name, 0) + count for name, count in served.items()}
    Path("served.json").write_text(json.dumps(report))
    print("rows served, by how they were scored:", report)
    if server:
        server.close()
