#!/usr/bin/env bash
# install_learn2learn.sh PYTHON: installs learn2learn, for the tests that take episodes from its tasksets.
#
# Its last release is a source distribution with C files of an old Cython that Python 3.11 does not compile, and
# it asks for packages that nothing here needs. So the C files are generated anew, and what it imports is installed by name.
set -euo pipefail
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
cd "$(dirname "$0")/.."
install=("$python" -m pip install --disable-pip-version-check --quiet -c constraints.txt)
"${install[@]}" setuptools wheel cython scipy requests gym
"${install[@]}" --no-deps --no-build-isolation --use-pep517 --config-settings=--global-option=build_ext learn2learn
"$python" -W ignore -c "import learn2learn"
