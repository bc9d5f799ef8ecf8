#!/usr/bin/env bash
# Rewrites constraints.txt from what .venv holds: exact pins, without Stillroom itself and without a build's local label (torch's "+cpu").
set -euo pipefail
cd "$(dirname "$0")/.."
{
  echo "# Exact versions that this commit is tested with; written by scripts/pin.sh. Used by the Makefile."
  .venv/bin/python -m pip freeze --exclude-editable | grep -v -i -E '^(stillroom|setuptools|wheel|pip)\b' | sed -E 's/^([^ ]+==[^+ ]+)\+[^ ]+$/\1/' | LC_ALL=C sort -f
} > constraints.txt
