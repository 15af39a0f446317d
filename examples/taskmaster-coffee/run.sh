#!/usr/bin/env bash
# Reward, RL and evaluation on Taskmaster Coffee. Put train.json and dev.json (rows with context, generation and reward, as
# published in TM-4-2024/reward) into data/taskmaster-coffee first. Add --load-in-4bit to each command for a 4-bit base.
set -euo pipefail
cd "$(dirname "$0")/../.."
perl reward --config examples/taskmaster-coffee/reward.yaml
perl rl --config examples/taskmaster-coffee/rl.yaml
perl eval --model runs/taskmaster-coffee/reward --data data/taskmaster-coffee/dev.json
perl eval --model runs/taskmaster-coffee/rl --reward runs/taskmaster-coffee/reward --data data/taskmaster-coffee/dev.json
