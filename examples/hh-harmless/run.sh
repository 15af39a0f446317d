#!/usr/bin/env bash
# Reward, RL and evaluation on Anthropic HH. Put train.jsonl and dev.jsonl (rows with chosen and rejected, as published) into
# data/hh-harmless first; HH holds offensive text. Add --load-in-4bit to each command for a 4-bit base.
set -euo pipefail
cd "$(dirname "$0")/../.."
perl reward --config examples/hh-harmless/reward.yaml
perl rl --config examples/hh-harmless/rl.yaml
perl eval --model runs/hh-harmless/reward --data data/hh-harmless/dev.jsonl
perl eval --model runs/hh-harmless/rl --reward runs/hh-harmless/reward --data data/hh-harmless/dev.jsonl
