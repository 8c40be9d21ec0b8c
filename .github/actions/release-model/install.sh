#!/usr/bin/env bash
# Install the command lifecycle, and the packages of a lock file with their hashes verified, into RUNNER_TEMP/lifecycle.
# It reads PYTHON and REQUIREMENTS, which action.yml sets, and GitHub's GITHUB_ACTION_PATH and RUNNER_TEMP.
set -euo pipefail
project=$GITHUB_ACTION_PATH/../../..
environment=$RUNNER_TEMP/lifecycle
python=$environment/bin/python
uv=("$environment/bin/uv" pip install --no-config --quiet --python "$python")

"$PYTHON" -m venv "$environment"
sed -n '/^uv==/,/^    # via/p' "$project/requirements.txt" >"$environment/uv.txt"
"$python" -m pip install --quiet --disable-pip-version-check --require-hashes --requirement "$environment/uv.txt"
"${uv[@]}" --require-hashes --requirement "$REQUIREMENTS"
"${uv[@]}" --no-deps --require-build-hashes --build-constraints "$project/requirements.txt" "$project"
