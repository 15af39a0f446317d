#!/usr/bin/env bash
# SFT, reward, RL and evaluation on Anthropic HH, with the recipe hh-harmless.
# It downloads the data from the Hub; HH contains offensive text.
# Add --load-in-4bit to each command for a 4-bit base.
set -euo pipefail
cd "$(dirname "$0")/../.."
perl sft --recipe hh-harmless
perl reward --recipe hh-harmless
perl eval --recipe hh-harmless --model runs/hh-harmless/reward
perl rl --recipe hh-harmless
perl eval --recipe hh-harmless
