#!/usr/bin/env bash
# The tests, with the image of a node where an engine answers. `make test` calls this with an engine running.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
"$python" -m testbed.image || [ "${CI:-}" != true ] # without one the tests of containers say that they skip
exec "$python" -m pytest "$@"
