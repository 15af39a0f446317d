#!/usr/bin/env bash
# RL on the embedded base with a Python function as the reward.
set -euo pipefail
cd "$(dirname "$0")"
perl rl --config rl.yaml
