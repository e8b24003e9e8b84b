#!/bin/sh
# Install what `pytest --thorough` opens pages with: Debian's Chromium and its driver, by apt as root, and selenium in .venv.
# It changes the system's packages; tests of pages are skipped without it.
set -eu
cd "$(dirname "$0")/.."
echo "installs with apt: chromium chromium-driver; with pip into .venv: selenium"
apt-get install --yes --no-install-recommends chromium chromium-driver
.venv/bin/python -m pip install --quiet -c constraints.txt -e '.[browser]'
