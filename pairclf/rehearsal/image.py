"""Stand-ins for Kaggle's image: environments with its packages or this one's, without those that Kaggle lacks."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Collection
from importlib.metadata import distributions, requires
from pathlib import Path

import uv
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from pairclf.console import console
from pairclf.errors import PackagingError
from pairclf.files import locked, write_text
from pairclf.packaging.commands import run_command
from pairclf.packaging.image_profiles import read_profile
from pairclf.packaging.install_check import compile_pins, is_of_the_driver
from pairclf.packaging.interpreters import find_interpreter, full_version

_FOR_COMPILERS = (".c", ".cuh", ".h", ".hpp", ".pyi")  # a third of the files, and no notebook reads them
_RUNNER = ("ipykernel", "jupyter-client", "nbclient", "nbformat", "pip")  # what executes a notebook, and its `!pip`
_PINS = "pins.txt"  # written last: an environment without it was not finished
_SITES = (
    "import sys; print(*(path for path in sys.path if path.endswith(('site-packages', 'dist-packages'))), sep='\\n')"
)
_NEEDED = "import sys; print(sys.base_prefix, *sys.path, sep='\\n')"
_OF_PYTHON = ("bin", "lib", "lib64", "libexec", "share", "ssl")  # folders below its prefix that it may read
_PROBE = """
import importlib.metadata, importlib.util, sys
for name in sys.argv[1:]:
    if importlib.util.find_spec(name.replace("-", "_")):
        sys.exit(f"{name} can still be imported")
    try:
        sys.exit(f"{name} {importlib.metadata.version(name)} is still installed")
    except importlib.metadata.PackageNotFoundError:
        pass
"""

# A kernel's environment is thrown away with the byte code that it made: made once here, each rehearsal saves as much.
_IMPORT_ALL = """
import importlib, importlib.metadata, importlib.util, re, sys
missing = set(sys.argv[1:])
for module, projects in importlib.metadata.packages_distributions().items():
    asked = {re.sub("[-_.]+", "-", name).lower() for name in projects} & set(sys.argv[1:])
    # A project's top_level.txt can name modules that no file is (pyarrow 18 has `__dummy__` there).
    if asked and importlib.util.find_spec(module) is not None:
        importlib.import_module(module)
        missing -= asked
if missing:
    sys.exit(f"no module of theirs can be imported: {sorted(missing)}")
