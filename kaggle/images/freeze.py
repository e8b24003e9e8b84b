# `freeze.ipynb`, the notebook that a user runs on Kaggle, is this cell; tests/packaging/test_profiles.py compares them.
# %% freeze
# Writes pythonX.Y.txt, what this image holds. Run it on Kaggle with the accelerator that your competition gives, the
# internet may be off; put the file into a folder and name that folder in pairclf's setting package.image_freezes.
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

python = f"{sys.version_info.major}.{sys.version_info.minor}"
built = [path.read_text().strip() for path in (Path("/etc/git_commit"), Path("/etc/build_date")) if path.is_file()]
frozen = subprocess.check_output([sys.executable, "-m", "pip", "freeze", "--all"], text=True)
header = f"""# What Kaggle's image with Python {python} holds: `pip freeze --all` of {datetime.now(UTC):%Y-%m-%d}.
# Image: {", built ".join(built) or "not said"}. GPU: {Path("/dev/nvidia0").exists()}.
"""
Path(f"python{python}.txt").write_text(header + frozen)
print(header + frozen)
