"""Template of the Kaggle notebook, read by pairclf/packaging/notebook.py.

Percent format: each cell opens with `# %% id`. A word in double braces is filled in when a package is built; in code
it stands between quotes, and a list of words takes the place of its quoted name.
Nothing is computed here: the notebook finds its inputs, installs pairclf, and calls the same commands that validated
the bundles at home.
"""

# %% [markdown] about
# # {{title}}
# Made by pairclf {{version}} for the competition `{{competition}}`. It needs no internet.
#
# Each bundle below is a trained classifier on the base model `{{base}}`; what is scored is the mean over them. The
# figures are those of rows that the bundle was not trained on.
#
# | bundle | held out | metrics | seal |
# |---|---|---|---|
# {{bundle_table}}
#
# Before a row is scored, every file is compared with the hash it had at home, and every bundle scores the probe
# rows that it was validated with: the model that runs here is the model that was measured.

# %% settings
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

COMPETITION = "{{competition}}"
BUNDLES = ["{{bundles}}"]  # folders in the bundle dataset
# The attached Kaggle model that the bundles stand on: owner/model/framework/instance/version. Empty: inside the wheel.
BASE_MODEL = "{{base_model}}"
PYTHONS = ["{{pythons}}"]  # that the wheels install on
REQUIREMENTS = ["{{requirements}}"]  # from the wheel dataset; all else is the image's
MARKERS = {  # SHA-256 of pairclf-bundle.json and pairclf-wheels.json
    "bundle": "{{bundle_sha256}}",
    "wheels": "{{wheels_sha256}}",
}
INPUT = Path(os.environ.get("PAIRCLF_KAGGLE_INPUT", "/kaggle/input"))


def run(module, *arguments):
    """`python -m module ...`, whose failure stops the notebook; its output is a log, not a terminal's."""
    environment = {**os.environ, "FORCE_COLOR": ""}
    subprocess.check_call([sys.executable, "-m", module, *map(str, arguments)], env=environment)


# %% [markdown] about-machine
# ## The machine

# %% machine
python = f"{sys.version_info.major}.{sys.version_info.minor}"
assert python in PYTHONS, f"the wheels are for Python {PYTHONS}, this image has {python}: package again for it"
print("Python", python)
for name in ("torch", "transformers", "peft", "accelerate"):
    print(name, importlib.metadata.version(name))

try:
    print(subprocess.check_output(["nvidia-smi", "--list-gpus"], text=True).strip())
except (FileNotFoundError, subprocess.CalledProcessError):
    print("no GPU here: the scores will be the same, and slow to come")

print("inputs:", *sorted(str(path.relative_to(INPUT)) for path in INPUT.glob("*/*")), sep="\n  ")

# %% [markdown] about-inputs
# ## The inputs
# Kaggle has mounted datasets at different paths over the years, so they are searched for by their marker files.


# %% inputs
def sha256(path):
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def find_payload(kind):
    """The folder of a dataset of ours, each file of it as it was when this notebook was made."""
    markers = sorted(INPUT.rglob(f"pairclf-{kind}.json"))
    ours = [marker for marker in markers if sha256(marker) == MARKERS[kind]]
    assert ours, f"no pairclf-{kind}.json with the right hash; found {markers}: attach the dataset of this notebook"
    folder = ours[0].parent
    for name, expected in json.loads(ours[0].read_text())["files"].items():
        assert (folder / name).is_file(), f"{name} is missing in {folder}: upload the dataset again"
        assert sha256(folder / name) == expected, f"{name} in {folder} was changed: upload the dataset again"
    return folder


def find_competition():
    """The competition's test file and sample submission."""
    samples = [path for path in INPUT.rglob("sample_submission.csv") if COMPETITION in path.parts]
    tests = [test for sample in samples for test in sorted(sample.parent.glob("test.*"))]
    assert tests, f"no {COMPETITION} with test.* and sample_submission.csv: add the competition to the notebook's input"
    return tests[0], tests[0].parent / "sample_submission.csv"


def find_base():
    """`--base FOLDER` of the attached base model, whatever lies above model/framework/instance/version."""
    if not BASE_MODEL:
        return []
    tail = [part.lower() for part in BASE_MODEL.split("/")[1:]]
    for config in sorted(INPUT.rglob("config.json")):
        if [part.lower() for part in config.parent.parts[-len(tail) :]] == tail:
            return ["--base", config.parent]
    raise AssertionError(f"no config.json in a folder {'/'.join(tail)}: attach the model {BASE_MODEL}")


wheels = find_payload("wheels")
bundle_folder = find_payload("bundle")
bundles = [bundle_folder / name for name in BUNDLES]
test, sample = find_competition()
base = find_base()
print(wheels, *bundles, test, sample, *base, sep="\n")

# %% [markdown] about-install
# ## Install
# Only our own wheels. A requirement that the image does not meet is named here, should a later cell stumble over it.

# %% install
run("pip", "install", "--no-index", "--no-deps", "--find-links", wheels, *REQUIREMENTS)

from packaging.requirements import Requirement

for line in importlib.metadata.requires("pairclf"):
    needed = Requirement(line)
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
run("pairclf", "verify", *bundles, *base)

# %% [markdown] about-predict
# ## Predict

# %% predict
files = ["--data", test, "--sample", sample, "--out", "submission.csv", "--scores", "scores.parquet"]
run("pairclf", "predict", *bundles, *base, *files)

# %% [markdown] about-look
# ## A look at the submission

# %% look
import polars as pl

submission = pl.read_csv("submission.csv")
scores = pl.read_parquet("scores.parquet")
print(f"{submission.height:,} rows; class means:")
print(scores.select(pl.col(pl.Float64).mean()))
print("scored in so many orders, by so many models:")
print(scores.group_by("orders", pl.col("models").list.len()).len().sort("orders"))
submission.head()