"""
"""Import every module of the projects that are named."""


def make_image(folder: Path, hidden: Collection[str], environment: Path | None = None) -> Path:
    """Make a virtual environment in `folder`, and return its interpreter.

    Its files are symbolic links to those of another environment: that takes seconds and no room. Its folders are its
    own, so whatever pip removes or writes anew in there stays in there. No link is a hard one: the kernel may write to
    this environment, and through a hard link it would write to the other one.

    Args:
        folder: does not exist yet.
        hidden: projects that must not be there, their files (an editable install's too) left out.
        environment: interpreter of the environment to link, such as `image_environment` returns; None: this one.

    Raises:
        PackagingError: a hidden project can still be imported, or the environment can't be had.
    """
    source = Path(sys.executable) if environment is None else environment
    _run("venv", str(source), "-I", "-m", "venv", "--symlinks", "--without-pip", str(folder))
    python = folder / "bin" / "python"
    target = next(folder.glob("lib/python*/site-packages"))
    left_out = {canonicalize_name(name) for name in hidden}
    for site in _site_folders(source):
        _link_tree(site, target, _files_of(left_out, site))
    command = [str(python), "-I", "-c", _PROBE, *sorted(left_out)]
    probe = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        raise PackagingError(
            f"the stand-in for Kaggle's image does not hide what it must: {probe.stderr.strip()}",
            remedy="rehearse from an environment into which it was installed by pip",
        )
    return python


def image_environment(python: str, profile: Path, cache: Path) -> Path:
    """Make an environment of that Python with the image's versions, if it does not exist yet; returns its interpreter.

    It holds what pairclf asks for as far as the image has it, what that needs, and what executes a notebook; nothing
    that a wheelhouse carries. Local labels are dropped: it is torch 2.11.0 as the registry has it, not +cu128.

    Args:
        python: 3.12
        profile: what the image holds; see `image_profiles.py`.
        cache: folder for such environments, gigabytes each; one of the same Python and profile is used again, so it
            must not be changed: rehearse in a `make_image` of it.

    Raises:
        PackagingError: this machine has no such Python, or the packages can't be had.
    """
    interpreter = find_interpreter(python)
    if interpreter is None:
        raise PackagingError(
            f"there is no Python {python} here to rehearse with",
            remedy=f"`uv python install {python}`, or rehearse with the running one",
        )
    image = read_profile(python, profile)
    names = sorted({*(_required_projects(python) & image.versions.keys()), *_RUNNER})
    pins = {name: Version(version.public) for name, version in image.versions.items()}
    key_parts = [full_version(interpreter), str(interpreter), *names]
    key_parts += [f"{name}=={pins[name]}" for name in sorted(pins)]
    key = hashlib.sha256("\n".join(key_parts).encode()).hexdigest()[:12]
    folder = cache.resolve() / f"python{python}-{key}"
    with locked(folder.with_name(f"{folder.name}.lock")):
        if not (folder / _PINS).is_file():
            _install_environment(folder, interpreter, python, names, pins)
    return folder / "bin" / "python"


def _required_projects(python: str) -> set[str]:
    """Names of pairclf's requirements under that Python, without its extras."""
    environment = {"extra": "", "python_version": python}
    lines = [Requirement(line) for line in requires("pairclf") or ()]
    return {
        canonicalize_name(requirement.name)
        for requirement in lines
        if requirement.marker is None or requirement.marker.evaluate(environment)
    }


def _install_environment(
    folder: Path, interpreter: Path, python: str, names: Collection[str], pins: dict[str, Version]
) -> None:
    """Install the environment; `pins.txt` in it lists what it holds."""
    if folder.exists():  # of a process that was killed
        shutil.rmtree(folder)
    console.print(f"Python {python}: installing the image's packages in {folder}: up to 5 GB, some minutes, once")
    chosen = compile_pins(python, sorted(names), pins)
    for name, version in chosen.items():
        if pins.get(name, version) != version and not is_of_the_driver(name):  # those come with the registry's torch
            console.print(f"Python {python}: {name} {version} stands for the image's {pins[name]}, which can't be had")
    text = "".join(f"{name}=={version}\n" for name, version in chosen.items())
    _run("venv", uv.find_uv_bin(), "venv", "--quiet", "--python", str(interpreter), str(folder))
    asked = folder / "asked.txt"
    asked.write_text(text, encoding="utf-8")
    install = ("pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:")
    _run("install", uv.find_uv_bin(), *install, "--python", str(folder / "bin" / "python"), "-r", str(asked))
    _run("import", str(folder / "bin" / "python"), "-I", "-c", _IMPORT_ALL, *names)
    write_text(folder / _PINS, text)


def _run(what: str, *command: str) -> str:
    remedy = "it needs room on the disk, and for another Python than the running one a package registry"
    return run_command(command, f"the stand-in for Kaggle's image could not be made, at {what}", remedy)


def _site_folders(python: Path) -> list[Path]:
    """An environment's site-packages; the first one takes precedence."""
    return [Path(line) for line in _run("look", str(python), "-I", "-c", _SITES).splitlines() if Path(line).is_dir()]


def _files_of(projects: Collection[str], site: Path) -> set[Path]:
    """All files that the projects have below `site`, by their RECORD."""
    installed = (entry for entry in distributions(path=[str(site)]) if canonicalize_name(entry.name) in projects)
    return {Path(os.path.normpath(str(file.locate()))) for entry in installed for file in entry.files or []}


def _link_tree(source: Path, target: Path, left_out: Collection[Path]) -> None:
    """Link the files of `source`, except those left out, byte code beside them, and files for compilers."""
    emptied = {path.parent / "__pycache__" for path in left_out}
    for root, _, names in os.walk(source):
        folder = Path(root)
        if folder in emptied:
            continue
        for name in names:
            path, link = folder / name, target / folder.relative_to(source) / name
            if path.suffix not in _FOR_COMPILERS and path not in left_out and not link.exists():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path)


def needed_by(python: Path) -> list[Path]:
    """The folders that an image's interpreter reads, if the image was made of the environment of `python`.

    Those of the interpreter itself, and the environment's site-packages; what an editable install adds is not there.
    """
    base, *paths = map(Path, _run("look", str(python), "-I", "-c", _NEEDED).splitlines())
    folders = [base / name for name in _OF_PYTHON]
    folders += [path for path in paths if path.is_relative_to(base) or path.name in ("site-packages", "dist-packages")]
    link = python
    while link.is_symlink():
        link = Path(os.path.normpath(link.parent / os.readlink(link)))
        folders.append(link.parent)
    existing = [path for path in folders if path.exists()]
    return [*existing, *map(Path.resolve, existing)]
