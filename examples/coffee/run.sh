#!/usr/bin/env bash
# The embedded pipeline, stage by stage: what `perl quickstart` does, as commands.
set -euo pipefail
cd "$(dirname "$0")/../.."
perl sft --config examples/coffee/sft.yaml
perl reward --config examples/coffee/reward.yaml
perl rl --config examples/coffee/rl.yaml
perl eval --model runs/coffee/rl --reward runs/coffee/reward
